// Reductions over blocks of x: each block by one thread, or a few large ones by all, in an order that no number of
// threads changes.
#pragma once
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kResident = 4096;  // elements of x that stay in the first-level cache
constexpr int64_t kFetched = 65536;  // elements that a second-level cache holds beside others
constexpr int64_t kBlocks = 1024;    // blocks handled together, at most

// Blocks so few and so large that threads have to share one.
static inline bool shared_blocks(const Grid& g) {
  return g.scale_rows() * g.scale_cols() < 64 && g.br * g.bk > 8 * kGrain;
}

// body(I, J0, J1) for every block, several together while what is read of a row stays in the first-level cache. Where
// `unit` codes share a byte, J0 is a multiple of it, and so is J0 * bk.
template <class Body>
static inline void parallel_blocks(ParallelFor run, const Grid& g, int64_t unit, const Body& body) {
  const int64_t cols = g.scale_cols();
  const int64_t fitting = g.br > 1 ? kChunk / g.bk : kResident / g.bk;  // many rows: long pieces of each
  const int64_t step = most(unit, least(kBlocks, fitting) / unit * unit), across = (cols + step - 1) / step;
  const int64_t elements = g.br * least(step * g.bk, g.K);
  parallel(run, g.scale_rows() * across, most(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t J = piece % across * step;
      body(piece / across, J, least(J + step, cols));
    }
  });
}

// Every block of rows.grid to one Rows::Partial, merge(Partial, Partial) of those of its parts:
//   row(i, j, n)                   that of columns j .. j + n of row i, all in one block
//   blocks(i0, i1, J0, J1, out)    out[J - J0] = that of block (I, J) within rows i0 .. i1, for J0 <= J < J1
//   finish(I, J0, J1, partial)     takes those of whole blocks
template <class Rows>
static inline void reduce_blocks(ParallelFor run, const Rows& rows) {
  using Partial = typename Rows::Partial;
  const Grid& g = rows.grid;
  if (!shared_blocks(g)) {
    parallel_blocks(run, g, 1, [&](int64_t I, int64_t J0, int64_t J1) {
      Partial whole[kBlocks];
      rows.blocks(I * g.br, least((I + 1) * g.br, g.M), J0, J1, whole);
      rows.finish(I, J0, J1, whole);
    });
    return;
  }
  constexpr int64_t parts = 64;
  Partial partial[parts][64] = {};
  const DefaultFloats guard;
  for (int64_t I = 0; I < g.scale_rows(); ++I) {
    const int64_t i0 = I * g.br, height = least(g.br, g.M - i0), cols = g.scale_cols();
    parallel(run, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        if (height > 1) {
          const int64_t from = i0 + height * part / parts, to = i0 + height * (part + 1) / parts;
          if (from < to) rows.blocks(from, to, 0, cols, partial[part]);
          continue;
        }
        for (int64_t J = 0; J < cols; ++J) {
          const int64_t j = J * g.bk, width = least(g.bk, g.K - j);
          const int64_t from = j + width * part / parts, to = j + width * (part + 1) / parts;
          partial[part][J] = rows.row(i0, from, to - from);
        }
      }
    });
    Partial whole[64] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t J = 0; J < cols; ++J) {
        whole[J] = merge(whole[J], partial[part][J]);
        partial[part][J] = {};
      }
    rows.finish(I, 0, cols, whole);
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
