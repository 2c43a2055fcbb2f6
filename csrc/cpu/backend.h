// The kernels of this folder, as the glue of csrc/ops calls them: see ../glue.h.
#pragma once
#include "../tensor.h"
#include "kernels.h"

namespace quantlib {

// The kernels of the best instruction set of this machine, an index into those below; chosen when an op is first
// called.
int isa();
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

#define QL_DECLARE(ISA, OP, PROBLEM)    \
  namespace ISA {                       \
  void OP(const PROBLEM&, ParallelFor); \
  }
#ifdef __x86_64__
#define QL_KERNEL(OP, PROBLEM)                                                                            \
  QL_DECLARE(plain, OP, PROBLEM)                                                                          \
  QL_DECLARE(avx2, OP, PROBLEM)                                                                           \
  QL_DECLARE(avx512, OP, PROBLEM)                                                                         \
  QL_DECLARE(avx512_bf16, OP, PROBLEM)                                                                    \
  inline void launch(const PROBLEM& problem) {                                                            \
    static constexpr decltype(&plain::OP) kernels[] = {plain::OP, avx2::OP, avx512::OP, avx512_bf16::OP}; \
    kernels[isa()](problem, parallel_for);                                                                \
  }
#else
#define QL_KERNEL(OP, PROBLEM)   \
  QL_DECLARE(plain, OP, PROBLEM) \
  inline void launch(const PROBLEM& problem) { plain::OP(problem, parallel_for); }
#endif

QL_KERNEL(squared_error, SquaredError)

class Backend {
 public:
  static constexpr bool reads_values = true, takes_tiles = false, takes_narrow_scales = true;

  explicit Backend(Device) {}
  template <class Problem>
  void run(const Problem& problem) const {
    launch(problem);
  }
};

#define QL_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(quantlib, CPU, m)

}  // namespace quantlib
