// Weights of every format and layout, a value at a time, and a product of matrices with them on the ordinary cores:
// what serves the calls that no matrix instruction fits.
#pragma once
#include "../activation.h"
#include "vector.cuh"

namespace quantlib {
namespace cuda {

// w[n, k] = (decode(codes[n, k]) - zero_point[n / br, k / bk]) * scale[n / br, k / bk]
struct Values {
  Weight weight;
  bool tiled;  // codes lie as quantlib/backends/tiles.py says
  int64_t columns;
  Divisor br, bk;

  explicit Values(const Weight& w, bool tiled = false)
      : weight(w), tiled(tiled), columns(w.grid.scale_cols()), br(w.grid.br), bk(w.grid.bk) {}

  QL_DEVICE float operator()(int64_t n, int64_t k) const {
    const int64_t block = br.divide(n) * columns + bk.divide(k);
    const float scale = weight.scale[block];
    const int32_t z = weight.zero_point ? weight.zero_point[block] : 0;
    switch (weight.format) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return Decoder<NAME, !NAME::is_float>(scale, z)(code<NAME>(n, k));
      QL_FLOATS(QL_CASE)
      QL_INTS(QL_CASE)
#undef QL_CASE
      default:
        return 0.0f;
    }
  }

 private:
  template <class F>
  QL_DEVICE int32_t code(int64_t n, int64_t k) const {
    constexpr int P = kPerUnit<F>;
    int64_t at = offset<F>(weight.grid.K, n, k);
    int place = int(k % P);  // of the code in its byte
    if (tiled) {
      const int row = int(n % 16), column = int(k % 64), lane = row % 8 * 4 + column / 4 % 4;
      at = (n / 16 * ((weight.grid.K - 1) / (64 * P) + 1) + k / (64 * P)) * 1024;
      at += lane * 32 + row / 8 * 16 + column / 16 * 4 + column % 4;
      place = int(k / 64 % P);
    }
    const Unit<F> unit = static_cast<const Unit<F>*>(weight.codes)[at];
    if constexpr (!is_whole<F>) return unpack<F>(unit, place);
    else if constexpr (F::is_signed) return int8_t(unit);
    else return unit;
  }
};

QL_DEVICE float value_at(const void* x, Type type, int64_t at) {
  if (type == Type::float32) return static_cast<const float*>(x)[at];
  const uint16_t code = static_cast<const uint16_t*>(x)[at];
  return type == Type::float16 ? decode_float<float16>(code) : decode_float<bfloat16>(code);
}

// y = encode(activation(fl(total + bias[n])))
QL_DEVICE void finish(void* y, Type type, int64_t at, float total, const Epilogue& e, int64_t n) {
  total = activate(e.bias ? add(total, e.bias[n]) : total, e.activation);
  if (type == Type::float32) static_cast<uint32_t*>(y)[at] = encode<float32>(total, false);
  else if (type == Type::float16) static_cast<uint16_t*>(y)[at] = uint16_t(encode<float16>(total, false));
  else static_cast<uint16_t*>(y)[at] = uint16_t(encode<bfloat16>(total, false));
}

constexpr int kSide = 64;   // rows and columns of the product that a thread block makes,
constexpr int kDepth = 16;  // and terms of a sum that it has in shared memory
constexpr int kCells = 4;   // rows and columns of a thread: 16 threads to a side

// left [I, L], w [J, L], or [L, J] where it is transposed -> out [I, J]
struct ProductArgs {
  int64_t I, J, L;
  const void* left;
  Type type;  // of left and out
  Values w;
  Epilogue epilogue;
  void* out;
  int64_t row_blocks;
};

// out[i, j] = epilogue(sum over l of left[i, l] * w[j, l]), l ascending in one FP32 accumulator: whatever the other
// rows. A thread block makes rows i0 .. i0 + kSide and columns j0 .. j0 + kSide.
template <bool TRANSPOSED>
QL_DEVICE void multiply_square(const ProductArgs& a, int64_t i0, int64_t j0) {
  __shared__ float left[kDepth][kSide + 1], right[kDepth][kSide + 1];  // one more: no two columns in one bank
  const int row = int(threadIdx.x) / 16, column = int(threadIdx.x) % 16;
  float sum[kCells][kCells] = {};
  for (int64_t l0 = 0; l0 < a.L; l0 += kDepth) {
#pragma unroll 1
    for (int e = int(threadIdx.x); e < kSide * kDepth; e += kThreads) {  // neighbours read neighbours in memory
      const int l = e % kDepth, i = e / kDepth, r = TRANSPOSED ? e / kSide : l, j = TRANSPOSED ? e % kSide : i;
      const bool has_left = i0 + i < a.I && l0 + l < a.L, has_right = j0 + j < a.J && l0 + r < a.L;
      left[l][i] = has_left ? value_at(a.left, a.type, (i0 + i) * a.L + l0 + l) : 0.0f;
      right[r][j] = !has_right ? 0.0f : TRANSPOSED ? a.w(l0 + r, j0 + j) : a.w(j0 + j, l0 + r);
    }
    __syncthreads();
#pragma unroll
    for (int l = 0; l < kDepth; ++l)
#pragma unroll
      for (int i = 0; i < kCells; ++i)
#pragma unroll
        for (int j = 0; j < kCells; ++j)
          sum[i][j] = __fmaf_rn(left[l][row + 16 * i], right[l][column + 16 * j], sum[i][j]);
    __syncthreads();
  }
  __shared__ float sums[kSide][kSide + 1];  // so that what follows a sum stands once in the code
#pragma unroll
  for (int i = 0; i < kCells; ++i)
#pragma unroll
    for (int j = 0; j < kCells; ++j) sums[row + 16 * i][column + 16 * j] = sum[i][j];
  __syncthreads();
#pragma unroll 1
  for (int e = int(threadIdx.x); e < kSide * kSide; e += kThreads) {
    const int64_t i = i0 + e / kSide, j = j0 + e % kSide;
    if (i < a.I && j < a.J) finish(a.out, a.type, i * a.J + j, sums[e / kSide][e % kSide], a.epilogue, j);
  }
}

template <bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads) product_kernel(const ProductArgs a) {
  multiply_square<TRANSPOSED>(a, blockIdx.x % a.row_blocks * kSide, blockIdx.x / a.row_blocks * kSide);
}

template <bool TRANSPOSED>
void product(const char* op, ProductArgs a, Stream stream) {
  a.row_blocks = ceil_div(a.I, kSide);
  launch(op, product_kernel<TRANSPOSED>, a.row_blocks * ceil_div(a.J, kSide), kThreads, stream, a);
}

}  // namespace cuda
}  // namespace quantlib
