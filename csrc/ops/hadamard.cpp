// y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block
#include "hadamard.h"

#include <cmath>

#include "../glue.h"

namespace quantlib {

QL_KERNEL(hadamard, Hadamard)

static void hadamard(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "hadamard";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  const int64_t block = in.size();
  auto out = in.out("out");

  const Format& f = check_dtype(op, "x", x.dtype(), inputs);
  const int64_t K = x.sizes().empty() ? 1 : x.sizes().back();
  if (block < 1 || block > kMostHadamard || (block & (block - 1)) || K % block)
    fail(op, "block",
         "a power of two, at most " + std::to_string(kMostHadamard) + ", that divides the last size " +
             std::to_string(K),
         std::to_string(block));
  Output y(op, "out", std::move(out), {x.sizes().vec(), x.dtype()}, x.device());
  x.make_contiguous();
  void* data = y.data({&x});
  Backend backend(x.device());
  if (x.numel())
    backend.run(Hadamard{.x = x.data(),
                         .y = data,
                         .type = f.type,
                         .n = x.numel(),
                         .block = block,
                         .factor = float(1 / std::sqrt(double(block)))});
  y.finish(stack[0]);
}

QL_REGISTER("hadamard", hadamard)

}  // namespace quantlib
