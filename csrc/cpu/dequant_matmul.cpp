// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = (codes - zero_point) * scale
#include "../ops/dequant_matmul.h"
#include "../activation.h"
#include "blocked.h"
#include "columns.h"
#include "dots.h"
#include "matmul_choice.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// Choose the kernel that multiplies `count` rows.
Plan choose(const DequantMatmul& p, int64_t count, bool floats) {
  const Grid& g = p.weight.grid;
  Plan plan = {};
  plan.parts = 1;
  const bool whole = g.K > 0 && (g.bk >= g.K || g.bk % 32 == 0);
#ifdef __AVX512BF16__
  const bool is_float = p.x_type == Type::float32;
  plan.codes = code_kernels(p.weight.format, p.weight.is_affine());
  const bool fast = !is_float || has_amx() || has_fast_pairs();
  plan.by_codes = !floats && fast && plan.codes.decode && whole && g.K >= (is_float ? kLeastSplit : 1);
  if (plan.by_codes) plan.parts = p.x_type == Type::bfloat16 ? 1 : 2;
#ifdef QL_AMX
  plan.tiles = plan.by_codes && has_amx();
#endif
#endif
#ifdef QL_VALUES
  plan.codes = code_kernels(p.weight.format, p.weight.is_affine());
  plan.by_codes = !floats && plan.codes.decode && whole;
  // Three panels of x, 256 columns of each, take three quarters of a first-level cache of 32 KiB.
  const int64_t few = plan.by_codes ? 8 : kFew, height = 240, width = 128, shallow = 256, deep = 256;
#else
  const int64_t few = plan.tiles ? 2 : kFew, height = 512, width = 512, deep = 1024;
  const int64_t shallow = plan.tiles ? 256 : deep;  // tiles multiply one block while the next is decoded
#endif
  const int64_t rows = count * plan.parts;
  const bool blocked = g.K > 0 && (plan.tiles && p.batch_invariant ? true : !p.batch_invariant && rows > few);
  plan.way = blocked ? Plan::blocks : Plan::dots;
#ifdef QL_QUADS
  // Of fewer rows than `first` a Zen 5 takes less time for dots of codes, of more than `last` for blocks.
  const bool is_byte = row_of(p.weight.format).per_byte == 1;
  const int64_t first = plan.by_codes ? 6 + is_byte + (g.bk >= g.K) : 1, last = 48;
  const bool columns = whole && has_quads(p.weight.format) && first <= rows && rows <= last;
  if (columns && !plan.tiles && !p.batch_invariant) plan.way = Plan::columns;
#endif
  plan.why = plan.way == Plan::blocks                     ? "rows enough for blocks that stay in the caches"
             : p.batch_invariant                          ? "batch_invariant: a row's sums have one order"
             : plan.by_codes || plan.way == Plan::columns ? "few rows: the weight is read as it lies"
                                                          : "few rows: the weight is decoded once for all";
  // Chunks of about the same size: threads have the same number of them.
  const int64_t highest = most(kLanes, height / plan.parts), chunks = most(1, (count + highest - 1) / highest);
  plan.MC = least(highest, round_up(most(1, (count + chunks - 1) / chunks), plan.tiles ? 2 * kLanes : kLanes));
  const int64_t depth = rows <= 2 * kLanes ? shallow : deep;
  plan.KC = g.bk < g.K && g.bk % kUnits == 0 ? most(1, depth / g.bk) * g.bk : depth;  // whole steps
  plan.NC = width;
  return plan;
}

template <class E>
void multiply(const DequantMatmul& p, ParallelFor run, const Plan& plan, const int64_t* list, int64_t m0, int64_t count,
              uint8_t* odd) {
  if (plan.way == Plan::blocks) return Blocked<E>(p, list, m0, count, plan)(run, odd);
#ifdef QL_QUADS
  if (plan.way == Plan::columns) return Columns<E>(p, list, m0, count, plan)(run, odd);
#endif
  Dots<E>(p, list, m0, count, plan)(run, odd);
}

// Rows m0 .. m0 + count of y; those of odd values once more, in FP32.
void multiply_rows(const DequantMatmul& p, ParallelFor run, int64_t m0, int64_t count) {
  const Plan plan = choose(p, count, false);
#ifdef QL_CODES
  if (plan.by_codes) {
    const Scratch flags(count), list(count * 8);
    auto* odd = static_cast<uint8_t*>(flags.data());
    multiply<Unit>(p, run, plan, nullptr, m0, count, odd);
    auto* rows = static_cast<int64_t*>(list.data());
    int64_t odds = 0;
    for (int64_t r = 0; r < count; ++r)
      if (odd[r]) rows[odds++] = m0 + r;
    if (odds) multiply<float>(p, run, choose(p, odds, true), rows, 0, odds, nullptr);
    return;
  }
#endif
  multiply<float>(p, run, plan, nullptr, m0, count, nullptr);
}

}  // namespace

void dequant_matmul_choice(const DequantMatmulChoice& c, ParallelFor) {
  const Weight weight = {c.grid, nullptr, c.format, nullptr, c.is_affine ? &kSomeZeroPoint : nullptr};
  const Plan plan = choose({c.M, nullptr, c.x_type, weight, {}, c.batch_invariant, nullptr}, c.M, false);
  *c.why = plan.why;
  constexpr const char* floats[] = {"dots: weight and x in FP32", "columns: weight and x in FP32",
                                    "blocks: weight and x in FP32"};
  constexpr const char* pairs[] = {"dots: codes and x in pairs of BF16", "columns: codes and x in pairs of BF16",
                                   "blocks: codes and x in pairs of BF16"};
  constexpr const char* values[] = {"dots: codes and x in FP32", nullptr, "blocks: codes and x in FP32"};
  *c.kernel = plan.tiles ? "blocks: tiles of AMX, codes and x in BF16"
                         : (!plan.by_codes      ? floats
                            : sizeof(Unit) == 2 ? pairs
                                                : values)[int(plan.way)];
}

void dequant_matmul(const DequantMatmul& p, ParallelFor run) {
  if (!p.weight.grid.M) return;
  const Plan plan = choose(p, p.M, false);
  const int64_t height = plan.way == Plan::blocks ? plan.MC : kHeight;
  const int64_t chunk = most(1, kPackedBytes / (4 * most(1, p.weight.grid.K)) / height) * height;
  for (int64_t m = 0; m < p.M; m += chunk) multiply_rows(p, run, m, least(chunk, p.M - m));
}

}  // namespace QL_ISA
}  // namespace quantlib
