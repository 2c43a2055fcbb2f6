// codes[i, j] = encode(x[i, j] / scale[i // br, j // bk]) of a rectangle, for quantize and quantize_dynamic
#pragma once
#include "../ops/quantize.h"
#include "loops.h"
#include "narrow.h"

namespace quantlib {
namespace QL_ISA {

void quantize(const Quantize&, ParallelFor);

// n elements of x, of whose blocks the first has `first`; blocks begin at multiples of kPair. r and zero_point: of each
// block.
using QuantizeBlocks = void (*)(const char* x, const float* r, const int32_t* zero_point, int64_t first, int64_t bk,
                                const Store& how, char* codes, int64_t n);
// Null where x, r and codes lie in memory as 32 bits an element.
QuantizeBlocks quantize_blocks(Type format, Type x_type, bool affine);

// Memory that is fetched while a rectangle of one row is encoded, so many bytes for each element
struct Fetched {
  const char* first = nullptr;
  int bytes = 0;
};

struct QuantizeRows {
  const Quantize& p;
  const Grid grid;
  int64_t ahead = 0;  // elements from those encoded to those to be fetched meanwhile; 0: none
  const Row format = row_of(p.format);
  const Store how = {true, streams(row_bytes(format, p.grid.M* p.grid.K))};
  const Row x_row = row_of(p.x_type);
  const Decode decode = decoder(p.x_type);
  const Encode encode = encoder(p.format, true, p.zero_point != nullptr);
  // Rows of one scale in FP32 lie as `encode` reads them, which is a fifth faster from memory with int8.
  const bool in_blocks = grid.bk < grid.K ? grid.bk % kPair == 0 : p.x_type != Type::float32;
  const QuantizeBlocks blocks = in_blocks ? quantize_blocks(p.format, p.x_type, p.zero_point != nullptr) : nullptr;

  explicit QuantizeRows(const Quantize& p) : p(p), grid(collapse(p.grid, row_of(p.format).per_byte)) {}

  void operator()(int64_t i0, int64_t i1, int64_t j0, int64_t j1, Fetched next = {}) const {
    Worker worker(*this, j0, next);
    walk(grid, i0, i1, j0, j1, worker);
  }

 private:
  struct Worker {
    const QuantizeRows& of;
    const int64_t j0;
    const Fetched next;
    alignas(64) float x[kChunk], r[kChunk];
    int32_t zero_point[kChunk];

    Worker(const QuantizeRows& of, int64_t j0, Fetched next) : of(of), j0(j0), next(next) {}

    void spread(int64_t I, int64_t j, int64_t n) {
      const int64_t row = I * of.grid.scale_cols();
      const float scale_max = float_of(of.format.scale_max);
      if (of.blocks) {
        const int64_t bk = of.grid.bk, J = j / bk, end = (j + n - 1) / bk + 1;
        const float* scale = of.p.scale + row;
        for (int64_t b = J; b < end; ++b) r[b - J] = reciprocal(effective_scale(scale[b], scale_max));
        for (int64_t b = J; of.p.zero_point && b < end; ++b)
          zero_point[b - J] = clamp_zero_point(of.p.zero_point[row + b], of.format);
        return;
      }
      QL_ISA::spread(of.p.scale + row, of.grid.bk, j, n, r,
                     [=](float s) { return reciprocal(effective_scale(s, scale_max)); });
      if (of.p.zero_point)
        QL_ISA::spread(of.p.zero_point + row, of.grid.bk, j, n, zero_point,
                       [f = of.format](int32_t z) { return clamp_zero_point(z, f); });
    }

    void row(int64_t i, int64_t j, int64_t n) {
      const char* in = static_cast<const char*>(of.p.x) + byte_offset(of.x_row, of.grid.K, i, j);
      Store how = of.how;
      if (next.first) how.next = next.first + (j - j0) * next.bytes, how.next_bytes = next.bytes;
      else if (of.ahead) how.next = in + of.ahead * of.x_row.bytes, how.next_bytes = of.x_row.bytes;
      char* codes = static_cast<char*>(of.p.codes) + byte_offset(of.format, of.grid.K, i, j);
      if (of.blocks) return of.blocks(in, r, zero_point, of.grid.bk - j % of.grid.bk, of.grid.bk, how, codes, n);
      if (of.decode) of.decode(in, false, x, n);
      of.encode(of.decode ? x : reinterpret_cast<const float*>(in), r, zero_point, how, codes, n);
    }
  };
};

}  // namespace QL_ISA
}  // namespace quantlib
