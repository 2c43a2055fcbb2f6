// Memory and the vendor's product, through torch.
#include "backend.h"

// quantlib/_build.py looks for this text in the library's file, to know which devices have kernels in it.
extern "C" __attribute__((used, visibility("default"))) const char quantlib_targets[] = QL_TARGETS;

namespace quantlib {

void* Backend::allocate(int64_t bytes) {
  const Sizes sizes = {bytes};
  allocated_.push_back(Tensor::empty(sizes, aoti_torch_dtype_uint8(), device_, {"dequant_matmul", "x"}));
  return allocated_.back().data();
}

void Backend::multiply(const cuda::Matrix& x, const cuda::Matrix& w, Type type, float* sums) {
  namespace stable = torch::stable::detail;
  const int32_t float32 = aoti_torch_dtype_float32();
  const auto view = [&](const cuda::Matrix& m, int32_t dtype) {
    return Tensor::view(const_cast<void*>(m.data), {m.rows, m.columns}, m.strides, dtype, device_);
  };
  const int32_t dtype = type == Type::float16 ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
  const Tensor left = view(x, dtype), right = view(w, dtype);
  const Tensor out = view({sums, x.rows, w.columns, {w.columns, 1}}, float32);
  StableIValue stack[] = {stable::from(left.reference()), stable::from(right.reference()), stable::from(float32),
                          stable::from(out.reference())};
  check_torch(torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION));
  Tensor(stable::to<AtenTensorHandle>(stack[0]));  // `out` again, a reference that is ours
}

}  // namespace quantlib
