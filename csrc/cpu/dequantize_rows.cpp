// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#include "../ops/dequantize_rows.h"

#include "dequantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kAhead = 2;  // rows from the one that is decoded to the one whose codes are fetched meanwhile

struct Rows {
  const DequantizeRows& p;
  const Grid& grid = p.grid;
  const int64_t scale_cols = grid.scale_cols();
  DequantizeRow decode =
      DequantizeRow(p.format, p.y_type, p.zero_point != nullptr, grid.K, least(grid.bk, grid.K), p.R);
  const Decode widen = decoder(p.scale_type);  // null for float32
  const int64_t scale_bytes = row_of(p.scale_type).bytes, row = row_bytes(decode.format, grid.K);
  alignas(64) float scale[kChunk + 1];

  explicit Rows(const DequantizeRows& p) : p(p) {}

  const char* codes(int64_t i) const { return static_cast<const char*>(p.codes) + i * row; }

  // Always inlined: GCC drops calls of a function that does nothing but fetch.
  QL_MEMBER void fetch(int64_t r) const {
    const char* next = codes(p.index(r));
    for (int64_t at = 0; at < least(row, 1024); at += 64) __builtin_prefetch(next + at);
  }

  void operator()(int64_t r) {
    const int64_t i = p.index(r), bk = decode.bk;
    char* y = static_cast<char*>(p.y) + byte_offset(decode.y_row, grid.K, r, 0);
    for (int64_t j = 0; j < grid.K; j += kChunk) {
      const int64_t n = least(kChunk, grid.K - j), at = i / grid.br * scale_cols + j / bk;
      const float* s = static_cast<const float*>(p.scale) + at;
      if (widen) {
        widen(static_cast<const char*>(p.scale) + at * scale_bytes, false, scale, (j + n - 1) / bk - j / bk + 1);
        s = scale;
      }
      const int32_t* z = p.zero_point ? p.zero_point + at : nullptr;
      decode.spread(s, z, j, n);
      decode(codes(i) + byte_offset(decode.format, grid.K, 0, j), s, z, j, n, y + j * decode.y_row.bytes);
    }
  }
};

}  // namespace

void dequantize_rows(const DequantizeRows& p, ParallelFor run) {
  parallel(run, p.R, most(1, kGrain / p.grid.K), [&](int64_t begin, int64_t end) {
    Rows rows(p);
    for (int64_t r = begin; r < end; ++r) {
      if (r + kAhead < end) rows.fetch(r + kAhead);
      rows(r);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
