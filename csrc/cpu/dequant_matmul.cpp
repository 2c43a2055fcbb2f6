// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = (codes - zero_point) * scale
//
// Every sum is made in one order, whatever the other rows are: lane l of a register takes each k with its place in a
// step, a block of kBlock columns at a time; the lanes of a block are added up by a tree, the blocks in order.
#include "../ops/dequant_matmul.h"
#include "../activation.h"
#include "matmul.h"
#include "pairs.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kSlab = 4;      // rows of the weight decoded together
constexpr int64_t kPanel = 32;    // rows of the weight whose sums are kept while x stays in the cache
constexpr int64_t kHeight = 264;  // rows of x that meet one slab: the more, the less is decoded again

// ---- elements -------------------------------------------------------------------------------------------------------

template <class E>
constexpr int64_t kWidth = 4 * kLanes / int64_t(sizeof(E));  // elements of a register
template <class E>
constexpr int64_t kBlock = 8192 / int64_t(sizeof(E));  // columns of a slab: the more, the fewer lanes are added up

QL_FN Floats multiply_add(const float* x, Floats w, Floats sum) { return fma(load<Floats>(x), w, sum); }

#ifdef __AVX512BF16__
// Of pairs of BF16. The instruction takes subnormals for zeros: what it is given has none, nor have its sums.
QL_FN Floats multiply_add(const uint16_t* x, Floats w, Floats sum) {
  return _mm512_dpbf16_ps(sum, load<__m512bh>(x), same_bits<__m512bh>(w));
}
#endif

// ---- registers ------------------------------------------------------------------------------------------------------

typedef float Quad __attribute__((vector_size(16)));

// (sum of the lanes of a, of b, of c, of d), each by the same tree
QL_FN Quad add_lanes(Floats a, Floats b, Floats c, Floats d) {
  using I = Ints<Floats>;
  I low, high, low_pairs, high_pairs;
  for (int l = 0; l < kLanes; ++l) {
    const int group = l & ~3, place = l & 3;
    low[l] = group + place / 2 + place % 2 * kLanes;
    high[l] = low[l] + 2;
    low_pairs[l] = group + place % 2 + place / 2 * kLanes;
    high_pairs[l] = low_pairs[l] + 2;
  }
  const Floats ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Floats cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  Floats sums = __builtin_shuffle(ab, cd, low_pairs) + __builtin_shuffle(ab, cd, high_pairs);
  for (int distance = kLanes / 2; distance >= 4; distance /= 2) {
    I other;
    for (int l = 0; l < kLanes; ++l) other[l] = l ^ distance;
    sums = sums + __builtin_shuffle(sums, other);
  }
  Quad out;
  __builtin_memcpy(&out, &sums, sizeof out);
  return out;
}

// Where scales are for sums: parts of the columns of a slab, and the scale of each row there
struct Parts {
  int64_t count = 0, end[kBlock<uint16_t> / 32];
  float scale[kSlab][kBlock<uint16_t> / 32];
};

// A piece of the weight, decoded: zeros behind its columns up to a whole register, and below its last row.
template <class E>
struct Slab {
  alignas(64) E w[kSlab][kBlock<E>];

  struct Part {
    const Slab& slab;
    QL_MEMBER Floats operator()(int n, int64_t k) const { return load<Floats>(slab.w[n] + k); }
  };
  QL_MEMBER Part part(int64_t) const { return {*this}; }
};

// sum[r, n] += sum over k of x[r, k] * w(n, k) for R rows
template <int R, class E, class Part>
QL_FN void multiply_part(const E* x, int64_t stride, const Part& w, int64_t begin, int64_t end,
                         Floats (&sum)[R][kSlab]) {
  for (int64_t k = begin; k < end; k += kWidth<E>) {
    Floats row[kSlab];
#pragma GCC unroll 4
    for (int n = 0; n < kSlab; ++n) row[n] = w(n, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kSlab; ++n) sum[r][n] = multiply_add(x + r * stride + k, row[n], sum[r][n]);
  }
}

// sums[r, n] += sum over k < count of x[r, k] * w[n, k] for R rows. Where scales change along a row, each lane is
// total = fma(sum of a part, its scale, total).
template <int R, class E, class Source>
QL_FN void multiply(const E* x, int64_t stride, const Source& w, int64_t count, const Parts& parts, float* sums) {
  Floats total[R][kSlab] = {};
  if (!parts.count) multiply_part<R>(x, stride, w.part(0), 0, count, total);
  for (int64_t p = 0, begin = 0; p < parts.count; begin = parts.end[p++]) {
    Floats sum[R][kSlab] = {};
    multiply_part<R>(x, stride, w.part(p), begin, parts.end[p], sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kSlab; ++n) total[r][n] = fma(sum[r][n], splat<Floats>(parts.scale[n][p]), total[r][n]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* to = sums + r * kPanel;
    store(to, load<Quad>(to) + add_lanes(total[r][0], total[r][1], total[r][2], total[r][3]));
  }
}

// The same for any number of rows, at most MOST at once
template <int MOST, class E, class Source>
QL_FN void multiply_rows(const E* x, int64_t stride, const Source& w, int64_t count, const Parts& parts, float* sums,
                         int64_t rows) {
  for (; rows >= MOST; rows -= MOST, x += MOST * stride, sums += MOST * kPanel)
    multiply<MOST>(x, stride, w, count, parts, sums);
  if constexpr (MOST > 1) {
    if (rows) multiply_rows<MOST - 1>(x, stride, w, count, parts, sums, rows);
  }
}

template <class E>
void multiply_slab(const E* x, int64_t stride, const Slab<E>& slab, int64_t count, const Parts& parts, float* sums,
                   int64_t rows) {
  if (parts.count) multiply_rows<3>(x, stride, slab, count, parts, sums, rows);
  else multiply_rows<kTile>(x, stride, slab, count, parts, sums, rows);
}

#ifdef __AVX512BF16__
// Codes that are decoded where they are multiplied: for rows of x that meet them all at once.
template <class F, bool AFFINE>
struct Direct {
  const char* codes[kSlab];
  const int32_t (*zero_point)[kSlab];  // of each part

  struct Part {
    const Direct& direct;
    decltype(pairs_of<F, AFFINE>(0)) pairs[kSlab];
    QL_MEMBER Floats operator()(int n, int64_t k) const {
      const char* codes = direct.codes[n] + bytes_of<F>(k);
      __builtin_prefetch(codes + kSlab * (direct.codes[1] - direct.codes[0]));  // the same columns of the next slab
      return pairs[n](codes);
    }
  };
  QL_MEMBER Part part(int64_t p) const {
    const int32_t* z = zero_point[p];
    return {
        *this,
        {pairs_of<F, AFFINE>(z[0]), pairs_of<F, AFFINE>(z[1]), pairs_of<F, AFFINE>(z[2]), pairs_of<F, AFFINE>(z[3])}};
  }
};

template <class F, bool AFFINE>
void multiply_codes(const uint16_t* x, int64_t stride, const char* const (&codes)[kSlab],
                    const int32_t (*zero_point)[kSlab], int64_t count, const Parts& parts, float* sums, int64_t rows) {
  const Direct<F, AFFINE> direct = {{codes[0], codes[1], codes[2], codes[3]}, zero_point};
  multiply_rows<kTile>(x, stride, direct, count, parts, sums, rows);
}

// out[k] = the value of codes[k] less z, for k < count
template <class F, bool AFFINE>
void decode_pairs(const char* codes, int32_t z, int64_t count, uint16_t* out) {
  const auto pairs = pairs_of<F, AFFINE>(z);
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) store(out + k, pairs(codes + bytes_of<F>(k)));
  if (k == count) return;
  char rest[32] = {};
  __builtin_memcpy(rest, codes + bytes_of<F>(k), size_t(bytes_of<F>(count - k)));
  const Floats last = pairs(rest);
  __builtin_memcpy(out + k, &last, size_t(count - k) * 2);
}

struct PairKernels {
  decltype(&multiply_codes<int8, false>) multiply;
  decltype(&decode_pairs<int8, false>) decode;
};

// What multiplies codes of a format whose values are pairs; null for others.
PairKernels pair_kernels(Type format, bool affine) {
  return visit(format, [&](auto f) -> PairKernels {
    using F = decltype(f);
    if constexpr (!in_pairs<F>) return {};
    else if constexpr (F::is_float) return {multiply_codes<F, false>, decode_pairs<F, false>};
    else if (affine) return {multiply_codes<F, true>, decode_pairs<F, true>};
    else return {multiply_codes<F, false>, decode_pairs<F, false>};
  });
}
#endif

// ---- the matmul -----------------------------------------------------------------------------------------------------

template <class E>
struct Product {
  const DequantMatmul& p;
  const Rows<E> x;
  const int64_t* rows;  // row r of x is row rows[r] of y, or m0 + r
  int64_t m0;
  const WeightRows weight = WeightRows(p.weight);
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  const Row y_row = row_of(p.x_type);
  const Encode encode = encoder(p.x_type, false, false);
  const bool scales_sums = sizeof(E) == 2, scales_parts = scales_sums && weight.cols > 1;

  Product(const DequantMatmul& p, Rows<E> x, const int64_t* rows, int64_t m0) : p(p), x(x), rows(rows), m0(m0) {}

  // Rows r0 .. r1, at most kHeight, and columns n0 .. n1 of y, at most kPanel
  void operator()(int64_t r0, int64_t r1, int64_t n0, int64_t n1) const {
    alignas(64) float sums[kHeight * kPanel];
    for (int64_t at = 0; at < (r1 - r0) * kPanel; ++at) sums[at] = 0.0f;
    Parts parts;
    Slab<E> slab;
    for (int64_t k = 0; k < K; k += kBlock<E>)
      for (int64_t n = n0; n < n1; n += kSlab) {
        const int64_t columns = least(kBlock<E>, K - k);
        const E* from = x.data + r0 * x.stride + k;
        float* to = sums + (n - n0);
        if (scales_parts) find_parts(n, k, columns, parts);
#ifdef __AVX512BF16__
        if constexpr (sizeof(E) == 2) {
          if (r1 - r0 <= kTile && columns % 32 == 0) {
            multiply_direct(from, n, k, columns, parts, to, r1 - r0);
            continue;
          }
        }
#endif
        decode(n, k, columns, slab);
        multiply_slab(from, x.stride, slab, round_up(columns, kWidth<E>), parts, to, r1 - r0);
      }
    for (int64_t r = r0; r < r1; ++r) finish(sums + (r - r0) * kPanel, rows ? rows[r] : m0 + r, n0, n1);
  }

 private:
  // The last row stands in for those below it: their sums are not used.
  int64_t row_at(int64_t n) const { return least(n, N - 1); }

  const char* codes_at(int64_t n, int64_t k) const {
    return static_cast<const char*>(weight.w.codes) + byte_offset(weight.format, K, n, k);
  }

  void find_parts(int64_t n0, int64_t k0, int64_t columns, Parts& parts) const {
    const int64_t J0 = k0 / weight.bk;
    parts.count = (k0 + columns - 1) / weight.bk - J0 + 1;
    for (int64_t p = 0; p < parts.count; ++p)
      parts.end[p] = round_up(least(columns, (J0 + p + 1) * weight.bk - k0), kWidth<E>);
    for (int64_t n = 0; n < kSlab; ++n)
      for (int64_t p = 0; p < parts.count; ++p) parts.scale[n][p] = weight.scale(row_at(n0 + n), J0 + p);
  }

  void decode(int64_t n0, int64_t k0, int64_t columns, Slab<E>& slab) const {
    for (int64_t n = 0; n < kSlab; ++n) {
      decode_row(row_at(n0 + n), k0, columns, slab.w[n]);
      for (int64_t k = columns; k % kWidth<E>; ++k) slab.w[n][k] = E(0);
    }
  }

  void decode_row(int64_t n, int64_t k0, int64_t columns, float* to) const { weight.row(n, k0, columns, to); }

#ifdef __AVX512BF16__
  const PairKernels pairs = pair_kernels(weight.w.format, weight.w.zero_point);

  void decode_row(int64_t n, int64_t k0, int64_t columns, uint16_t* to) const {
    weight.blocks(k0, columns, [&](int64_t begin, int64_t end, int64_t J) {
      pairs.decode(codes_at(n, k0 + begin), weight.zero_point(n, J), end - begin, to + begin);
    });
  }

  void multiply_direct(const E* from, int64_t n0, int64_t k0, int64_t columns, const Parts& parts, float* sums,
                       int64_t count) const {
    const char* codes[kSlab];
    int32_t zero_point[kBlock<uint16_t> / 32][kSlab];
    for (int64_t n = 0; n < kSlab; ++n) {
      codes[n] = codes_at(row_at(n0 + n), k0);
      for (int64_t p = 0; p < most(1, parts.count); ++p)
        zero_point[p][n] = weight.zero_point(row_at(n0 + n), k0 / weight.bk + p);
    }
    pairs.multiply(from, x.stride, codes, zero_point, columns, parts, sums, count);
  }
#endif

  // y[m, n0 .. n1) from the sums of a row
  void finish(float* sums, int64_t m, int64_t n0, int64_t n1) const {
    alignas(64) float total[kPanel] = {};
    for (int64_t n = n0; n < n1; ++n) {
      float sum = sums[n - n0];
      if (scales_sums && !scales_parts) sum = mul(sum, weight.scale(n, 0));
      sum = add(sum, 0.0f);  // a product that underflows may be -0, a sum from +0 never is
      total[n - n0] = p.epilogue.bias ? add(sum, p.epilogue.bias[n]) : sum;
    }
    for (int64_t n = 0; n < n1 - n0; n += kLanes)
      store(total + n, activate(load<Floats>(total + n), p.epilogue.activation));
    encode(total, nullptr, nullptr, {false, false}, static_cast<char*>(p.y) + byte_offset(y_row, N, m, n0), n1 - n0);
  }
};

template <class E>
void multiply_all(ParallelFor run, const Product<E>& product, int64_t rows) {
  const int64_t panel = rows <= 16 ? kSlab : kPanel;  // few rows: the weight is read as it lies
  const int64_t across = (product.N + panel - 1) / panel, down = (rows + kHeight - 1) / kHeight;
  const int64_t work = panel * least(rows, kHeight) * most(1, product.K);
  parallel(run, across * down, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t r = piece / across * kHeight, n = piece % across * panel;
      product(r, least(r + kHeight, rows), n, least(n + panel, product.N));
    }
  });
}

// Rows of y by products in FP32.
void multiply_floats(const DequantMatmul& p, ParallelFor run, const int64_t* rows, int64_t m0, int64_t count) {
  const int64_t K = p.weight.grid.K, stride = round_up(K, kLanes);
  if (p.x_type == Type::float32 && stride == K && !rows)
    return multiply_all(run, Product<float>(p, {static_cast<const float*>(p.x) + m0 * K, K}, rows, m0), count);
  const Scratch x(count * stride * 4);
  auto* data = static_cast<float*>(x.data());
  gather_rows(run, p.x, p.x_type, K, rows, m0, count, data, stride);
  multiply_all(run, Product<float>(p, {data, stride}, rows, m0), count);
}

#ifdef __AVX512BF16__
// Whether the codes become BF16 values, and scales are for sums.
bool takes_pairs(const DequantMatmul& p) {
  const Grid& g = p.weight.grid;
  const bool fits = pair_kernels(p.weight.format, false).multiply, whole = g.bk >= g.K || g.bk % 32 == 0;
  return p.x_type == Type::bfloat16 && fits && whole && g.K > 0;
}

// Whether a value of x is no zero and not within [2^-80, 2^80): a product or sum might underflow or overflow.
bool is_odd(const uint16_t* x, int64_t K) {
  uint32_t odd = 0;
  for (int64_t k = 0; k < K; ++k) {
    const uint16_t magnitude = x[k] & 0x7fff;
    odd |= magnitude != 0 && uint16_t(magnitude - ((127 - 80) << 7)) >= (160 << 7);
  }
  return odd;
}

// Rows of y by products of BF16 pairs; those of odd values once more, in FP32.
void multiply_pairs(const DequantMatmul& p, ParallelFor run, int64_t m0, int64_t count) {
  const int64_t K = p.weight.grid.K, stride = round_up(K, 32);
  const auto* x = static_cast<const uint16_t*>(p.x) + m0 * K;
  const Scratch list(count * 8), padded(stride == K ? 0 : count * stride * 2);
  auto* odd = static_cast<int64_t*>(list.data());
  int64_t odds = 0;
  for (int64_t r = 0; r < count; ++r)
    if (is_odd(x + r * K, K)) odd[odds++] = m0 + r;
  if (stride != K) {
    auto* to = static_cast<uint16_t*>(padded.data());
    for (int64_t r = 0; r < count; ++r) {
      __builtin_memcpy(to + r * stride, x + r * K, size_t(K) * 2);
      for (int64_t k = K; k < stride; ++k) to[r * stride + k] = 0;
    }
    x = to;
  }
  if (odds < count) multiply_all(run, Product<uint16_t>(p, {x, stride}, nullptr, m0), count);
  if (odds) multiply_floats(p, run, odd, m0, odds);
}
#endif

}  // namespace

void dequant_matmul(const DequantMatmul& p, ParallelFor run) {
  if (!p.weight.grid.M) return;
  constexpr int64_t bytes = int64_t(8) << 20;  // of x at a time, in FP32
  const int64_t chunk = round_up(bytes / (4 * most(1, p.weight.grid.K)) + 1, kHeight);
  for (int64_t m = 0; m < p.M; m += chunk) {
    const int64_t count = least(chunk, p.M - m);
#ifdef __AVX512BF16__
    if (takes_pairs(p)) {
      multiply_pairs(p, run, m, count);
      continue;
    }
#endif
    multiply_floats(p, run, nullptr, m, count);
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
