// Codes of a weight to operands of matrix instructions, exactly: float16 and bfloat16 hold every float of at most eight
// bits, and every code - zero_point too. No conversion instruction: four codes take about ten others.
#pragma once
#include "intrinsics.cuh"

namespace quantlib {
namespace cuda {

// The same 16 bits in both halves of a register.
QL_FN constexpr uint32_t both(uint32_t half) { return half | half << 16; }

// 2^e in both halves.
template <class X>
QL_FN constexpr uint32_t two_to(int e) {
  return both(uint32_t(X::bias + e) << X::fraction_bits);
}

constexpr uint32_t kSigns = both(0x8000);

// The code of a float32 number in the 16-bit type X, which need not hold it: a NaN, a subnormal and an infinity are
// none.
template <class X>
QL_FN constexpr uint32_t narrow(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff, rebias = uint32_t(127 - X::bias) << 23;
  return (bits >> 16 & 0x8000) | (magnitude ? (magnitude - rebias) >> (23 - X::fraction_bits) : 0);
}
template <class X>
QL_FN constexpr bool holds(uint32_t bits) {
  const int exponent = int(bits >> 23 & 0xff) - 127 + X::bias;
  const bool no_lower = !(bits & ((1u << (23 - X::fraction_bits)) - 1));
  return no_lower && (!(bits & 0x7fffffff) || (exponent > 0 && exponent < (1 << X::exponent_bits) - 1));
}

// True if codes of F become operands of the 16-bit type X here: those of whole or half bytes, whose values X holds. Of
// special values only those beyond the largest finite one are looked for, and in bytes.
template <class F, class X>
constexpr bool has_operand = [] {
  if constexpr ((F::bits != 8 && F::bits != 4) || F::bits * F::per_byte != 8) return false;
  else if constexpr (F::is_book) {
    for (uint32_t code = 0; code <= F::max_code; ++code)
      if (!holds<X>(Book<F>::bits(code))) return false;
    return true;
  } else if constexpr (!F::is_float) return true;
  else
    return F::has_negative_zero && F::has_nan >= F::has_inf && (F::bits == 8 || !F::has_nan) &&
           F::fraction_bits <= X::fraction_bits && F::max <= X::max &&
           F::bias + F::fraction_bits <= X::bias + X::fraction_bits;
}();

// Signed and unsigned codes of as many bits have one kernel, that of the first in the table.
QL_FN constexpr Type first_integer(int bits) {
#define QL_ROW(NAME, ...) \
  if (NAME::bits == bits && bits * NAME::per_byte == 8) return Type::NAME;
  QL_INTS(QL_ROW)
#undef QL_ROW
  return Type::float32;
}

// run(F{}, row) with the format whose kernel takes codes of `format` to X, and the row of `format`; false if there is
// none.
template <class X, class Run>
bool visit_operand(Type format, const Run& run) {
  const Row own = row_of(format);
  if (own.bits * own.per_byte != 8) return false;
  return visit(own.is_float ? format : first_integer(own.bits), [&](auto f) {
    using F = decltype(f);
    if constexpr (has_operand<F, X>) {
      if constexpr (F::is_float || F::type == first_integer(F::bits)) {
        run(f, own);
        return true;
      }
    }
    return false;
  });
}

// True if codes of `format` become operands of the type of x.
inline bool is_operand(Type format, Type x_type) {
  const auto nothing = [](auto, const Row&) {};
  return x_type == Type::float16    ? visit_operand<float16>(format, nothing)
         : x_type == Type::bfloat16 ? visit_operand<bfloat16>(format, nothing)
                                    : false;
}

// The places of a lane's codes in a row: four words of four codes, or of two times four.
template <class F, bool TILED>
struct Columns {
  static constexpr int halves = F::per_byte, tile = 64 * halves, bytes = TILED ? 1024 : 64;
  static constexpr int lane = TILED ? 4 : 16 * halves, word = TILED ? 16 : 4 * halves, half = TILED ? 64 : 4;  // steps
  // The four codes of a half are in neighbouring bytes of a tile, else in both nibbles of two.
  static constexpr QL_DEVICE uint32_t selector(int pair) {
    return TILED ? 0x0100 + 0x0202 * pair : 0x0400 + 0x0101 * pair;
  }
};

// A scale of a magnitude below 1 as a power of two, which multiplies operands exactly, and the rest, which multiplies
// sums: no sum is infinite whose product with the whole scale is not. Sums of float16 are too small for that, and it
// has too few powers.
template <class X>
struct SplitScale {
  uint32_t power = two_to<X>(0);
  float rest = 1.0f;

  QL_DEVICE SplitScale() {}
  QL_DEVICE explicit SplitScale(float scale) : rest(scale) {
    if (std::is_same_v<X, float16> || !(float_of(bits_of(scale) & 0x7fffffffu) < 1.0f)) return;
    power = both(bits_of(scale) >> 16 & 0x7f80);
    rest = float_of((bits_of(scale) & 0x807fffff) | 0x3f800000);
  }
};

// (decode(code) - zero_point) * power of two of the codes in a word, in the 16-bit type X: a register of a matrix
// operand. Of codes of eight bits, bytes 2 p and 2 p + 1; of four, what `selector` picks from the bytes of word (0 to
// 3) and word
// >> 4 (4 to 7), in the low nibbles of both halves. `flip` turns sign bits.
enum class Kind { integer, fields, book };
template <class F, class X,
          Kind = F::is_book    ? Kind::book
                 : F::is_float ? Kind::fields
                               : Kind::integer>
struct Operand;

template <class F, class X>
struct Operand<F, X, Kind::integer> {
  // The power of two whose last place in X is 1, with a code in its low bits, is their sum.
  static constexpr uint32_t magic = two_to<X>(X::fraction_bits);
  static constexpr bool fits = F::bits <= X::fraction_bits;  // 8 bits do not, in bfloat16: its top bit is subtracted
  // Codes come unsigned, less affine_qmin, where they fit, and signed where they do not.
  static constexpr uint32_t flip(bool is_signed) { return is_signed == fits ? both(F::bits == 8 ? 0x8080 : 8) : 0; }
  uint32_t power, minus_zero;

  // z less the lowest code: 0 .. 2^bits - 1
  QL_DEVICE Operand(uint32_t z, uint32_t power) : power(power), minus_zero(kSigns | magic | both(z)) {
    if constexpr (!fits) minus_zero = minus(magic | both((z ^ 0x80) & 0x7f), magic | both((z ^ 0x80) & 0x80));
    minus_zero = fma2(X{}, minus_zero, power, kSigns);
  }
  QL_DEVICE uint32_t operator()(uint32_t word, int p, uint32_t selector, uint32_t flip) const {
    const uint32_t bytes = p == 0 ? 0x5150 : 0x5352;  // of codes, each below one of the magic number's
    uint32_t value;
    if constexpr (F::bits == 4) value = (permute(word, word >> 4, selector) & both(0xf)) ^ (magic | flip);
    else if constexpr (fits) value = permute(word ^ flip, magic, bytes);
    else value = minus(permute((word ^ flip) & 0x80808080, magic, bytes), permute(word & 0x7f7f7f7f, magic, bytes));
    return fma2(X{}, value, power, minus_zero);
  }

 private:
  // b - a: of magic + the top bit of a code and magic + its others, the code as signed; the other way round, less it.
  QL_DEVICE static uint32_t minus(uint32_t a, uint32_t b) { return fma2(X{}, a, two_to<X>(0) | kSigns, b); }
};

template <class F, class X>
struct Operand<F, X, Kind::fields> {
  static constexpr uint32_t flip(bool) { return 0; }
  static constexpr int shift = X::fraction_bits - F::fraction_bits;  // of a magnitude, from a half's low end
  static constexpr uint32_t magnitudes = both(((1u << (F::bits - 1)) - 1) << shift);

  uint32_t factor;  // of the bias, and the power

  QL_DEVICE Operand(uint32_t, uint32_t power) : factor(two_to<X>(X::bias - F::bias) + power - two_to<X>(0)) {}
  QL_DEVICE uint32_t operator()(uint32_t word, int p, uint32_t selector, uint32_t) const {
    // 1. sign, exponent and fraction to their places in X
    uint32_t bits;
    if constexpr (F::bits == 4) {
      const uint32_t code = permute(word, word >> 4, selector);
      bits = (code << 12 & kSigns) | (code << shift & magnitudes);
    } else {
      const uint32_t code = permute(word, 0, p == 0 ? 0x1404 : 0x3424);  // << 8
      bits = (code & kSigns) | (code >> (8 - shift) & magnitudes);
    }
    if constexpr (F::bias == X::bias) return bits;
    // 2. where a byte is an infinity or NaN, its top bit, then X's highest exponent
    uint32_t beyond = 0;
    if constexpr (F::has_nan) {
      const uint32_t special = (word & 0x7f7f7f7f) + (0x80 - F::overflow_code) * 0x01010101;
      beyond = (bits | both(X::overflow_code)) & permute(special, special, p == 0 ? 0x9988 : 0xbbaa);
    }
    // 3. exponents count from another bias
    return fma2(X{}, bits, factor, beyond);
  }
};

// Looked up: the sixteen values as bytes in registers, which a permutation picks from eight at a time.
template <class F, class X>
struct Operand<F, X, Kind::book> {
  static constexpr uint32_t flip(bool) { return 0; }
  uint32_t power;

  QL_DEVICE Operand(uint32_t, uint32_t power) : power(power) {}
  QL_DEVICE uint32_t operator()(uint32_t word, int, uint32_t selector, uint32_t) const {
    // 1. the codes in the low nibbles of both halves, and as a selector of bytes 0 and 2
    const uint32_t code = permute(word, word >> 4, selector) & both(0xf);
    const uint32_t of_eight = (code | code >> 8) & 0x0707;
    // 2. the lower and the upper bytes of the values, of the upper eight where a code has its highest bit
    const uint32_t is_upper = permute(code << 4, 0, 0x0a08);
    uint32_t byte[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t low = permute(four(0, b), four(4, b), of_eight), high = permute(four(8, b), four(12, b), of_eight);
      byte[b] = (low & ~is_upper) | (high & is_upper);
    }
    // 3. side by side
    return fma2(X{}, permute(byte[0], byte[1], 0x6240), power, kSigns);
  }

 private:
  // Byte b of the values of four codes
  QL_DEVICE static constexpr uint32_t four(uint32_t code, int b) {
    uint32_t bytes = 0;
    for (uint32_t i = 0; i < 4; ++i) bytes |= (narrow<X>(Book<F>::bits(code + i)) >> (8 * b) & 0xff) << (8 * i);
    return bytes;
  }
};

}  // namespace cuda
}  // namespace quantlib
