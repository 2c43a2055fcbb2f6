// y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]
#include "dequantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// ---- codes that meet their scale in a register ---------------------------------------------------------------------

// y[0 .. kPair) = fl((codes - z) * s), codes and s being in units of unit<F> that cancel
template <class F, class Y, bool AFFINE>
QL_FN void dequantize_pair(const char* codes, Floats s, Floats z, bool past_caches, char* y) {
  Floats t[2];
  decode_pair<F>(codes, t);
  for (int64_t h = 0; h < 2; ++h) {
    if constexpr (AFFINE) t[h] = sub(t[h], z);
    t[h] = mul(t[h], s);
  }
  if constexpr (Y::bits == 32) {
    put(y, canonical(t[0]), past_caches);
    put(y + sizeof(Floats), canonical(t[1]), past_caches);
  } else {
#ifdef QL_NARROW
    if constexpr (Y::bias == 127) return put(y, round_pair(t[0], t[1]), past_caches);
#endif
    put(y, encode_pair<Y>(t[0], t[1]), past_caches);
  }
}

// Blocks begin at multiples of kPair.
template <class F, class Y, bool AFFINE>
void dequantize_blocks(const char* __restrict__ codes, const float* scale, const int32_t* zero_point, const Row& format,
                       int64_t first, int64_t bk, bool stream, char* __restrict__ y, int64_t n) {
  stream = stream && uintptr_t(y) % sizeof(Floats) == 0;
  for (int64_t j = 0, end = least(first, n); j < n; end = least(end + bk, n), ++scale, zero_point += AFFINE) {
    const float s_eff = mul(effective_scale<F>(*scale), float_of(unit<F>));  // exact: scaled_unit
    const Floats s = splat<Floats>(has_narrow && !(s_eff == s_eff) ? float_of(kRoundedNaN) : s_eff);
    const Floats z = AFFINE ? splat<Floats>(float(clamp_zero_point(*zero_point, format))) : Floats{};
#ifdef QL_NARROW
    if constexpr (F::bits == 4 && has_table<Y>) {  // sixteen values are all that there are
      alignas(64) char values[2 * sizeof(Floats)];
      dequantize_pair<F, Y, AFFINE>(reinterpret_cast<const char*>(kEveryNibble), s, z, false, values);
      j += look_up<Y>(table_of(values), codes + bytes_of<F>(j), end - j, stream, y + bytes_of<Y>(j));
    }
#endif
    for (; j + kPair <= end; j += kPair)
      dequantize_pair<F, Y, AFFINE>(codes + bytes_of<F>(j), s, z, stream, y + bytes_of<Y>(j));
    if (j == end) continue;
    char codes_rest[kPair] = {}, y_rest[kPair * 4];
    __builtin_memcpy(codes_rest, codes + bytes_of<F>(j), size_t(bytes_of<F>(end - j)));
    dequantize_pair<F, Y, AFFINE>(codes_rest, s, z, false, y_rest);
    __builtin_memcpy(y + bytes_of<Y>(j), y_rest, size_t(bytes_of<Y>(end - j)));
    j = end;
  }
}

// A power of two times a scale is exact: the scale is 2^-100 at least, and its largest leaves room for F's largest
// value.
template <class F>
constexpr bool scaled_unit() {
  if constexpr (F::is_float) return unit<F> <= F::max && unit<F> >= 127u << 23;
  else return unit<F> == 127u << 23;
}

template <class F>
DequantizeBlocks blocks_of(Type y_type, bool affine) {
  static_assert(scaled_unit<F>(), "the scale could overflow");
  if constexpr (F::is_float) affine = false;
  switch (y_type) {
    case Type::bfloat16:
      return affine ? dequantize_blocks<F, bfloat16, true> : dequantize_blocks<F, bfloat16, false>;
    case Type::float16:
      return affine ? dequantize_blocks<F, float16, true> : dequantize_blocks<F, float16, false>;
    default:
      return affine ? dequantize_blocks<F, float32, true> : dequantize_blocks<F, float32, false>;
  }
}

struct Worker {
  const Dequantize& p;
  const Grid& grid;
  DequantizeRow decode;

  Worker(const Dequantize& p, const Grid& grid)
      : p(p), grid(grid), decode(p.format, p.y_type, p.zero_point != nullptr, grid.K, grid.bk, grid.M) {}

  void spread(int64_t I, int64_t j, int64_t n) {
    const int64_t at = I * grid.scale_cols() + j / grid.bk;
    decode.spread(p.scale + at, p.zero_point ? p.zero_point + at : nullptr, j, n);
  }

  void row(int64_t i, int64_t j, int64_t n) {
    const int64_t at = i / grid.br * grid.scale_cols() + j / grid.bk;
    decode(static_cast<const char*>(p.codes) + byte_offset(decode.format, grid.K, i, j), p.scale + at,
           p.zero_point ? p.zero_point + at : nullptr, j, n,
           static_cast<char*>(p.y) + byte_offset(decode.y_row, grid.K, i, j));
  }
};

}  // namespace

DequantizeBlocks blocks_of(Type format, Type y_type, bool affine) {
  return visit(format, [&](auto f) -> DequantizeBlocks {
    using F = decltype(f);
    if constexpr (F::bits <= 8 && narrow_in_pairs<F>) return blocks_of<F>(y_type, affine);
    else return nullptr;
  });
}

void dequantize(const Dequantize& p, ParallelFor run) {
  const Grid grid = collapse(p.grid, row_of(p.format).per_byte);
  const bool flat = grid.M == 1;
  parallel_pieces(run, grid, flat ? 1 : 64, flat ? kGrain : kChunk,
                  [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
                    Worker worker(p, grid);
                    walk(grid, i0, i1, j0, j1, worker);
                  });
}

}  // namespace QL_ISA
}  // namespace quantlib
