// What tests/native/cpu_kernels.cpp compares with: the formula of every format called one element at a time, and memory
// that ends where the data ends.
#pragma once
#include <cstring>

#include "numerics.h"
#include "packing.h"

using namespace quantlib;

namespace {

// ---- the formula, element by element --------------------------------------------------------------------------------

bool is_int(Type type) { return !row_of(type).is_float; }

// encode(x) of a float format, or encode(fl(x / s)) where scaled
uint32_t encode_one(Type type, float t, bool saturate, bool affine, int32_t z) {
  return visit(type, [&](auto f) -> uint32_t {
    using F = decltype(f);
    if constexpr (F::bits == 32) return bits_of(canonical(t));
    else if constexpr (F::is_float) return encode_float<F>(t, saturate);
    else return uint32_t(affine ? encode_int<F, true>(t, clamp_zero_point<F, true>(z)) : encode_int<F, false>(t, 0));
  });
}

float decode_one(Type type, uint32_t code, bool affine, int32_t z) {
  return visit(type, [&](auto f) -> float {
    using F = decltype(f);
    if constexpr (F::bits == 32) return canonical(float_of(code));
    else if constexpr (F::is_float) return decode_float<F>(code);
    else return float(unpack<F>(uint8_t(code), 0) - (affine ? clamp_zero_point<F, true>(z) : 0));
  });
}

float scale_one(Type type, float s) {
  return type == Type::float32 ? s : effective_scale(s, float_of(row_of(type).scale_max));
}

Affine range_one(Type type, float lowest, float highest, bool affine) {
  const uint32_t a = bits_of(lowest) & 0x7fffffffu, b = bits_of(highest) & 0x7fffffffu;
  return visit(type, [&](auto f) -> Affine {
    using F = decltype(f);
    if constexpr (F::bits == 32) return {};
    else if constexpr (F::is_float) return {symmetric_scale<F>(a > b ? a : b), 0};
    else return affine ? affine_scale<F>(lowest, highest) : Affine{symmetric_scale<F>(a > b ? a : b), 0};
  });
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

uint32_t code_at(const void* codes, const Row& f, int64_t K, int64_t i, int64_t j) {
  const auto* row = static_cast<const uint8_t*>(codes) + i * row_bytes(f, K);
  if (f.bits < 8) return row[j / f.per_byte] >> (j % f.per_byte * f.bits) & ((1u << f.bits) - 1u);
  row += j * f.bytes;  // byte by byte: memcpy of a size that varies is a call, half of the time of all
  uint32_t code = row[0];
  for (int k = 1; k < f.bytes; ++k) code |= uint32_t(row[k]) << 8 * k;
  return code;
}

}  // namespace
