// y[m, n] = epilogue(sum over k of x[m, k] * w[n, k]) where x has many rows: some rows of the weight at a time become
// values of x's type, few enough to stay in the cache until the vendor's product has read them.
#pragma once
#include "../tensor.h"
#include "kernels.h"

namespace quantlib {
namespace cuda {

constexpr int64_t kSlab = int64_t(1) << 23;      // values of a slab, and sums, at most
constexpr int64_t kMostRows = int64_t(1) << 13;  // of x at a time

// Rows of the weight at a time, of N: a multiple of what tiles and blocks of the vendor's product hold.
inline int64_t slab_rows(int64_t M, int64_t N, int64_t K) {
  return std::min(std::max<int64_t>(kSlab / std::max(K, M) / 128, 1) * 128, N);
}

// total [M, n] = x [M, K] * w [K, n], both of one 16-bit type, in float32 that is never rounded to it
inline void multiply(const Tensor& x, const Tensor& w, const Tensor& total) {
  namespace stable = torch::stable::detail;
  StableIValue stack[] = {stable::from(x.reference()), stable::from(w.reference()), stable::from(total.dtype()),
                          stable::from(total.reference())};
  check_torch(torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION));
  Tensor(stable::to<AtenTensorHandle>(stack[0]));  // `total` again, a reference that is ours
}

inline void multiply_slabs(const DequantMatmul& all, Device device, Stream stream) {
  const int64_t N = all.weight.grid.M, K = all.weight.grid.K;
  const int32_t dtype = all.x_type == Type::float16 ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
  const int64_t most = std::min(all.M, kMostRows), rows = slab_rows(most, N, K);
  const Sizes slab_sizes = {rows, K}, total_sizes = {most * rows};
  const Tensor slab = Tensor::empty(slab_sizes, dtype, device);
  const Tensor sums = Tensor::empty(total_sizes, aoti_torch_dtype_float32(), device);
  for (int64_t m = 0; m < all.M; m += kMostRows) {
    DequantMatmul p = all;
    p.M = std::min(all.M - m, kMostRows);
    p.x = static_cast<const uint16_t*>(all.x) + m * K;
    p.y = static_cast<uint16_t*>(all.y) + m * N;
    const Tensor x = Tensor::view(const_cast<void*>(p.x), {p.M, K}, {K, 1}, dtype, device);
    for (int64_t first = 0; first < N; first += rows) {
      const int64_t end = std::min(first + rows, N), n = end - first;
      void* w = const_cast<void*>(decode_slab(p, first, end, slab.data(), stream));
      const Tensor total = Tensor::view(sums.data(), {p.M, n}, {n, 1}, sums.dtype(), device);
      multiply(x, Tensor::view(w, {K, n}, {1, K}, dtype, device), total);
      finish_slab(p, first, end, static_cast<const float*>(sums.data()), stream);
    }
  }
}

}  // namespace cuda
}  // namespace quantlib
