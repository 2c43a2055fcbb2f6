// y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]
#include "../ops/dequantize.h"
#include "lanes.h"
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// ---- codes of eight bits, which meet their scale in a register -----------------------------------------------------

constexpr int64_t kPair = 2 * kLanes;  // elements: two registers of FP32, one of 16 bits

// y[0 .. kPair) = fl((codes - z) * s)
template <class F, class Y, bool AFFINE>
QL_FN void dequantize_pair(const char* codes, Floats s, Floats z, bool past_caches, char* y) {
  Floats t[2];
  for (int64_t h = 0; h < 2; ++h) {
    t[h] = Lanes<Floats>::of(widen<F::is_signed>(codes + h * kLanes));
    if constexpr (AFFINE) t[h] = sub(t[h], z);
    t[h] = mul(t[h], s);
  }
  if constexpr (Y::bits == 32) {
    put(y, canonical(t[0]), past_caches);
    put(y + sizeof(Floats), canonical(t[1]), past_caches);
  } else {
    put(y, encode_pair<Y>(t[0], t[1]), past_caches);
  }
}

// n elements, of which the first block has `first`
using Blocks = void (*)(const char* codes, const float* scale, const int32_t* zero_point, const Row& format,
                        int64_t first, int64_t bk, bool stream, char* y, int64_t n);

// Blocks begin at multiples of kPair.
template <class F, class Y, bool AFFINE>
void dequantize_blocks(const char* __restrict__ codes, const float* scale, const int32_t* zero_point, const Row& format,
                       int64_t first, int64_t bk, bool stream, char* __restrict__ y, int64_t n) {
  stream = stream && uintptr_t(y) % sizeof(Floats) == 0;
  for (int64_t j = 0, end = least(first, n); j < n; end = least(end + bk, n), ++scale, zero_point += AFFINE) {
    const Floats s = splat<Floats>(effective_scale<F>(*scale));
    const Floats z = AFFINE ? splat<Floats>(float(clamp_zero_point(*zero_point, format))) : Floats{};
    for (; j + kPair <= end; j += kPair) dequantize_pair<F, Y, AFFINE>(codes + j, s, z, stream, y + bytes_of<Y>(j));
    if (j == end) continue;
    char codes_rest[kPair] = {}, y_rest[kPair * 4];
    __builtin_memcpy(codes_rest, codes + j, size_t(end - j));
    dequantize_pair<F, Y, AFFINE>(codes_rest, s, z, false, y_rest);
    __builtin_memcpy(y + bytes_of<Y>(j), y_rest, size_t(bytes_of<Y>(end - j)));
    j = end;
  }
}

template <class F>
Blocks blocks_of(Type y_type, bool affine) {
  switch (y_type) {
    case Type::bfloat16:
      return affine ? dequantize_blocks<F, bfloat16, true> : dequantize_blocks<F, bfloat16, false>;
    case Type::float16:
      return affine ? dequantize_blocks<F, float16, true> : dequantize_blocks<F, float16, false>;
    default:
      return affine ? dequantize_blocks<F, float32, true> : dequantize_blocks<F, float32, false>;
  }
}

// Null where values lie in memory before they are scaled.
Blocks blocks_of(const Dequantize& p, const Grid& grid) {
  if (grid.bk % kPair && grid.bk < grid.K) return nullptr;
  return visit(p.format, [&](auto f) -> Blocks {
    using F = decltype(f);
    if constexpr (!F::is_float && is_whole<F>) return blocks_of<F>(p.y_type, p.zero_point);
    else return nullptr;
  });
}

// ---- any codes -----------------------------------------------------------------------------------------------------

struct Worker {
  const Dequantize& p;
  const Grid& grid;
  const Row format = row_of(p.format);
  const Row y_row = row_of(p.y_type);
  const Store how = {false, streams(grid.M * grid.K * y_row.bytes)};
  const Decode decode = decoder(p.format);
  const Encode encode = encoder(p.y_type, true, false);
  const Blocks blocks = blocks_of(p, grid);
  alignas(64) float value[kChunk], s_eff[kChunk], zero_point[kChunk];

  Worker(const Dequantize& p, const Grid& grid) : p(p), grid(grid) {}

  void spread(int64_t I, int64_t j, int64_t n) {
    if (blocks) return;
    const int64_t row = I * grid.scale_cols();
    const Row f = format;
    QL_ISA::spread(p.scale + row, grid.bk, j, n, s_eff,
                   [=](float s) { return effective_scale(s, float_of(f.scale_max)); });
    if (p.zero_point)
      QL_ISA::spread(p.zero_point + row, grid.bk, j, n, zero_point,
                     [=](int32_t z) { return float(clamp_zero_point(z, f)); });
  }

  void row(int64_t i, int64_t j, int64_t n) {
    const char* codes = static_cast<const char*>(p.codes) + byte_offset(format, grid.K, i, j);
    char* y = static_cast<char*>(p.y) + byte_offset(y_row, grid.K, i, j);
    if (blocks) {
      const int64_t at = i / grid.br * grid.scale_cols() + j / grid.bk, first = grid.bk - j % grid.bk;
      return blocks(codes, p.scale + at, p.zero_point ? p.zero_point + at : nullptr, format, first, grid.bk, how.stream,
                    y, n);
    }
    decode(codes, false, value, n);
    // Codes and zero points are small integers: their difference is exact in FP32.
    if (p.zero_point)
      for (int64_t k = 0; k < n; ++k) value[k] = sub(value[k], zero_point[k]);
    encode(value, s_eff, nullptr, how, y, n);
  }
};

}  // namespace

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
