// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#include "../ops/dequantize_rows.h"

#include "dequantize.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of the codes that are fetched while those before them are decoded, about

// What belongs to a row of the table, one row behind the other
struct Part {
  const void* first = nullptr;
  int64_t bytes = 0;  // of a row
};

struct Lookup {
  const DequantizeRows& p;
  const Weight& table = p.table;
  const WeightRows weight = WeightRows(table);
  const int64_t K = table.grid.K;
  DequantizeRow decode = DequantizeRow(table.format, p.y_type, table.is_affine(), K, weight.bk, p.R);
  const int64_t row = row_bytes(decode.format, K);
  const int64_t ahead = most(2, least(16, kAhead / most(1, row)));  // rows
  const Part scales = find_scales(), zero_points = find_zero_points();
  alignas(64) float scale[kChunk + 1];
  int32_t zero_point[kChunk + 1];

  explicit Lookup(const DequantizeRows& p) : p(p) {}

  const char* codes(int64_t i) const { return static_cast<const char*>(table.codes) + i * row; }

  // Always inlined: GCC drops calls of a function that does nothing but fetch.
  QL_MEMBER void fetch(int64_t r) const {
    const int64_t i = p.index(r), I = weight.br == 1 ? i : i / weight.br;
    fetch({table.codes, row}, i), fetch(scales, I), fetch(zero_points, I);
  }

  void operator()(int64_t r) {
    const int64_t i = p.index(r), bk = weight.bk;
    char* y = static_cast<char*>(p.y) + byte_offset(decode.y_row, K, r, 0);
    for (int64_t j = 0; j < K; j += kChunk) {
      const int64_t n = least(kChunk, K - j), J = j / bk, blocks = (j + n - 1) / bk - J + 1;
      weight.row_scales(i, J, blocks, scale);
      if (table.is_affine()) weight.row_zero_points(i, J, blocks, zero_point);
      decode.spread(scale, zero_point, j, n);
      decode(codes(i) + byte_offset(decode.format, K, 0, j), scale, zero_point, j, n, y + j * decode.y_row.bytes);
    }
  }

 private:
  QL_MEMBER static void fetch(const Part& part, int64_t i) {
    const char* first = static_cast<const char*>(part.first) + i * part.bytes;
    for (int64_t at = 0; at < least(part.bytes, kAhead); at += 64) __builtin_prefetch(first + at);
  }

  Part find_scales() const {
    if (!table.narrow_scale) return {table.scale, weight.cols * 4};
    return {table.narrow_scale, weight.cols * (table.narrow_type == NarrowScale::e8m0 ? 1 : 2)};
  }
  Part find_zero_points() const {
    if (table.zero_codes) return {table.zero_codes, row_bytes(decode.format, weight.cols)};
    if (table.zero_point) return {table.zero_point, weight.cols * 4};
    return {};
  }
};

}  // namespace

void dequantize_rows(const DequantizeRows& p, ParallelFor run) {
  parallel(run, p.R, most(1, kGrain / p.table.grid.K), [&](int64_t begin, int64_t end) {
    Lookup lookup(p);
    const int64_t ahead = least(lookup.ahead, end - begin);
    for (int64_t r = begin; r < begin + ahead; ++r) lookup.fetch(r);
    for (int64_t r = begin; r < end; ++r) {
      if (r + ahead < end) lookup.fetch(r + ahead);
      lookup(r);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
