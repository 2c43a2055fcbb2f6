// The kernels of this folder, as the glue of csrc/ops calls them: see ../glue.h. They run on the device of x, in the
// caller's current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../tensor.h"
#include "kernels.h"

namespace quantlib {

#define QL_KERNEL(OP, PROBLEM)     \
  namespace cuda {                 \
  void OP(const PROBLEM&, Stream); \
  }                                \
  inline void launch(const PROBLEM& problem, cuda::Stream stream) { cuda::OP(problem, stream); }

class Backend : private cuda::Torch {
 public:
  static constexpr bool reads_values = false;  // looking at a zero point would make the host wait
  static constexpr bool takes_tiles = true, takes_narrow_scales = false;

  explicit Backend(Device device) : guard_(device.index), device_(device) {
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(device.index, &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  template <class Problem>
  void run(const Problem& problem) {
    launch(problem, cuda::Stream{stream_, this});
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  CUstream_st* stream_;
  std::vector<Tensor> allocated_;

  void* allocate(int64_t bytes) override;
  void multiply(const cuda::Matrix& x, const cuda::Matrix& w, Type type, float* sums) override;
};

#define QL_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(quantlib, CUDA, m)

}  // namespace quantlib
