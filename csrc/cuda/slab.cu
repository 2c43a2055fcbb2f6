// y[m, n] = epilogue(total[m, n] * scale[n / br]), total[m, n] = sum over k of x[m, k] * w[n, k],
// w[n, k] = decode(codes[n, k]) - zero_point[n / br, k / bk], for some rows n of the weight at a time; and the
// gradient, dx[m, k] = sum over n of dy[m, n] * w[n, k] * scale[n / br, k / bk], for some columns k.
//
// Where x has many rows, some rows of the weight at a time, or columns, become values of x's 16-bit type: a slab, small
// enough to stay in the cache until the vendor's product has read it. Then the sums become y. Where a row has one scale
// the operands of y are exact and it multiplies the sums, apart from a power of two, see SplitScale; else they are
// times their scale, rounded to bfloat16, which has room for every such product.
#include "slab.h"

#include "matmul.cuh"
#include "operand.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int64_t kLeast = 128;                  // rows of x that the kernel for a few of them still takes
constexpr int64_t kMostRows = int64_t(1) << 13;  // of x at a time
constexpr int64_t kSlab = int64_t(1) << 23;      // values of a slab, at least
constexpr int64_t kSums = int64_t(1) << 22;      // sums of a slab, at least: 256 tiles of 128 x 128 fill a device

template <class F>
constexpr bool is_wide = F::bits == 16;  // codes that are x's own values

struct DecodeSlab {
  Weight weight;
  bool tiled, scaled;          // whether values are times their scale
  Type type;                   // float16 or bfloat16
  int64_t n, n_end, k, k_end;  // rows and columns of the weight; n is a multiple of 16, k of 128, and 0 in tiles
  void* values;                // [n_end - n, k_end - k] of `type`
};

struct FinishSlab {
  int64_t M;
  const float* total;     // [M, end - first], the sums that become y[:, first .. end)
  const Weight* of_rows;  // whose scales, one a row, the sums lack; or null
  int64_t first, end, columns;
  Epilogue epilogue;
  Type type;
  void* y;  // [M, columns] of `type`
};

template <class X>
struct DecodeSlabArgs {
  const uint8_t* codes;       // [N, row_bytes], or tiles
  const float* scale;         // [ceil(N / br), groups]
  const int32_t* zero_point;  // the same shape, or null
  Unit<X>* slab;              // [n_end - n, k_end - k]
  int64_t n, n_end, k, k_end;
  int64_t words, row_words;  // of the slab, and of a row, or row of tiles, of the weight
  Divisor br, bk, per_row;   // the last: words of a row of the slab
  int64_t groups;
  bool scaled;
  uint32_t flip;            // see Operand
  int32_t lowest, highest;  // zero point
};

// A word of codes a thread: four of a row that are neighbours, or two times four.
template <class F, class X, bool TILED>
__global__ void __launch_bounds__(kThreads) decode_slab_kernel(const DecodeSlabArgs<X> a) {
  constexpr int bytes = is_wide<F> ? 8 : 4, halves = F::per_byte, half_step = TILED ? 64 : 4;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.words) return;
  const int64_t above = a.per_row.divide(index), in_row = index - above * a.per_row.d;
  int64_t row = a.n + above, column = a.k + in_row * 4 * halves;
  int64_t at = (row * a.row_words + a.k / (4 * halves) + in_row) * bytes;
  if constexpr (TILED) {  // lane, one of its two rows, one of that row's four words: quantlib/backends/tiles.py
    const int in_tile = int(in_row % 256), lane = in_tile / 8;
    row = a.n + above * 16 + in_tile / 4 % 2 * 8 + lane / 4;
    column = in_row / 256 * (64 * halves) + in_tile % 4 * 16 + lane % 4 * 4;
    at = ((a.n / 16 + above) * a.row_words + in_row) * bytes;
  }
  const auto word = Vector<uint32_t, bytes / 4>::load(reinterpret_cast<const uint32_t*>(a.codes + at));
  if (row >= a.n_end) return;
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    const int64_t k = column + h * half_step, block = a.br.divide(row) * a.groups + a.bk.divide(k);
    if (k >= a.k_end) return;
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
    w.store_whole(a.slab + (row - a.n) * (a.k_end - a.k) + (k - a.k));
  }
}

struct FinishSlabArgs {
  const float* total;  // [M, width]
  const float* scale;  // [ceil(N / br)], or null
  float scale_max;
  int64_t first, N, chunks;  // chunks of four columns of total, in all
  int width;                 // of total
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
    float sum = float_of(total[e]);
    if (a.scale) {
      const float scale = effective_scale(a.scale[a.br.divide(n)], a.scale_max);
      sum = mul(sum, a.split ? SplitScale<bfloat16>(scale).rest : scale);
    }
    sum = add(sum, 0.0f);  // no sum is -0
    if (a.epilogue.bias) sum = add(sum, a.epilogue.bias[n]);
    sum = activate(sum, a.epilogue.activation);
    y.put(e, a.is_float16 ? encode_float<float16>(sum, false) : encode_float<bfloat16>(sum, false));
  }
  store(a.y + m * a.N + a.first + j, y, 0, last, a.vector);
}

template <class F, class X, bool TILED>
void decode(const DecodeSlab& p, const Row& format, Stream stream) {
  const Weight& w = p.weight;
  const Grid& g = w.grid;
  constexpr int columns = 4 * F::per_byte;  // of a word
  const auto words_of = [](int64_t k) { return TILED ? ceil_div(k, columns * 16) * 256 : k / columns; };
  const int64_t rows = TILED ? ceil_div(p.n_end - p.n, 16) : p.n_end - p.n, per_row = words_of(p.k_end - p.k);
  DecodeSlabArgs<X> a{static_cast<const uint8_t*>(w.codes),
                      w.scale,
                      w.zero_point,
                      static_cast<Unit<X>*>(p.values),
                      p.n,
                      p.n_end,
                      p.k,
                      p.k_end,
                      rows * per_row,
                      words_of(g.K),
                      Divisor(g.br),
                      Divisor(g.bk),
                      Divisor(per_row),
                      g.scale_cols(),
                      p.scaled,
                      0,
                      format.qmin,
                      format.qmax};
  if constexpr (!is_wide<F>) a.flip = Operand<F, X>::flip(format.is_signed);
  launch("decode_slab", decode_slab_kernel<F, X, TILED>, ceil_div(a.words, kThreads), kThreads, stream, a);
}

template <class X>
void decode(const DecodeSlab& p, Stream stream) {
  if constexpr (std::is_same_v<X, bfloat16>)
    if (p.weight.format == X::type) return decode<X, X, false>(p, row<X>(), stream);
  const bool found = visit_operand<X>(p.weight.format, [&](auto f, const Row& format) {
    using F = decltype(f);
    p.tiled ? decode<F, X, true>(p, format, stream) : decode<F, X, false>(p, format, stream);
  });
  if (!found) unknown_type();
}

// True if words of codes are whole, each under one scale, and values of `type` hold what they become.
bool holds(const Weight& w, Type type, bool tiled, bool scaled) {
  const Type f = w.format;
  return type != Type::float32 && (f == type || is_operand(f, type)) && is_aligned(w.codes, 8) && w.grid.K > 0 &&
         w.grid.K % (tiled ? 4 : 4 * row_of(f).per_byte) == 0 && (w.grid.bk >= w.grid.K || w.grid.bk % 4 == 0) &&
         (!scaled || type == Type::bfloat16);
}

// Return the values: the weight itself where it holds them.
const void* decode_slab(const DecodeSlab& p, Stream stream) {
  if (p.weight.format == p.type && !p.scaled)
    return static_cast<const uint16_t*>(p.weight.codes) + p.n * p.weight.grid.K;
  p.type == Type::float16 ? decode<float16>(p, stream) : decode<bfloat16>(p, stream);
  return p.values;
}

void finish_slab(const FinishSlab& p, Stream stream) {
  const int64_t width = p.end - p.first, per_row = ceil_div(width, 4);
  const bool vector = width % 4 == 0 && p.columns % 4 == 0 && p.first % 4 == 0;
  const Weight* w = p.of_rows;
  const FinishSlabArgs a{p.total,
                         w ? w->scale : nullptr,
                         w ? scale_max(w->format) : 0.0f,
                         p.first,
                         p.columns,
                         p.M * per_row,
                         int(width),
                         Divisor(w ? w->grid.br : 1),
                         Divisor(per_row),
                         p.epilogue,
                         static_cast<uint16_t*>(p.y),
                         p.type == Type::float16,
                         p.type == Type::bfloat16 && w && w->format != p.type,
                         vector && is_aligned(p.total, 16) && is_aligned(p.y, 8)};
  launch("finish_slab", finish_slab_kernel, ceil_div(a.chunks, kThreads), kThreads, stream, a);
}

// Rows or columns of the weight at a time, of J: a multiple of what tiles and blocks of the vendor's product hold. As
// many as the cache holds, or more where their product would not fill a device twice over.
int64_t slab_rows(int64_t M, int64_t J, int64_t L) {
  const int64_t held = kSlab / L, filled = kSums / M;
  const int64_t rows = (held > filled ? held : filled) / 128 * 128, some = rows > 128 ? rows : 128;
  return some < J ? some : J;
}

// left [M, L], x or dy, times a weight of J rows or columns in slabs:
//   decode(j, end, values) -> where w[j .. end) is, of these strides as [L, end - j]
//   finish(m, M, j, end, sums)   takes the sums of rows m .. m + M of left with it
template <class Decode, class Finish>
void in_slabs(int64_t M, int64_t J, int64_t L, const void* left, Type type, Stream stream, Decode decode,
              Finish finish) {
  const int64_t most = M < kMostRows ? M : kMostRows, width = slab_rows(most, J, L);
  void* values = stream.torch->allocate(width * L * 2);
  auto* sums = static_cast<float*>(stream.torch->allocate(most * width * 4));
  for (int64_t m = 0; m < M; m += kMostRows) {
    const int64_t rows = M - m < kMostRows ? M - m : kMostRows;
    const Matrix x{static_cast<const uint16_t*>(left) + m * L, rows, L, {L, 1}};
    for (int64_t j = 0; j < J; j += width) {
      const int64_t end = j + width < J ? j + width : J;
      stream.torch->multiply(x, decode(j, end, values), type, sums);
      finish(m, rows, j, end, sums);
    }
  }
}

}  // namespace

bool takes_slabs(const DequantMatmul& p) {
  const bool scaled = p.weight.grid.bk < p.weight.grid.K;
  return p.M > kLeast && !p.batch_invariant && holds(p.weight, p.x_type, p.tiled, scaled);
}

bool takes_slabs(const DequantMatmulBackward& p) {
  return p.M > kLeast && p.weight.grid.M > 0 && holds(p.weight, p.dy_type, false, true);
}

void multiply_slabs(const DequantMatmul& p, Stream stream) {
  const Weight& weight = p.weight;
  const int64_t N = weight.grid.M, K = weight.grid.K;
  const bool scaled = weight.grid.bk < K;
  in_slabs(
      p.M, N, K, p.x, p.x_type, stream,
      [&](int64_t n, int64_t end, void* values) {
        const void* w = decode_slab({weight, p.tiled, scaled, p.x_type, n, end, 0, K, values}, stream);
        return Matrix{w, K, end - n, {1, K}};
      },
      [&](int64_t m, int64_t M, int64_t n, int64_t end, const float* sums) {
        auto* y = static_cast<uint16_t*>(p.y) + m * N;
        finish_slab({M, sums, scaled ? nullptr : &weight, n, end, N, p.epilogue, p.x_type, y}, stream);
      });
}

void multiply_slabs(const DequantMatmulBackward& p, Stream stream) {
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  in_slabs(
      p.M, K, N, p.dy, p.dy_type, stream,
      [&](int64_t k, int64_t end, void* values) {
        const void* w = decode_slab({p.weight, false, true, p.dy_type, 0, N, k, end, values}, stream);
        return Matrix{w, N, end - k, {end - k, 1}};
      },
      [&](int64_t m, int64_t M, int64_t k, int64_t end, const float* sums) {
        auto* dx = static_cast<uint16_t*>(p.dx) + m * K;
        finish_slab({M, sums, nullptr, k, end, K, {nullptr, Activation::none}, p.dy_type, dx}, stream);
      });
}

}  // namespace cuda
}  // namespace quantlib
