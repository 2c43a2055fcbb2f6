// Shared by the grouped products: their tasks, each of which calls the single product's kernel on one thread.
#pragma once
#include "../ops/groups.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kTasks = 256;     // about as many a call: more than threads, so that none waits long for the others
constexpr int64_t kLeastRows = 64;  // of a weight that a task is worth starting for

// Inside of a task a kernel is given this function in place of the threads of the pool.
static inline void on_this_thread(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                                  void* context) {
  body(begin, end, context);
}

// Calls body(e, t0, t1, piece) for `pieces` pieces of every expert e that has rows, t0 .. t1, in one parallel region. A
// thread takes the next one that nobody has: experts have different numbers of rows.
template <class Body>
static inline void each_task(ParallelFor run, const Groups& groups, int64_t pieces, int64_t work, const Body& body) {
  const int64_t tasks = groups.E * pieces;
  int64_t next = 0;
  parallel(run, tasks, most(1, 4 * kGrain / most(1, work)), [&](int64_t, int64_t) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t e = task / pieces, t0 = e ? groups.ends[e - 1] : 0, t1 = groups.ends[e];
      if (t0 < t1) body(e, t0, t1, task % pieces);
    }
  });
}

static inline int64_t busy_experts(const Groups& groups) {
  int64_t busy = 0;
  for (int64_t e = 0; e < groups.E; ++e) busy += groups.ends[e] > (e ? groups.ends[e - 1] : 0);
  return busy;
}

// Zeros for the rows of y, `bytes` each, that belong to no expert
static inline void clear_rest(const Groups& groups, void* y, int64_t bytes) {
  const int64_t end = groups.E ? groups.ends[groups.E - 1] : 0;
  __builtin_memset(static_cast<char*>(y) + end * bytes, 0, size_t((groups.T - end) * bytes));
}

// The rows n0 .. n1 of the weight of expert e; n0 begins a block of rows that share a scale.
static inline Weight part_of_expert(const Weight& first, int64_t e, int64_t n0, int64_t n1) {
  Weight w = first;
  const Grid& g = first.grid;
  const int64_t rows = (g.M + g.br - 1) / g.br, cols = g.K ? (g.K + g.bk - 1) / g.bk : 0;
  const int64_t blocks = (e * rows + n0 / g.br) * cols;
  w.grid.M = n1 - n0;
  w.codes = static_cast<const char*>(first.codes) + byte_offset(row_of(first.format), g.K, e * g.M + n0, 0);
  if (w.scale) w.scale += blocks;
  if (w.narrow_scale)
    w.narrow_scale = static_cast<const char*>(w.narrow_scale) + blocks * (w.narrow_type == NarrowScale::e8m0 ? 1 : 2);
  if (w.zero_point) w.zero_point += blocks;
  if (w.zero_codes) w.zero_codes += (e * rows + n0 / g.br) * row_bytes(row_of(first.format), cols);
  return w;
}

// Rows of a weight in a piece: a multiple of br where a weight has several blocks of rows
static inline int64_t rows_of_piece(const Grid& g, const Groups& groups) {
  const int64_t wanted = most(kLeastRows, round_up(g.M * busy_experts(groups) / kTasks, kLeastRows));
  return least(g.br < g.M ? round_up(wanted, g.br) : most(g.M, 1), most(g.M, 1));
}

// y[t0 .. t1, n] = epilogue(x[t0 .. t1] times w[e]) in pieces of the rows n of a weight: multiply(weight, epilogue, t0,
// t1, y) makes one of them, with y [t1 - t0, rows of the piece].
template <class Multiply>
static inline void multiply_groups(ParallelFor run, const Weight& weight, const Epilogue& epilogue,
                                   const Groups& groups, Type y_type, void* y, const Multiply& multiply) {
  const Grid& g = weight.grid;
  const int64_t N = g.M, step = rows_of_piece(g, groups), pieces = (N + step - 1) / step,
                bytes = row_of(y_type).bits / 8;
  const int64_t rows = groups.T / most(1, busy_experts(groups)) + 1;
  clear_rest(groups, y, N * bytes);
  each_task(run, groups, pieces, step * rows * g.K, [&](int64_t e, int64_t t0, int64_t t1, int64_t piece) {
    const int64_t n0 = piece * step, n1 = least(N, n0 + step), width = (n1 - n0) * bytes;
    const Weight part = part_of_expert(weight, e, n0, n1);
    const Epilogue own = {epilogue.bias ? epilogue.bias + e * N + n0 : nullptr, epilogue.activation};
    char* to = static_cast<char*>(y) + (t0 * N + n0) * bytes;
    if (pieces == 1 || t1 - t0 == 1) return multiply(part, own, t0, t1, to);
    const Scratch sums((t1 - t0) * width);
    multiply(part, own, t0, t1, sums.data());
    for (int64_t t = 0; t < t1 - t0; ++t)
      __builtin_memcpy(to + t * N * bytes, static_cast<const char*>(sums.data()) + t * width, size_t(width));
  });
}

// Row t of a matrix of K values
static inline const void* row_at(const void* x, Type type, int64_t K, int64_t t) {
  return static_cast<const char*>(x) + byte_offset(row_of(type), K, t, 0);
}

}  // namespace QL_ISA
}  // namespace quantlib
