// y[m, n] = epilogue(sum over k of x[m, k] * w[n, k]) where x has many rows: some rows of the weight at a time become
// values of x's type, few enough to stay in the cache until the vendor's product has read them. Of the gradient
// dx[m, k] = sum over n of dy[m, n] * w[n, k] some columns.
#pragma once
#include "../tensor.h"
#include "kernels.h"

namespace quantlib {
namespace cuda {

constexpr int64_t kSlab = int64_t(1) << 23;      // values of a slab, and sums, at most
constexpr int64_t kMostRows = int64_t(1) << 13;  // of x at a time

// Rows or columns of the weight at a time, of J: a multiple of what tiles and blocks of the vendor's product hold.
inline int64_t slab_rows(int64_t M, int64_t J, int64_t L) {
  return std::min(std::max<int64_t>(kSlab / std::max(L, M) / 128, 1) * 128, J);
}

// total [M, n] = x [M, K] * w [K, n], both of one 16-bit type, in float32 that is never rounded to it
inline void multiply(const Tensor& x, const Tensor& w, const Tensor& total) {
  namespace stable = torch::stable::detail;
  StableIValue stack[] = {stable::from(x.reference()), stable::from(w.reference()), stable::from(total.dtype()),
                          stable::from(total.reference())};
  check_torch(torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION));
  Tensor(stable::to<AtenTensorHandle>(stack[0]));  // `total` again, a reference that is ours
}

// What both products need: parts of x [M, L], dy where it is the gradient, and of the weight's J rows or columns.
class Slabs {
 public:
  Slabs(int64_t M, int64_t J, int64_t L, Type type, Device device)
      : device_(device),
        dtype_(type == Type::float16 ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16()),
        width_(slab_rows(std::min(M, kMostRows), J, L)),
        L_(L),
        values_(allocate(width_ * L, dtype_)),
        total_(allocate(std::min(M, kMostRows) * width_, aoti_torch_dtype_float32())) {}

  int64_t width() const { return width_; }
  void* values() const { return values_.data(); }
  // total [M, n] = x [M, L] * w [L, n], w of these strides
  const float* multiply(const void* x, int64_t M, const void* w, int64_t n, const int64_t (&strides)[2]) const {
    const Tensor left = Tensor::view(const_cast<void*>(x), {M, L_}, {L_, 1}, dtype_, device_);
    const Tensor right = Tensor::view(const_cast<void*>(w), {L_, n}, strides, dtype_, device_);
    const Tensor total = Tensor::view(total_.data(), {M, n}, {n, 1}, total_.dtype(), device_);
    cuda::multiply(left, right, total);
    return static_cast<const float*>(total.data());
  }

 private:
  Device device_;
  int32_t dtype_;
  int64_t width_, L_;
  Tensor values_, total_;

  Tensor allocate(int64_t n, int32_t dtype) const {
    const Sizes sizes = {n};
    return Tensor::empty(sizes, dtype, device_, {"dequant_matmul", "x"});
  }
};

inline void multiply_slabs(const DequantMatmul& p, Device device, Stream stream) {
  const Weight& weight = p.weight;
  const int64_t N = weight.grid.M, K = weight.grid.K;
  const bool scaled = weight.grid.bk < K;
  const Slabs slabs(p.M, N, K, p.x_type, device);
  for (int64_t m = 0; m < p.M; m += kMostRows) {
    const int64_t M = std::min(p.M - m, kMostRows);
    const auto* x = static_cast<const uint16_t*>(p.x) + m * K;
    auto* y = static_cast<uint16_t*>(p.y) + m * N;
    for (int64_t n = 0; n < N; n += slabs.width()) {
      const int64_t end = std::min(n + slabs.width(), N);
      const void* w = decode_slab({weight, p.tiled, scaled, p.x_type, n, end, 0, K, slabs.values()}, stream);
      const float* total = slabs.multiply(x, M, w, end - n, {1, K});
      finish_slab({M, total, scaled ? nullptr : &weight, n, end, N, p.epilogue, p.x_type, y}, stream);
    }
  }
}

inline void multiply_slabs(const DequantMatmulBackward& p, Device device, Stream stream) {
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  const Slabs slabs(p.M, K, N, p.dy_type, device);
  for (int64_t m = 0; m < p.M; m += kMostRows) {
    const int64_t M = std::min(p.M - m, kMostRows);
    const auto* dy = static_cast<const uint16_t*>(p.dy) + m * N;
    auto* dx = static_cast<uint16_t*>(p.dx) + m * K;
    for (int64_t k = 0; k < K; k += slabs.width()) {
      const int64_t end = std::min(k + slabs.width(), K);
      const void* w = decode_slab({p.weight, false, true, p.dy_type, 0, N, k, end, slabs.values()}, stream);
      const float* total = slabs.multiply(dy, M, w, end - k, {end - k, 1});
      finish_slab({M, total, nullptr, k, end, K, {nullptr, Activation::none}, p.dy_type, dx}, stream);
    }
  }
}

}  // namespace cuda
}  // namespace quantlib
