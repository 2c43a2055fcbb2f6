// The ops on CUDA tensors: on the device of x, in the caller's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "../fake_quantize_ops.h"
#include "../matmul_ops.h"
#include "kernels.h"
#include "slab.h"

namespace quantlib {
namespace {

class Cuda {
 public:
  static constexpr bool reads_values = false;  // looking at a zero point would make the host wait

  explicit Cuda(Device device) : guard_(device.index), device_(device) {
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(device.index, &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }

#define QL_FORWARD(OP, PROBLEM) \
  void OP(const PROBLEM& problem) const { cuda::OP(problem, stream_); }
  QL_FORWARD(cast, Cast)
  QL_FORWARD(compute_scale, ComputeScale)
  QL_FORWARD(quantize, Quantize)
  QL_FORWARD(dequantize, Dequantize)
  QL_FORWARD(quantize_dynamic, QuantizeDynamic)
  QL_FORWARD(fake_quantize, FakeQuantize)
  QL_FORWARD(fake_quantize_backward, FakeQuantizeBackward)
  QL_FORWARD(scaled_matmul, ScaledMatmul)
#undef QL_FORWARD

#define QL_MULTIPLY(OP, PROBLEM)                                                     \
  void OP(const PROBLEM& problem) const {                                            \
    if (cuda::takes_slabs(problem)) cuda::multiply_slabs(problem, device_, stream_); \
    else cuda::OP(problem, stream_);                                                 \
  }
  QL_MULTIPLY(dequant_matmul, DequantMatmul)
  QL_MULTIPLY(dequant_matmul_backward, DequantMatmulBackward)
#undef QL_MULTIPLY

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  cuda::Stream stream_;
};

}  // namespace
}  // namespace quantlib

STABLE_TORCH_LIBRARY_IMPL(quantlib, CUDA, m) {
  quantlib::register_ops<quantlib::Cuda>(m);
  quantlib::register_fake_quantize<quantlib::Cuda>(m);
  quantlib::register_dequant_matmuls<quantlib::Cuda>(m);
  quantlib::register_tiled_matmul<quantlib::Cuda>(m);
  quantlib::register_scaled_matmuls<quantlib::Cuda>(m);
}
