// y[b, n, i, j] = bias[n] + sum over c, r, s of w[n, (c, r, s)] * x[b, c, i * stride + r * dilation - padding, ...]
//
// A product with the patches of x, which are packed into panels from a copy of x that has its padding and, where the
// stride is not 1, every column of one remainder side by side: the values of neighbouring lanes lie side by side there,
// and those of another column of the weight as far away from them for every lane.
#include "blocked.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// A value of x in the copy
template <class E>
struct PixelOf {
  using Type = float;
};
#ifdef __AVX512BF16__
template <>
struct PixelOf<uint16_t> {
  using Type = uint16_t;
};
#endif
template <class E>
using Pixel = typename PixelOf<E>::Type;

// How the copy of an image lies in memory
struct Copy {
  const Convolve& p;
  int64_t phases = p.stride_w;                                              // columns side by side: w % phases
  int64_t width = p.OW + (p.kernel_w - 1) * p.dilation_w / phases;          // of a phase
  bool is_x = !p.padding_h && !p.padding_w && phases == 1 && width == p.W;  // no copy is needed
  int64_t height = is_x ? p.H : (p.OH - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;  // with padding
  int64_t plane = height * phases * width, image = p.C * plane;

  // The place of column k of the weight, from that of the lane
  int64_t column(int64_t k) const {
    const int64_t s = k % p.kernel_w * p.dilation_w, r = k / p.kernel_w % p.kernel_h * p.dilation_h;
    return k / p.kernel_w / p.kernel_h * plane + (r * phases + s % phases) * width + s / phases;
  }
  // That of pixel (i, j) of y
  int64_t pixel(int64_t b, int64_t i, int64_t j) const { return b * image + i * p.stride_h * phases * width + j; }
};

// Lanes that lie side by side in the copy
struct Run {
  int64_t begin, end;  // lanes
  int64_t at;          // the place of lane 0, whether it is in the run or not
};

template <class E>
struct Patches {
  static constexpr bool in_rows = false;
  using P = Pixel<E>;
  const Convolve& p;
  const Copy& copy;
  const P* data;          // [parts, images, C, ...]
  const int64_t part;     // values of a part
  const int64_t* places;  // of the columns in the order in which they are packed; -1 where there is none
  const int64_t b0, m0;   // the first image of the copy; the first pixel
  const int64_t K = p.weight.grid.K, pixels = p.OH * p.OW, columns = round_up(K, 32);

  void pack(int64_t first, const PackedRows& to, int64_t v, const uint16_t (&)[32], uint8_t*) const {
    Run runs[kLanes];
    const int count = find_runs(m0 + first, to, v, runs);
#ifdef __AVX512BF16__
    if constexpr (scales_sums<E>) {
      Words words[kLanes];
      for (int n = 0; n < count; ++n) words[n] = {data + runs[n].at, mask_of(runs[n])};
      if (count == 1 && words[0].mask == 0xffff) return pack_words<0>(words, 1, to.panel(v));
      if (count == 1) return pack_words<1>(words, 1, to.panel(v));
      if (count == 2) return pack_words<2>(words, 2, to.panel(v));
      return pack_words<3>(words, count, to.panel(v));
    }
#endif
    float* panel = to.panel(v);
    const bool whole = count == 1 && runs[0].begin == 0 && runs[0].end == kLanes;
    for (int64_t k = 0; k < to.depth; ++k, panel += kLanes) {
      const int64_t place = k < columns ? places[k] : -1;
      if (whole && place >= 0) {
        store(panel, load<Floats>(reinterpret_cast<const float*>(data) + runs[0].at + place));
        continue;
      }
      store(panel, Floats{});
      for (int n = 0; place >= 0 && n < count; ++n)
        for (int64_t l = runs[n].begin; l < runs[n].end; ++l) panel[l] = float(data[runs[n].at + l + place]);
    }
  }

  // Pixels first .. first + count of channel n of y
  void write(int64_t n, int64_t first, int64_t count, const float* values, Encode encode) const {
    const int64_t size = row_of(p.x_type).bytes;
    for (int64_t m = m0 + first, end = m + count; m < end;) {
      const int64_t b = b0 + m / pixels, at = m % pixels, run = least(pixels - at, end - m);
      char* y = static_cast<char*>(p.y) + ((b * p.weight.grid.M + n) * pixels + at) * size;
      encode(values, nullptr, nullptr, kAsIs, y, run);
      m += run, values += run;
    }
  }

 private:
  int find_runs(int64_t m, const PackedRows& to, int64_t v, Run (&runs)[kLanes]) const {
    int count = 0;
    for (int64_t l = 0, next; l < kLanes; l = next) {
      const int64_t lane = v * kLanes + l, r = lane % to.apart, left = least(kLanes - l, to.apart - r);
      next = l + left;
      if (lane >= to.apart * to.parts || r >= to.rows) continue;
      const int64_t at = m + r, i = at / p.OW % p.OH, j = at % p.OW;
      next = l + least(least(left, to.rows - r), p.OW - j);
      runs[count++] = {l, next, lane / to.apart * part + copy.pixel(at / pixels, i, j) - l};
    }
    return count;
  }

#ifdef __AVX512BF16__
  // A run of lanes as a column of the weight finds it, its lanes alone
  struct Words {
    const uint16_t* from;
    __mmask16 mask;
  };
  static __mmask16 mask_of(const Run& run) { return __mmask16((2u << (run.end - 1)) - (1u << run.begin)); }

  // A word in each lane, of `count` runs: RUNS of them, or of one that has all lanes where that is 0, any number where
  // it is 3
  template <int RUNS>
  static QL_MEMBER __m512i lanes(const Words (&words)[kLanes], int count, int64_t place) {
    __m256i found = RUNS == 0 ? load<__m256i>(words[0].from + place)
                              : _mm256_maskz_loadu_epi16(words[0].mask, words[0].from + place);
    if constexpr (RUNS >= 2) found = _mm256_mask_loadu_epi16(found, words[1].mask, words[1].from + place);
    for (int n = 2; RUNS == 3 && n < count; ++n)
      found = _mm256_mask_loadu_epi16(found, words[n].mask, words[n].from + place);
    return _mm512_maskz_cvtepu16_epi32(0xffff, found);
  }

  template <int RUNS>
  void pack_words(const Words (&words)[kLanes], int count, float* panel) const {
    const auto either = [](__m512i low, __m512i high) {
      return _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16));
    };
    int64_t k = 0;
    for (; k < K / 32 * 32; k += 2, panel += kLanes)
      store(panel, either(lanes<RUNS>(words, count, places[k]), lanes<RUNS>(words, count, places[k + 1])));
    for (; k < columns; k += 2, panel += kLanes) {
      const __m512i none = {};
      const auto low = places[k] < 0 ? none : lanes<RUNS>(words, count, places[k]);
      const auto high = places[k + 1] < 0 ? none : lanes<RUNS>(words, count, places[k + 1]);
      store(panel, either(low, high));
    }
  }
#endif
};

// True if x lies in memory as P
template <class P>
bool is_as(const Convolve& p) {
  return p.x_type == (sizeof(P) == 2 ? Type::bfloat16 : Type::float32);
}

// Whether one of n values of x is odd
bool is_odd_part([[maybe_unused]] Type type, [[maybe_unused]] const void* x, [[maybe_unused]] int64_t n) {
#ifdef QL_CODES
  if (type == Type::bfloat16) return is_odd(static_cast<const uint16_t*>(x), n);
  if (type == Type::float32) return is_odd(static_cast<const uint32_t*>(x), n);
  const auto* halves = static_cast<const uint16_t*>(x);
  uint16_t odd = 0;
  for (int64_t k = 0; k < n; ++k) odd |= uint16_t((halves[k] & 0x7fff) >= 0x7c00);  // others are within its range
  return odd;
#else
  return false;
#endif
}

// to = n values of x as P, at most kPackColumns; what they lack as P where there is a second part
template <class P>
void convert(const Convolve& p, const char* x, int64_t n, P* to, [[maybe_unused]] P* second) {
  alignas(64) float floats[kPackColumns] = {};
  if (const Decode decode = decoder(p.x_type)) decode(x, false, floats, n);
  else __builtin_memcpy(floats, x, size_t(n) * 4);
#ifdef __AVX512BF16__
  if constexpr (sizeof(P) == 2) {
    for (int64_t k = 0; k < n; k += 32)
      store(to + k, part_of(floats + k, 0)), store(second + k, part_of(floats + k, 1));
    return;
  }
#endif
  __builtin_memcpy(to, floats, size_t(n) * 4);
}

// Columns w .. w + n of row h of a plane of x
template <class P>
void place(const Convolve& p, const Copy& copy, int64_t h, int64_t w, int64_t n, const P* from, P* plane) {
  if (h + p.padding_h >= copy.height) return;
  const int64_t phases = copy.phases, before = w + p.padding_w;
  P* row = plane + (h + p.padding_h) * phases * copy.width;
  if (phases == 1) {
    n = most(0, least(n, copy.width - before));
    P* to = row + before;
    constexpr int64_t step = sizeof(Floats) / sizeof(P);
    int64_t j = 0;
    for (; j + step <= n; j += step) store(to + j, load<Floats>(from + j));
#ifdef __AVX512BW__
    if constexpr (sizeof(P) == 2) {
      const __mmask32 rest = (1u << (n - j)) - 1;
      return _mm512_mask_storeu_epi16(to + j, rest, _mm512_maskz_loadu_epi16(rest, from + j));
    }
#endif
    for (; j < n; ++j) to[j] = from[j];
    return;
  }
  for (int64_t f = 0; f < phases; ++f) {  // of the columns with padding, every `phases`-th from number f on
    const int64_t skipped = (phases + f - before % phases) % phases, first = (before + skipped) / phases;
    const int64_t last = least(copy.width, first + (n - skipped + phases - 1) / phases);
    for (int64_t j = first; j < last; ++j) row[f * copy.width + j] = from[skipped + (j - first) * phases];
  }
}

// Images b0 .. b0 + images of x, a second part behind them where there are two; whether a value is odd
template <class P>
bool copy_images(const Convolve& p, ParallelFor run, const Copy& copy, int64_t b0, int64_t images, int64_t parts,
                 P* data) {
  int any = 0;
  const int64_t part = images * copy.image, values = p.H * p.W, bytes = row_of(p.x_type).bytes;
  const bool as_it_is = is_as<P>(p);
  parallel(run, images * p.C, most(1, kGrain / copy.plane), [&](int64_t begin, int64_t end) {
    alignas(64) P converted[2][kPackColumns];
    bool odd = false;
    for (int64_t c = begin; c < end; ++c) {
      const char* x = static_cast<const char*>(p.x) + (b0 * p.C + c) * values * bytes;
      odd |= is_odd_part(p.x_type, x, values);
      if (!data) continue;
      P* planes[] = {data + c * copy.plane, data + c * copy.plane + part};
      for (int64_t q = 0; q < parts; ++q) __builtin_memset(planes[q], 0, size_t(copy.plane) * sizeof(P));
      const int64_t step = as_it_is ? values : kPackColumns;
      for (int64_t at = 0; at < values; at += step) {
        const int64_t stop = least(values, at + step);
        if (!as_it_is) convert(p, x + at * bytes, stop - at, converted[0], converted[1]);
        for (int64_t j = at, h = at / p.W, w = at % p.W, next; j < stop; j = next, ++h, w = 0) {
          next = least(stop, j + p.W - w);
          for (int64_t q = 0; q < parts; ++q)
            place(p, copy, h, w, next - j, as_it_is ? reinterpret_cast<const P*>(x) + j : converted[q] + (j - at),
                  planes[q]);
        }
      }
    }
    if (odd) __atomic_store_n(&any, 1, __ATOMIC_RELAXED);
  });
  return any != 0;
}

// Images b0 .. b0 + images; false where a value of x is odd, nothing was multiplied then
template <class E>
bool multiply(const Convolve& p, ParallelFor run, const Copy& copy, int64_t b0, int64_t images, Plan plan) {
  using P = Pixel<E>;
  const bool direct = copy.is_x && is_as<P>(p);
  const Scratch scratch(direct ? 0 : plan.parts * images * copy.image * int64_t(sizeof(P)));
  P* copied = direct ? nullptr : static_cast<P*>(scratch.data());
  if (copy_images(p, run, copy, b0, images, plan.parts, copied) && scales_sums<E>) return false;
  const P* data = direct ? static_cast<const P*>(p.x) + b0 * copy.image : copied;
  const int64_t K = p.weight.grid.K, rows = images * p.OH * p.OW, height = plan.MC;
  const Scratch of_columns(round_up(K, 32) * 8);
  auto* places = static_cast<int64_t*>(of_columns.data());
  for (int64_t k = 0; k < round_up(K, 32); ++k) {
    const int64_t column = scales_sums<E> ? k / 32 * 32 + plan.codes.order[k % 32] : k;
    places[k] = column < K ? copy.column(column) : -1;
  }
  const int64_t most_rows = most(1, kPackedBytes / (4 * K) / height) * height;
  const DequantMatmul product = {.M = rows,
                                 .x = nullptr,
                                 .x_type = p.x_type,
                                 .weight = p.weight,
                                 .epilogue = {p.bias, Activation::none},
                                 .batch_invariant = false,
                                 .y = p.y};
  for (int64_t m = 0; m < rows; m += most_rows) {
    const int64_t count = least(most_rows, rows - m), chunks = (count + height - 1) / height;
    plan.MC = least(height, round_up((count + chunks - 1) / chunks, kLanes));  // or threads wait for the highest
    const Patches<E> patches = {p, copy, data, images * copy.image, places, b0, m};
    Blocked<E, Patches<E>>(product, patches, count, plan)(run, nullptr);
  }
  return true;
}

#if defined(__AVX2__) || defined(__AVX512F__)
// How codes are multiplied, or the weight in FP32.
Plan choose(const Convolve& p, bool floats) {
  const Grid& g = p.weight.grid;
  Plan plan = {};
  plan.way = Plan::blocks, plan.parts = 1;
#ifdef QL_CODES
  plan.codes = code_kernels(p.weight.format, p.weight.is_affine());
  plan.by_codes = !floats && plan.codes.decode && (g.bk >= g.K || g.bk % 32 == 0);
#endif
#ifdef __AVX512BF16__
  if (p.x_type == Type::float32) plan.by_codes &= has_fast_pairs() && g.K >= kLeastSplit;
  if (plan.by_codes && p.x_type != Type::bfloat16) plan.parts = 2;
#endif
#ifdef QL_VALUES
  const int64_t height = 240, depth = 256;
#else
  // More rows than dequant_matmul takes: what is packed is of use to fewer rows of the weight.
  const int64_t height = 1024, depth = 1024;
#endif
  plan.MC = height / plan.parts, plan.NC = 128;
  const int64_t times = (g.K + depth - 1) / depth;
  plan.KC = g.bk < g.K && g.bk % kUnits == 0 ? most(1, depth / g.bk) * g.bk : round_up((g.K + times - 1) / times, 32);
  return plan;
}

// Whether torch, which wants the weight as floats and in an order of its own, takes longer. Its tiles are a seventh
// faster than those of this folder, and it packs no patches.
bool is_faster(const Convolve& p, [[maybe_unused]] const Plan& plan) {
  if (has_amx()) return false;
  const int64_t pixels = p.B * p.OH * p.OW, taps = p.kernel_h * p.kernel_w;
#ifdef __AVX512BF16__
  if (plan.by_codes && plan.parts == 1) return taps == 1 || p.weight.grid.K <= 1200 || pixels <= 256;
#endif
  return pixels <= 256 && taps > 1;
}
#endif

}  // namespace

void convolve([[maybe_unused]] const Convolve& p, [[maybe_unused]] ParallelFor run) {
#if defined(__AVX2__) || defined(__AVX512F__)
  const Plan plan = choose(p, false), floats = choose(p, true);
  *p.served = is_faster(p, plan);
  if (!*p.served || !p.y) return;
  const Copy copy = {p};
  const int64_t at_once = most(1, kPackedBytes / (4 * p.weight.grid.K) / (p.OH * p.OW));  // images
  for (int64_t b = 0; b < p.B; b += at_once) {
    const int64_t images = least(at_once, p.B - b);
#ifdef QL_CODES
    if (plan.by_codes && multiply<Unit>(p, run, copy, b, images, plan)) continue;
#endif
    multiply<float>(p, run, copy, b, images, floats);
  }
#endif
}

}  // namespace QL_ISA
}  // namespace quantlib
