// sums[n, m] = sum over k of w[n, k] * x[m, k] for many rows m of x, in blocks that stay in the caches
//
// Lanes lie along m, so that codes are decoded row by row in the order in which they lie, and each sum takes its k in
// ascending order. The sizes have the names of BLIS: NR rows of the weight by MR rows of x are in registers, KC columns
// of NC rows of the weight are decoded at once, and meet MC rows of x. All 32 bits are one unit: a float, or two BF16
// that are multiplied and added together.
#pragma once
#include "../activation.h"
#include "amx.h"
#include "packed.h"

namespace quantlib {
namespace QL_ISA {

// ---- micro-kernels --------------------------------------------------------------------------------------------------

// Steps that have one scale a row: sums = fma(sum of the steps, scale, sums). Other steps are added to sums.
struct Segment {
  int64_t begin, end;  // steps of the block
  const float* scale;  // of row n of the weight: scale[n * stride]; or null
  int64_t stride;
};

constexpr int64_t NR = 2 * kGroup;
constexpr int64_t kSquare = kGroup * kLanes;  // sums of kGroup rows of the weight with a panel of x

struct Panels {
  const float* w;    // [NR / kGroup, steps, kGroup, kUnits]
  const float* x;    // [panels, depth, kLanes]
  float* sums;       // [NR / kGroup, panels, kGroup, kLanes]
  int64_t w_stride;  // floats between groups of rows of w
  int64_t x_stride;  // floats between panels of x
  int64_t stride;    // floats between groups of sums
};

// NRV rows from r0 on of the group of w, MV panels of x
template <class E, int NRV, int MV>
QL_FN void multiply_registers(const Panels& t, int64_t r0, const Segment& segment, bool first, CodesAhead& ahead) {
  float* to = t.sums + r0 * kLanes;
  Floats sum[NRV][MV] = {};
  if (!segment.scale && !first) {
#pragma GCC unroll 16
    for (int r = 0; r < NRV; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) sum[r][v] = load<Floats>(to + v * kSquare + r * kLanes);
  }
  for (int64_t step = segment.begin; step < segment.end; ++step) {
    ahead.fetch();
    const float* w = t.w + step * kTileFloats + r0 * kUnits;
    const float* x = t.x + step * kUnits * kLanes;
    for (int64_t u = 0; u < kUnits; ++u, ++w, x += kLanes) {
      Floats at[MV];
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) at[v] = load<Floats>(x + v * t.x_stride);
#pragma GCC unroll 16
      for (int r = 0; r < NRV; ++r) {
        const Floats value = same_bits<Floats>(splat<Bits<Floats>>(load<uint32_t>(w + r * kUnits)));
#pragma GCC unroll 4
        for (int v = 0; v < MV; ++v) sum[r][v] = multiply_add<E>(at[v], value, sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < NRV; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) {
      float* out = to + v * kSquare + r * kLanes;
      Floats total = sum[r][v];
      if (segment.scale) {
        const Floats before = first ? Floats{} : load<Floats>(out);
        total = fma(total, splat<Floats>(segment.scale[(r0 + r) * segment.stride]), before);
      }
      store(out, total);
    }
}

#ifdef __AVX512F__
constexpr int kWide = 3, kTall = 8;  // 24 sums, 3 of x and one of w in 32 registers
#else
constexpr int kWide = 3, kTall = 4;  // 12, 3 and 1 of 16
#endif

// kGroup rows of w, MV panels of x
template <class E, int MV>
static void multiply_group(const Panels& t, const Segment& segment, bool first, CodesAhead& ahead) {
  constexpr int rows = MV == 1 ? 2 * kTall : kTall;
  for (int64_t r = 0; r < kGroup; r += rows) multiply_registers<E, rows, MV>(t, r, segment, first, ahead);
}

// NR rows of w, `panels` of x, by vectors
template <class E>
static void multiply_vectors(const Panels& t, int64_t panels, const Segment& segment, bool first, CodesAhead& ahead) {
  for (int64_t v = 0; v < panels;) {
    // One panel alone loads a value of the weight for every product: four are two and two, if those have sums enough
    // that none waits for the one before it.
    const bool evenly = panels - v == kWide + 1 && kTall * (kWide - 1) >= 16;
    const int64_t wide = evenly ? kWide - 1 : least(kWide, panels - v);
    for (int64_t g = 0; g < NR / kGroup; ++g) {
      Panels at = t;
      at.w += g * t.w_stride, at.x += v * t.x_stride, at.sums += g * t.stride + v * kSquare;
      Segment of = segment;
      if (of.scale) of.scale += g * kGroup * of.stride;
      constexpr decltype(&multiply_group<E, 1>) some[] = {multiply_group<E, 1>, multiply_group<E, 2>,
                                                          multiply_group<E, 3>};
      some[wide - 1](at, of, first, ahead);
    }
    v += wide;
  }
}

#ifdef QL_AMX
// ---- the same by AMX ------------------------------------------------------------------------------------------------

// Assembly, since a compiler does not know that the intrinsics of g++ 12 read memory.
#define QL_LOAD_TILE(TILE, FROM, STRIDE) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE ::"r"(FROM), "r"(int64_t(STRIDE)) : "memory")
#define QL_STORE_TILE(TILE, TO, STRIDE) \
  asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" ::"r"(TO), "r"(int64_t(STRIDE)) : "memory")
#define QL_ZERO_TILE(TILE) asm volatile("tilezero %tmm" #TILE)
#define QL_MULTIPLY_TILES(SUM, W, X) asm volatile("tdpbf16ps %tmm" #X ", %tmm" #W ", %tmm" #SUM)

// Two groups of w by MT panels of x, at most two: tiles 0 .. 3 are sums, 4 and 5 of w, 6 and 7 of x
template <int MT>
QL_FN void zero_tiles() {
  QL_ZERO_TILE(0);
  QL_ZERO_TILE(2);
  if constexpr (MT == 2) QL_ZERO_TILE(1);
  if constexpr (MT == 2) QL_ZERO_TILE(3);
}

template <int MT>
QL_FN void load_tiles(const float* top, const float* below) {
  QL_LOAD_TILE(0, top, 64);
  QL_LOAD_TILE(2, below, 64);
  if constexpr (MT == 2) QL_LOAD_TILE(1, top + kSquare, 64);
  if constexpr (MT == 2) QL_LOAD_TILE(3, below + kSquare, 64);
}

template <int MT>
QL_FN void store_tiles(float* top, float* below) {
  QL_STORE_TILE(0, top, 64);
  QL_STORE_TILE(2, below, 64);
  if constexpr (MT == 2) QL_STORE_TILE(1, top + kSquare, 64);
  if constexpr (MT == 2) QL_STORE_TILE(3, below + kSquare, 64);
}

template <int MT>
QL_FN void multiply_step(const Panels& t, int64_t step) {
  const float *w = t.w + step * kTileFloats, *x = t.x + step * kTileFloats;
  QL_LOAD_TILE(6, x, 64);
  QL_LOAD_TILE(4, w, 64);
  QL_MULTIPLY_TILES(0, 4, 6);
  QL_LOAD_TILE(5, w + t.w_stride, 64);
  QL_MULTIPLY_TILES(2, 5, 6);
  if constexpr (MT == 2) {
    QL_LOAD_TILE(7, x + t.x_stride, 64);
    QL_MULTIPLY_TILES(1, 4, 7);
    QL_MULTIPLY_TILES(3, 5, 7);
  }
}

// Sums of a part that tiles have stored. They are added while the tiles make the next: a vector that is loaded right
// behind the tile that it is in would wait for it.
struct StoredPart {
  float* sums;  // to which they are added
  int64_t stride;
  const float* scale;
  int64_t scale_stride;
  bool first;  // nothing is there
};

template <int MT>
class ScaledParts {
 public:
  // Add the tiles' products, times the scale of each row, to the sums of t.
  QL_MEMBER void take(const Panels& t, const float* scale, int64_t scale_stride, bool first) {
    add();
    store_tiles<MT>(part_, part_ + 2 * kSquare);
    stored_ = {t.sums, t.stride, scale, scale_stride, first};
  }
  // Adds what is still to be added.
  QL_MEMBER void add() {
    if (!stored_.sums) return;
    for (int64_t n = 0; n < 2; ++n)
      for (int64_t v = 0; v < MT; ++v) {
        const float* from = part_ + (2 * n + v) * kSquare;
        const float* scale = stored_.scale + n * kGroup * stored_.scale_stride;
        float* out = stored_.sums + n * stored_.stride + v * kSquare;
        for (int64_t r = 0; r < kGroup; ++r, from += kLanes, out += kLanes, scale += stored_.scale_stride) {
          const Floats before = stored_.first ? Floats{} : load<Floats>(out);
          store(out, fma(load<Floats>(from), splat<Floats>(*scale), before));
        }
      }
    stored_.sums = nullptr;
  }

 private:
  alignas(64) float part_[4 * kSquare];
  StoredPart stored_ = {};
};

template <int MT>
QL_FN void multiply_tiles(const Panels& t, const Segment& segment, bool first, ScaledParts<MT>& parts,
                          CodesAhead& ahead) {
  if (segment.scale || first) zero_tiles<MT>();
  else load_tiles<MT>(t.sums, t.sums + t.stride);
  for (int64_t step = segment.begin; step < segment.end; ++step) ahead.fetch(), multiply_step<MT>(t, step);
  if (segment.scale) parts.take(t, segment.scale, segment.stride, first);
  else store_tiles<MT>(t.sums, t.sums + t.stride);
}

// NR rows of w, `panels` of x, by tiles: all segments with two panels, then with the next
static inline void multiply_all_tiles(const Panels& t, int64_t panels, const Segment* segments, int64_t count,
                                      bool first, CodesAhead& ahead) {
  ScaledParts<2> pairs;
  Panels at = t;
  for (; panels >= 2; panels -= 2, at.x += 2 * at.x_stride, at.sums += 2 * kSquare)
    for (int64_t s = 0; s < count; ++s) multiply_tiles<2>(at, segments[s], first && s == 0, pairs, ahead);
  pairs.add();
  if (!panels) return;
  ScaledParts<1> rest;
  for (int64_t s = 0; s < count; ++s) multiply_tiles<1>(at, segments[s], first && s == 0, rest, ahead);
  rest.add();
}
#endif

// ---- x --------------------------------------------------------------------------------------------------------------

// MC rows of x at most, or each as `parts` rows of BF16 that add up to it: unit u of lane m of panel v is
// data[(v * depth + u) * kLanes + m]. Lane l of all panels is row l % `apart`, its part l / `apart`.
struct PackedRows {
  float* data;
  int64_t rows, parts, depth;  // depth: units of a row, whole steps
  int64_t apart = parts * rows <= kLanes ? rows : round_up(rows, kLanes);

  int64_t panels() const { return (apart * parts + kLanes - 1) / kLanes; }
  float* panel(int64_t v) const { return data + v * depth * kLanes; }
};

constexpr int64_t kPackColumns = 256;  // of x that are packed together

// Panel v of the rows from m0 on, in FP32
static inline void pack_panel(const Source& from, int64_t m0, const PackedRows& to, int64_t v) {
  alignas(64) float rows[kLanes][kPackColumns] = {};
  for (int64_t k = 0; k < from.K; k += kPackColumns) {
    const int64_t n = least(kPackColumns, from.K - k), whole = round_up(n, kUnits);
    for (int64_t l = 0; l < kLanes && v * kLanes + l < to.rows; ++l)
      from.floats(m0 + v * kLanes + l, k, n, whole, rows[l]);
    for (int64_t u = 0; u < whole; u += kLanes) {
      Floats square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = load<Floats>(rows[l] + u);
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store(to.panel(v) + (k + u + l) * kLanes, square[l]);
    }
  }
}

#ifdef QL_VALUES
// The same, `order` for each 32 columns; odd[r] says which rows are.
static inline void pack_values(const Source& from, int64_t m0, const PackedRows& to, int64_t v,
                               const uint16_t (&order)[32], uint8_t* odd) {
  int64_t place[32];
  for (int p = 0; p < 32; ++p) place[order[p]] = p;
  alignas(64) float rows[kLanes][kPackColumns] = {};
  for (int64_t k = 0; k < from.K; k += kPackColumns) {
    const int64_t n = least(kPackColumns, from.K - k), whole = round_up(n, 32);
    for (int64_t l = 0; l < kLanes && v * kLanes + l < to.rows; ++l) {
      const int64_t r = v * kLanes + l;
      from.floats(m0 + r, k, n, whole, rows[l]);
      const bool is = is_odd(reinterpret_cast<const uint32_t*>(rows[l]), n);
      odd[r] = uint8_t(k ? odd[r] | is : is);
    }
    for (int64_t u = 0; u < whole; u += kLanes) {
      Floats square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = load<Floats>(rows[l] + u);
      transpose(square);
      float* panel = to.panel(v) + (k + u / 32 * 32) * kLanes;
      for (int l = 0; l < kLanes; ++l) store(panel + place[u % 32 + l] * kLanes, square[l]);
    }
  }
}
#endif

#ifdef __AVX512BF16__
// Panel v of the rows from m0 on in BF16, `order` for each 32 columns; odd[r] says which rows are.
static inline void pack_pairs(const Source& from, int64_t m0, const PackedRows& to, int64_t v,
                              const uint16_t (&order)[32], uint8_t* odd) {
  const __m512i places = load_words(order);
  const bool direct = from.type == Type::bfloat16;
  alignas(64) float rows[kLanes][kPackColumns] = {};
  for (int64_t k = 0; k < from.K; k += kPackColumns) {
    const int64_t n = least(kPackColumns, from.K - k), whole = round_up(n, 32);
    for (int64_t l = 0; l < kLanes && v * kLanes + l < to.apart * to.parts; ++l) {
      const int64_t r = (v * kLanes + l) % to.apart;
      if (r >= to.rows) continue;
      bool is = false;
      if (direct) {
        auto* words = reinterpret_cast<uint16_t*>(rows[l]);
        __builtin_memcpy(words, from.at(m0 + r, k), size_t(n) * 2);
        for (int64_t j = n; j < whole; ++j) words[j] = 0;
        is = is_odd(words, n);
      } else {
        from.floats(m0 + r, k, n, whole, rows[l]);
        is = is_odd(reinterpret_cast<const uint32_t*>(rows[l]), n);
      }
      if (v * kLanes + l < to.apart) odd[r] = uint8_t(k ? odd[r] | is : is);
    }
    for (int64_t u = 0; u < whole / 2; u += kLanes) {
      Floats square[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int part = v * kLanes + l >= to.apart;
        const __m512i words = direct ? load<__m512i>(rows[l] + u) : part_of(rows[l] + 2 * u, part);
        square[l] = same_bits<Floats>(_mm512_maskz_permutexvar_epi16(0xffffffff, places, words));
      }
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store(to.panel(v) + (k / 2 + u + l) * kLanes, square[l]);
    }
  }
}
#endif

// ---- the product ----------------------------------------------------------------------------------------------------

constexpr int64_t kPackedBytes = int64_t(24) << 20;  // of x, at most

// Rows m0 .. m0 + count of y, or those of a list
template <class E>
class Blocked {
 public:
  Blocked(const DequantMatmul& p, const int64_t* list, int64_t m0, int64_t count, const Plan& plan)
      : p_(p), plan_(plan), x_{p.x, p.x_type, p.weight.grid.K, list}, m0_(m0), count_(count), packed_(packed_bytes()) {}

  // odd[r] of each row: whether it is to be multiplied in FP32 instead
  void operator()(ParallelFor run, uint8_t* odd) const {
    const int64_t panels = chunk(0).panels();  // of a chunk, at most
    parallel(run, chunks() * panels, most(1, kGrain / most(1, x_.K * kLanes)), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t c = piece / panels, v = piece % panels;
        const PackedRows to = chunk(c);
        if (v >= to.panels()) continue;
#ifdef __AVX512BF16__
        if constexpr (scales_sums<E>) pack_pairs(x_, m0_ + c * MC, to, v, plan_.codes.order, odd + c * MC);
        else
#elif defined(QL_VALUES)
        if constexpr (scales_sums<E>) pack_values(x_, m0_ + c * MC, to, v, plan_.codes.order, odd + c * MC);
        else
#endif
          pack_panel(x_, m0_ + c * MC, to, v);
      }
    });
    const int64_t across = (N_ + NR - 1) / NR, work = NR * least(MC, count_) * most(1, x_.K);
    parallel(run, chunks() * across, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end;) {
        const int64_t c = piece / across, stop = least(end, (c + 1) * across);
        rows(c, (piece - c * across) * NR, least(N_, (stop - c * across) * NR));
        piece = stop;
      }
    });
  }

 private:
  const DequantMatmul& p_;
  const Plan& plan_;
  const Source x_;
  const int64_t m0_, count_;
  const WeightRows weight_ = WeightRows(p_.weight);
  const int64_t N_ = p_.weight.grid.M, depth_ = round_up(x_.K, kWhole<E>) / kStepColumns<E> * kUnits;
  const int64_t MC = plan_.MC;
  const Scratch packed_;
  const Row y_row_ = row_of(p_.x_type);
  const Encode encode_ = encoder(p_.x_type, false, false);

  int64_t chunks() const { return (count_ + plan_.MC - 1) / plan_.MC; }
  int64_t panel_floats(int64_t rows) const { return plan_.parts * round_up(rows, kLanes) * depth_; }
  int64_t packed_bytes() const { return chunks() * panel_floats(plan_.MC) * 4; }
  PackedRows chunk(int64_t c) const {
    auto* data = static_cast<float*>(packed_.data()) + c * panel_floats(MC);
    return {data, least(MC, count_ - c * MC), plan_.parts, depth_};
  }

  // Columns n0 .. n1 of the rows of chunk c
  void rows(int64_t c, int64_t n0, int64_t n1) const {
    const PackedRows x = chunk(c);
#ifdef QL_AMX
    if constexpr (scales_sums<E>) {
      if (plan_.tiles) {
        const Tiles tiles;
        return x.panels() == 1   ? few_rows<1>(x, c, n0, n1)
               : x.panels() == 2 ? few_rows<2>(x, c, n0, n1)
                                 : many_rows(x, c, n0, n1);
      }
    }
#endif
    many_rows(x, c, n0, n1);
  }

  void many_rows(const PackedRows& x, int64_t c, int64_t n0, int64_t n1) const {
    const int64_t NC = least(plan_.NC, round_up(n1 - n0, NR)), KC = least(plan_.KC, round_up(x_.K, kWhole<E>));
    const int64_t steps = round_up(KC, kStepColumns<E>) / kStepColumns<E>;
    const Scratch w(NR * steps * kUnits * 4), sums((NC / kGroup * x.panels() * kSquare + kLanes) * 4);
    const Scratch finished((kLanes + 2) * NC * 4), scales(NR * (KC / weight_.bk + 1) * 4);
    const Scratch segments((KC / weight_.bk + 1) * int64_t(sizeof(Segment)));
    Panels t = {};
    t.w = static_cast<float*>(w.data()), t.w_stride = steps * kTileFloats, t.x_stride = depth_ * kLanes;
    t.stride = x.panels() * kSquare;
    for (int64_t n = n0; n < n1; n += NC) {
      const int64_t end = least(n1, n + NC);
      for (int64_t k = 0; k < x_.K; k += KC) {
        const int64_t k_end = least(x_.K, k + KC);
        t.x = x.data + k / kStepColumns<E> * kUnits * kLanes;
        for (int64_t j = n; j < end; j += NR) {
          t.sums = static_cast<float*>(sums.data()) + (j - n) / kGroup * t.stride;
          // The block after this one has the next rows, or the next columns of the first.
          const bool more = j + NR < end, wider = k_end < x_.K;
          const int64_t row = more ? j + NR : wider ? n : j + NR, column = more ? k : wider ? k_end : 0;
          decode(j, k, k_end, static_cast<float*>(w.data()), t.w_stride);
          multiply(t, j, x.panels(), k, k_end, static_cast<float*>(scales.data()),
                   static_cast<Segment*>(segments.data()), ahead(row, column, KC, x.panels(), n1));
        }
      }
      t.sums = static_cast<float*>(sums.data());
      finish(t, x, c, n, end, static_cast<float*>(finished.data()));
    }
  }

#ifdef QL_AMX
  // A block whose weight is decoded
  struct Decoded {
    Panels t;
    const float* scales;  // of its first part, or null: that of row n in part j is scales[n * columns of scales + j]
    int64_t steps, part;  // in a part
    int64_t n;
    bool first, last;  // of its rows
  };

  // Its steps from `begin` to `end`
  template <int MT>
  void multiply_steps(const Decoded& block, int64_t begin, int64_t end, ScaledParts<MT>& parts) const {
    for (int64_t s = begin; s < end; ++s) {
      const bool is_last = s + 1 == block.steps;
      const bool begins = block.scales ? s % block.part == 0 : block.first && s == 0;
      const bool ends = block.scales ? is_last || (s + 1) % block.part == 0 : block.last && is_last;
      if (begins) zero_tiles<MT>();
      multiply_step<MT>(block.t, s);
      if (!ends) continue;
      if (!block.scales) store_tiles<MT>(block.t.sums, block.t.sums + block.t.stride);
      else parts.take(block.t, block.scales + s / block.part, weight_.cols, block.first && s < block.part);
    }
  }

  // The same where x has MT panels, one or two: tiles multiply one block while vectors decode the next.
  template <int MT>
  void few_rows(const PackedRows& x, int64_t c, int64_t n0, int64_t n1) const {
    const int64_t KC = least(plan_.KC, round_up(x_.K, 32)), whole = round_up(KC, 32) / 32 * kTileFloats;
    const int64_t scales_of_rows = weight_.cols > 1 ? NR * weight_.cols : 0;
    const Scratch w(2 * 2 * whole * 4), sums((2 * MT * kSquare + kLanes) * 4), finished((kLanes + 2) * NR * 4);
    const Scratch scales(2 * scales_of_rows * 4);
    ScaledParts<MT> parts;
    Decoded before = {};
    int scales_turn = 0;
    for (int64_t n = n0, k = 0, turn = 0;; turn ^= 1) {
      const bool more = n < n1;
      Decoded block = {};
      if (more) {
        const int64_t k_end = least(x_.K, k + KC);
        block.steps = round_up(k_end - k, 32) / 32, block.part = weight_.bk / 32, block.n = n;
        block.first = k == 0, block.last = k_end == x_.K;
        block.t.w = static_cast<float*>(w.data()) + turn * 2 * whole, block.t.w_stride = whole;
        block.t.x = x.data + k / 32 * kTileFloats, block.t.x_stride = depth_ * kLanes;
        block.t.sums = static_cast<float*>(sums.data()), block.t.stride = MT * kSquare;
        if (scales_of_rows) {
          if (block.first) scales_turn ^= 1;
          float* of_rows = static_cast<float*>(scales.data()) + scales_turn * scales_of_rows;
          if (block.first) find_scales(n, 0, x_.K, of_rows);
          block.scales = of_rows + k / weight_.bk;
        }
        // The next columns, or the first of the rows that come next.
        const int64_t from = byte_offset(weight_.format, x_.K, n, k);
        const int64_t ahead = byte_offset(weight_.format, x_.K, block.last ? n + NR : n, block.last ? 0 : k_end) - from;
        for (int64_t r = 0; r < NR; ++r) {
          auto* to = static_cast<float*>(w.data()) + (turn * 2 + r / kGroup) * whole + r % kGroup * kUnits;
          decode_row(least(n + r, N_ - 1), k, k_end, ahead, to);
          multiply_steps<MT>(before, before.steps * r / NR, before.steps * (r + 1) / NR, parts);
        }
        k = block.last ? 0 : k_end;
        if (block.last) n += NR;
      } else {
        multiply_steps<MT>(before, 0, before.steps, parts);
      }
      if (before.last) {
        parts.add();
        finish(before.t, x, c, before.n, least(n1, before.n + NR), static_cast<float*>(finished.data()));
      }
      if (!more) return;
      before = block;
    }
  }
#endif

  // scales[n, j] = scale of row n0 + n in the j-th of the blocks that share columns k .. k_end; their number
  int64_t find_scales(int64_t n0, int64_t k, int64_t k_end, float* scales) const {
    const int64_t J = k / weight_.bk, count = (k_end - 1) / weight_.bk + 1 - J;
    for (int64_t n = 0; n < NR; ++n) weight_.row_scales(least(n0 + n, N_ - 1), J, count, scales + n * count);
    return count;
  }

  // The codes of the block at row n and column k, in as many steps as `panels` take, as far as row `end`
  CodesAhead ahead(int64_t n, int64_t k, int64_t KC, int64_t panels, int64_t end) const {
    const int64_t rows = least(NR, end - n), bytes = row_bytes(weight_.format, least(KC, x_.K - k));
    const int64_t at_once = panels == 1 ? 2 * kTall : kTall, wide = (panels + kWide - 1) / kWide * (NR / at_once);
    const int64_t passes = plan_.tiles ? (panels + 1) / 2 : wide, steps = most(1, KC / kStepColumns<E> * passes);
    const int64_t lines = rows * ((bytes + 63) / 64);
    return {codes(n, k), row_bytes(weight_.format, x_.K), rows, bytes, (lines + steps - 1) / steps};
  }

  // w = rows n0 .. n0 + NR of the weight; the last row stands in for those below it: their sums are not used
  void decode(int64_t n0, int64_t k, int64_t k_end, float* w, int64_t stride) const {
    const auto at = [=](int64_t n) { return w + n / kGroup * stride + n % kGroup * kUnits; };
    int64_t n = 0;
#ifdef QL_CODES
    if (scales_sums<E> && plan_.codes.decode_together) {
      const int64_t row = byte_offset(weight_.format, x_.K, 1, 0);
      for (; n < NR && n0 + n + kTogether <= N_; n += kTogether)
        plan_.codes.decode_together(codes(n0 + n, k), row, 0, 0, k_end - k, at(n));
    }
#endif
    for (; n < NR; ++n) decode_row(least(n0 + n, N_ - 1), k, k_end, 0, at(n));
  }

  const char* codes(int64_t n, int64_t k) const {
    return static_cast<const char*>(weight_.w.codes) + byte_offset(weight_.format, x_.K, n, k);
  }

  void decode_row(int64_t n, int64_t k, int64_t k_end, int64_t ahead, float* out) const {
#ifdef QL_CODES
    if constexpr (scales_sums<E>) {
      if (!weight_.w.is_affine()) return plan_.codes.decode(codes(n, k), 0, ahead, 0, k_end - k, out);
      weight_.blocks(k, k_end - k, [&](int64_t begin, int64_t end, int64_t J) {
        plan_.codes.decode(codes(n, k + begin), 0, ahead, weight_.zero_point(n, J), end - begin,
                           out + begin / kStepColumns<E> * kTileFloats);
      });
      return;
    }
#endif
    alignas(64) float values[kPackColumns];
    for (; k < k_end; k += kPackColumns) {
      const int64_t count = least(kPackColumns, k_end - k), whole = round_up(count, kUnits);
      weight_.row(n, k, count, values);
      for (int64_t j = count; j < whole; ++j) values[j] = 0.0f;
      for (int64_t j = 0; j < whole; j += kUnits, out += kTileFloats)
        for (int64_t l = 0; l < kUnits; l += kLanes) store(out + l, load<Floats>(values + j + l));
    }
  }

  // sums += the block's product
  void multiply(const Panels& t, int64_t n0, int64_t panels, int64_t k, int64_t k_end, float* scales, Segment* segments,
                CodesAhead ahead) const {
    int64_t count = 1;
    segments[0] = {0, round_up(k_end - k, kWhole<E>) / kStepColumns<E>, nullptr, 0};
    if (scales_sums<E> && weight_.cols > 1) {
      count = find_scales(n0, k, k_end, scales);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t begin = (k / weight_.bk + j) * weight_.bk - k, end = least(begin + weight_.bk, k_end - k);
        segments[j] = {begin / kStepColumns<E>, round_up(end, kWhole<E>) / kStepColumns<E>, scales + j, count};
      }
    }
#ifdef QL_AMX
    if constexpr (scales_sums<E>) {
      if (plan_.tiles) return multiply_all_tiles(t, panels, segments, count, k == 0, ahead);
    }
#endif
    for (int64_t j = 0; j < count; ++j) multiply_vectors<E>(t, panels, segments[j], k == 0 && j == 0, ahead);
  }

  // y = activation(sums * scale + bias) for columns n0 .. n1 of the rows of chunk c
  void finish(const Panels& t, const PackedRows& x, int64_t c, int64_t n0, int64_t n1, float* finished) const {
    const int64_t width = round_up(n1 - n0, kLanes);
    const int64_t apart = x.apart < kLanes ? x.apart : x.apart * kGroup;  // floats between the sums of two parts
    float *scale = finished + kLanes * width, *bias = scale + width;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t n = least(n0 + j, N_ - 1);
      scale[j] = scales_sums<E> && weight_.cols == 1 ? weight_.scale(n, 0) : 1.0f;
      bias[j] = p_.epilogue.bias ? p_.epilogue.bias[n] : 0.0f;
    }
    for (int64_t r = 0; r < x.rows; r += kLanes) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const float* sums = t.sums + j / kGroup * t.stride + r * kGroup + j % kGroup * kLanes;
        Floats square[kLanes];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          Floats sum = load<Floats>(sums + l * kLanes);
          if (plan_.parts == 2) sum = add(sum, load<Floats>(sums + l * kLanes + apart));
          square[l] = mul(sum, splat<Floats>(scale[j + l]));
        }
        transpose(square);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          // A product that underflows may be -0, a sum from +0 never is.
          const Floats sum = add(add(square[l], Floats{}), load<Floats>(bias + j));
          store(finished + l * width + j, sum);
        }
      }
      for (int64_t l = 0; l < kLanes && r + l < x.rows; ++l) {
        float* row = finished + l * width;
        for (int64_t j = 0; j < width; j += kLanes)
          store(row + j, activate(load<Floats>(row + j), p_.epilogue.activation));
        const int64_t at = m0_ + c * MC + r + l, m = x_.list ? x_.list[at] : at;
        encode_(row, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_row_, N_, m, n0), n1 - n0);
      }
    }
  }
};

}  // namespace QL_ISA
}  // namespace quantlib
