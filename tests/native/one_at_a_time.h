// What tests/native/cpu_kernels.cpp compares with: the formula of every format called one element at a time, and memory
// that ends where the data ends.
#pragma once
#include <cstring>

#include "numerics.h"
#include "packing.h"

using namespace quantlib;

namespace {

// ---- the formula, element by element --------------------------------------------------------------------------------

int bits_of_type(Type type) {
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return NAME::bits;
    QL_FLOATS(QL_CASE)
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return 32;
  }
}

bool is_int(Type type) { return type >= Type::int8; }

// encode(x) of a float format, or encode(fl(x / s)) where scaled
uint32_t encode_one(Type type, float t, bool saturate, bool affine, int32_t z) {
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return encode_float<NAME>(t, saturate);
    QL_FLOATS(QL_CASE)
#undef QL_CASE
#define QL_CASE(NAME, ...)                                                              \
  case Type::NAME:                                                                      \
    return uint32_t(affine ? encode_int<NAME, true>(t, clamp_zero_point<NAME, true>(z)) \
                           : encode_int<NAME, false>(t, 0));
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return bits_of(canonical(t));
  }
}

float decode_one(Type type, uint32_t code, bool affine, int32_t z) {
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return decode_float<NAME>(code);
    QL_FLOATS(QL_CASE)
#undef QL_CASE
#define QL_CASE(NAME, ...)                                                \
  case Type::NAME: {                                                      \
    const int32_t q = !NAME::is_signed  ? int32_t(code)                   \
                      : NAME::bits == 8 ? int8_t(code)                    \
                                        : unpack<NAME>(uint8_t(code), 0); \
    return float(q - (affine ? clamp_zero_point<NAME, true>(z) : 0));     \
  }
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return canonical(float_of(code));
  }
}

float scale_one(Type type, float s) {
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return effective_scale<NAME>(s);
    QL_FLOATS(QL_CASE)
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return s;
  }
}

Affine range_one(Type type, float lowest, float highest, bool affine) {
  const uint32_t a = bits_of(lowest) & 0x7fffffffu, b = bits_of(highest) & 0x7fffffffu;
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return {symmetric_scale<NAME>(a > b ? a : b), 0};
    QL_FLOATS(QL_CASE)
#undef QL_CASE
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return affine ? affine_scale<NAME>(lowest, highest) : Affine{symmetric_scale<NAME>(a > b ? a : b), 0};
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return {};
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// `size` bytes that begin `offset` bytes into an allocation and end with it.
struct Buffer {
  int64_t offset, size;
  char* memory;
  Buffer(int64_t size, int64_t offset) : offset(offset), size(size), memory(new char[size_t(size + offset)]) {
    std::memset(memory, 0xa5, size_t(size + offset));
  }
  ~Buffer() { delete[] memory; }
  Buffer(const Buffer&) = delete;
  void* data() const { return memory + offset; }
};

int64_t row_bytes(int bits, int64_t K) { return bits == 4 ? (K + 1) / 2 : K * (bits / 8); }

uint32_t code_at(const void* codes, int bits, int64_t K, int64_t i, int64_t j) {
  const auto* row = static_cast<const uint8_t*>(codes) + i * row_bytes(bits, K);
  uint32_t code = 0;
  if (bits == 4) return j % 2 ? row[j / 2] >> 4 : row[j / 2] & 15u;
  std::memcpy(&code, row + j * (bits / 8), size_t(bits / 8));
  return code;
}

}  // namespace
