// y[m, n] = epilogue(total[m, n - first] * scale[n / br]), total[m, j] = sum over k of x[m, k] * w[j, k],
// w[n - first, k] = decode(codes[n, k]) - zero_point[n / br, k / bk], for some rows n of the weight at a time
//
// This makes w, in x's 16-bit type, and y; between the two lies the vendor's product, see slab.h. Where a row has one
// scale the operands are exact and it multiplies the sums, apart from a power of two, see SplitScale; else they are
// times their scale, rounded to bfloat16, which has room for every such product.
#include "matmul.cuh"
#include "operand.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int64_t kLeast = 128;  // rows of x that the kernel for a few of them still takes

template <class F>
constexpr bool is_wide = F::bits == 16;  // codes that are x's own values

template <class X>
struct DecodeSlabArgs {
  const uint8_t* codes;       // [N, row_bytes], or tiles
  const float* scale;         // [ceil(N / br), groups]
  const int32_t* zero_point;  // the same shape, or null
  Unit<X>* slab;              // [end - first, K]
  int64_t first, end, K, words;
  Divisor br, bk, per_row;  // the last: words of a row, or of a row of tiles
  int64_t groups;
  bool scaled;
  uint32_t flip;            // see Operand
  int32_t lowest, highest;  // zero point
};

// A word of codes a thread: four of a row that are neighbours, or two times four.
template <class F, class X, bool TILED>
__global__ void __launch_bounds__(kThreads) decode_slab_kernel(const DecodeSlabArgs<X> a) {
  constexpr int bytes = is_wide<F> ? 8 : 4, halves = is_wide<F> ? 1 : 8 / F::bits, half_step = TILED ? 64 : 4;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.words) return;
  const int64_t above = a.per_row.divide(index), in_row = index - above * a.per_row.d;
  int64_t row = a.first + above, column = in_row * 4 * halves;
  if constexpr (TILED) {  // lane, one of its two rows, one of that row's four words: quantlib/backends/tiles.py
    const int in_tile = int(in_row % 256), lane = in_tile / 8;
    row = a.first + above * 16 + in_tile / 4 % 2 * 8 + lane / 4;
    column = in_row / 256 * (64 * halves) + in_tile % 4 * 16 + lane % 4 * 4;
  }
  const uint8_t* codes = a.codes + (a.first / (TILED ? 16 : 1) * a.per_row.d + index) * bytes;
  const auto word = Vector<uint32_t, bytes / 4>::load(reinterpret_cast<const uint32_t*>(codes));
  if (row >= a.end) return;
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    const int64_t k = column + h * half_step, block = a.br.divide(row) * a.groups + a.bk.divide(k);
    if (k >= a.K) return;
    const float scale = effective_scale<F>(a.scale[block]);
    const SplitScale<X> split(scale);
    Vector<Unit<X>, 4> w;
    if constexpr (is_wide<F>) {
      w = {word.word[0], word.word[1]};
    } else {
      const int32_t z = a.zero_point ? a.zero_point[block] : 0;
      const Operand<F, X> decode(uint32_t((z < a.lowest    ? a.lowest
                                           : z > a.highest ? a.highest
                                                           : z) -
                                          a.lowest),
                                 split.power);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        w.word[pair] = decode(word.word[0], pair, Columns<F, TILED>::selector(2 * h + pair), a.flip);
    }
    if constexpr (std::is_same_v<X, bfloat16>) {
      if (a.scaled) {
        const auto unscaled = w;
        w = Vector<Unit<X>, 4>::zero();
#pragma unroll
        for (int e = 0; e < 4; ++e)
          w.put(e, encode<X>(mul(decode_float<X>(unscaled[e]), is_wide<F> ? scale : split.rest), false));
      }
    }
    w.store_whole(a.slab + (row - a.first) * a.K + k);
  }
}

struct FinishSlabArgs {
  const float* total;  // [M, end - first]
  const float* scale;  // [ceil(N / br)], or null
  float scale_max;
  int64_t first, N, chunks;  // chunks of four columns of total, in all
  int width;                 // end - first
  Divisor br, per_row;
  Epilogue epilogue;
  uint16_t* y;             // [M, N]
  bool is_float16, split;  // scales, in decode_slab
  bool vector;
};

__global__ void __launch_bounds__(kThreads) finish_slab_kernel(const FinishSlabArgs a) {
  const int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (chunk >= a.chunks) return;
  const int64_t m = a.per_row.divide(chunk), j = (chunk - m * a.per_row.d) * 4;
  const int last = a.width - j < 4 ? int(a.width - j) : 4;
  const auto total = load<4>(reinterpret_cast<const uint32_t*>(a.total) + m * a.width + j, 0, last, a.vector);
  auto y = Vector<uint16_t, 4>::zero();
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e >= last) continue;
    const int64_t n = a.first + j + e;
    float sum = add(float_of(total[e]), 0.0f);  // no sum is -0
    if (a.scale) {
      const float scale = effective_scale(a.scale[a.br.divide(n)], a.scale_max);
      sum = mul(sum, a.split ? SplitScale<bfloat16>(scale).rest : scale);
    }
    if (a.epilogue.bias) sum = add(sum, a.epilogue.bias[n]);
    sum = activate(sum, a.epilogue.activation);
    y.put(e, a.is_float16 ? encode_float<float16>(sum, false) : encode_float<bfloat16>(sum, false));
  }
  store(a.y + m * a.N + a.first + j, y, 0, last, a.vector);
}

template <class F, class X, bool TILED>
void decode(const DequantMatmul& p, int64_t first, int64_t end, void* slab, Stream stream) {
  const Weight& w = p.weight;
  const Grid& g = w.grid;
  const bool is_signed = w.format != Type::uint8;
  constexpr int columns = is_wide<F> ? 4 : 32 / F::bits;
  const int64_t rows = TILED ? ceil_div(end - first, 16) : end - first;
  const int64_t per_row = TILED ? ceil_div(g.K, columns * 16) * 256 : g.K / columns;
  DecodeSlabArgs<X> a{static_cast<const uint8_t*>(w.codes),
                      w.scale,
                      w.zero_point,
                      static_cast<Unit<X>*>(slab),
                      first,
                      end,
                      g.K,
                      rows * per_row,
                      Divisor(g.br),
                      Divisor(g.bk),
                      Divisor(per_row),
                      g.scale_cols(),
                      g.scale_cols() > 1,
                      0,
                      0,
                      0};
  if constexpr (!is_wide<F>) a.flip = Operand<F, X>::flip(is_signed);
  if constexpr (!F::is_float) {
    a.lowest = is_signed ? F::affine_qmin : 0;
    a.highest = a.lowest + (1 << F::bits) - 1;
  }
  launch("dequant_matmul", decode_slab_kernel<F, X, TILED>, ceil_div(a.words, kThreads), kThreads, stream, a);
}

template <class X, bool TILED>
void visit_codes(const DequantMatmul& p, int64_t first, int64_t end, void* slab, Stream stream) {
  switch (p.weight.format) {
    case Type::int8:
    case Type::uint8:
      return decode<int8, X, TILED>(p, first, end, slab, stream);
    case Type::int4:
      return decode<int4, X, TILED>(p, first, end, slab, stream);
    case Type::float8_e4m3fn:
      return decode<float8_e4m3fn, X, TILED>(p, first, end, slab, stream);
    case Type::float8_e5m2:
      return decode<float8_e5m2, X, TILED>(p, first, end, slab, stream);
    case Type::float4_e2m1fn:
      return decode<float4_e2m1fn, X, TILED>(p, first, end, slab, stream);
    default:
      if constexpr (std::is_same_v<X, bfloat16> && !TILED)
        return decode<bfloat16, X, false>(p, first, end, slab, stream);
      unknown_type();
  }
}

}  // namespace

bool takes_slabs(const DequantMatmul& p) {
  const Grid& g = p.weight.grid;
  const Type f = p.weight.format;
  const bool byte = f >= Type::float8_e4m3fn, packed = f == Type::int4 || f == Type::float4_e2m1fn;
  const bool by_row = g.bk >= g.K, aligned = is_aligned(p.weight.codes, 8);
  return !p.batch_invariant && p.M > kLeast && p.x_type != Type::float32 && (byte || f == p.x_type) && aligned &&
         g.K > 0 && g.K % (packed && !p.tiled ? 8 : 4) == 0 &&
         (by_row || (p.x_type == Type::bfloat16 && g.bk % 4 == 0));
}

const void* decode_slab(const DequantMatmul& p, int64_t first, int64_t end, void* slab, Stream stream) {
  const Grid& g = p.weight.grid;
  if (p.weight.format == p.x_type && g.bk >= g.K) return static_cast<const uint16_t*>(p.weight.codes) + first * g.K;
  if (p.x_type == Type::float16)
    p.tiled ? visit_codes<float16, true>(p, first, end, slab, stream)
            : visit_codes<float16, false>(p, first, end, slab, stream);
  else
    p.tiled ? visit_codes<bfloat16, true>(p, first, end, slab, stream)
            : visit_codes<bfloat16, false>(p, first, end, slab, stream);
  return slab;
}

void finish_slab(const DequantMatmul& p, int64_t first, int64_t end, const float* total, Stream stream) {
  const Grid& g = p.weight.grid;
  const int64_t per_row = ceil_div(end - first, 4);
  const bool vector = (end - first) % 4 == 0 && g.M % 4 == 0 && first % 4 == 0;
  const FinishSlabArgs a{total,
                         g.bk >= g.K ? p.weight.scale : nullptr,
                         scale_max(p.weight.format),
                         first,
                         g.M,
                         p.M * per_row,
                         int(end - first),
                         Divisor(g.br),
                         Divisor(per_row),
                         p.epilogue,
                         static_cast<uint16_t*>(p.y),
                         p.x_type == Type::float16,
                         p.x_type == Type::bfloat16 && p.weight.format != p.x_type,
                         vector && is_aligned(total, 16) && is_aligned(p.y, 8)};
  launch("dequant_matmul", finish_slab_kernel, ceil_div(a.chunks, kThreads), kThreads, stream, a);
}

}  // namespace cuda
}  // namespace quantlib
