// Checks of an op's arguments. Each says what was expected and what came, in the words of quantlib/ops/check.py.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "numerics.h"
#include "problem.h"
#include "tensor.h"

namespace quantlib {

// ---- formats and dtypes ---------------------------------------------------------------------------------------------

// A row of the table, for the host.
struct Format {
  const char* name;
  Type type;
  int bits, per_byte;
  bool is_float;
  int qmin, qmax;  // of an affine zero point
  int32_t dtype;   // of its codes
  bool packed() const { return per_byte > 1; }
  bool whole() const { return bits == 8 || bits == 16 || bits == 32; }
  // The number of elements of `dtype` that hold a row of K codes
  int64_t columns(int64_t K) const { return K / per_byte + (K % per_byte != 0); }
};

struct Dtype {
  int32_t dtype;
  const char* name;
};

inline const std::vector<Dtype>& dtypes() {
  static const std::vector<Dtype> all = {
#define QL_DTYPE(NAME) {aoti_torch_dtype_##NAME(), #NAME},
      QL_DTYPE(float32) QL_DTYPE(float16) QL_DTYPE(bfloat16) QL_DTYPE(float8_e4m3fn) QL_DTYPE(float8_e5m2)
          QL_DTYPE(float8_e4m3fnuz) QL_DTYPE(float8_e5m2fnuz) QL_DTYPE(float64) QL_DTYPE(uint8) QL_DTYPE(uint16)
              QL_DTYPE(uint32) QL_DTYPE(uint64) QL_DTYPE(int8) QL_DTYPE(int16) QL_DTYPE(int32) QL_DTYPE(int64)
                  QL_DTYPE(bool) QL_DTYPE(complex32) QL_DTYPE(complex64) QL_DTYPE(complex128)
#undef QL_DTYPE
                      {torch_dtype_float8_e8m0fnu(), "float8_e8m0fnu"},
  };
  return all;
}

inline std::string name_of(int32_t dtype) {
  if (dtype == kNoDtype) return "None";
  for (const Dtype& d : dtypes())
    if (d.dtype == dtype) return d.name;
  return "dtype " + std::to_string(dtype);
}

inline const std::vector<Format>& formats() {
  const auto format = [](const char* name, Type type, int32_t dtype) {
    const Row f = row_of(type);
    return Format{name, type, f.bits, f.per_byte, f.is_float, f.qmin, f.qmax, dtype};
  };
  static const std::vector<Format> all = {format("float32", Type::float32, aoti_torch_dtype_float32()),
#define QL_ROW(NAME, DTYPE, ...) format(#NAME, Type::NAME, aoti_torch_dtype_##DTYPE()),
                                          QL_FLOATS(QL_ROW) QL_INTS(QL_ROW)
#undef QL_ROW
  };
  return all;
}

// The formats that an argument may have.
using Accepts = bool (*)(const Format&);
inline bool inputs(const Format& f) { return f.is_float && f.bits >= 16; }
inline bool casts(const Format& f) { return f.is_float && f.whole(); }
inline bool targets(const Format& f) { return f.type != Type::float32; }
inline bool in_tiles(const Format& f) { return f.bits <= 8; }
inline bool integers(const Format& f) { return !f.is_float; }
inline bool bytes(const Format& f) { return !f.is_float && f.whole(); }

inline std::string one_of(Accepts accepts) {
  std::string text, last;
  for (const Format& f : formats()) {
    if (!accepts(f)) continue;
    if (!last.empty()) text += (text.empty() ? "" : ", ") + last;
    last = f.name;
  }
  return text.empty() ? last : text + " or " + last;
}

// ---- messages -------------------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* op, const std::string& argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error("quantlib::" + std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

inline std::string text_of(SizesView sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string text_of(Device device) {
  const std::pair<int32_t, const char*> types[] = {{aoti_torch_device_type_cpu(), "cpu"},
                                                   {aoti_torch_device_type_cuda(), "cuda"},
                                                   {aoti_torch_device_type_meta(), "meta"},
                                                   {aoti_torch_device_type_xpu(), "xpu"},
                                                   {aoti_torch_device_type_mps(), "mps"}};
  std::string text = "device type " + std::to_string(device.type);
  for (const auto& [type, name] : types)
    if (type == device.type) text = name;
  const bool numbered =
      device.index >= 0 && device.type != aoti_torch_device_type_cpu() && device.type != aoti_torch_device_type_meta();
  return numbered ? text + ":" + std::to_string(device.index) : text;
}

inline std::string described(SizesView sizes, int32_t dtype, Device device) {
  if (dtype == kNoDtype) return name_of(dtype);
  return name_of(dtype) + " " + text_of(sizes) + " on " + text_of(device);
}

// A number as Python writes it: the fewest digits that mean it.
inline std::string text_of(double value) {
  if (value != value) return "nan";
  char text[64];
  int digits = 0;
  do std::snprintf(text, sizeof text, "%.*e", digits++, value);
  while (std::strtod(text, nullptr) != value);
  const char* exponent = std::strchr(text, 'e');
  if (!exponent) return text;  // an infinity
  const int e = std::atoi(exponent + 1);
  if (e < -4 || e >= 16) return text;
  std::snprintf(text, sizeof text, "%.*f", std::max(digits - 1 - e, 1), value);
  return text;
}

inline void fail_to_allocate(Name name, SizesView sizes, int32_t dtype, Device device) {
  fail(name.op, name.argument, "small enough to allocate", described(sizes, dtype, device));
}

// ---- checks ---------------------------------------------------------------------------------------------------------

// A result of an op: the shape and dtype of a tensor.
struct Result {
  Sizes sizes;
  int32_t dtype;
};

inline void check_tensor(const char* op, const char* argument, const Tensor& got, const Result& expected,
                         Device device) {
  if (got.dtype() != expected.dtype || !(got.device() == device) || !got.sizes().equals(expected.sizes))
    fail(op, argument, described(expected.sizes, expected.dtype, device),
         described(got.sizes(), got.dtype(), got.device()));
}

// The row whose codes are `got`.
inline const Format& check_dtype(const char* op, const char* argument, int32_t got, Accepts accepted) {
  for (const Format& f : formats())
    if (f.dtype == got && accepted(f)) return f;
  fail(op, argument, one_of(accepted), name_of(got));
}

inline const Format& check_format(const char* op, const std::string& name, Accepts accepted) {
  for (const Format& f : formats())
    if (name == f.name && accepted(f)) return f;
  fail(op, "format", one_of(accepted), name);
}

// [..., K] viewed as [M, K] in blocks of (br, bk); 0-d as [1, 1].
inline Grid check_block(const char* op, SizesView sizes, const Sizes& block) {
  if (block.size() != 2 || block[0] < 1 || block[1] < 1) fail(op, "block", "two sizes >= 1", text_of(block));
  Grid grid = {1, sizes.empty() ? 1 : sizes.back(), block[0], block[1]};
  if (!sizes.empty()) grid.M = product(sizes.begin(), sizes.end() - 1);
  return grid;
}

inline bool is_e8m0(const Tensor& scale) { return scale.dtype() == torch_dtype_float8_e8m0fnu(); }
inline bool is_float32(const Tensor& scale) { return scale.dtype() == aoti_torch_dtype_float32(); }

// scale is float32, float16, bfloat16 or float8_e8m0fnu, of one value a block; zero_point has its shape and is int32,
// inside an integer format's range, or is kept as codes of the format are.
inline void check_scale(const char* op, const Tensor& scale, const std::optional<Tensor>& zero_point, const Format& f,
                        const Sizes& expected, Device device) {
  const int32_t dtype = scale.dtype();
  const bool narrow = dtype == aoti_torch_dtype_float16() || dtype == aoti_torch_dtype_bfloat16() || is_e8m0(scale);
  check_tensor(op, "scale", scale, {expected, narrow ? dtype : aoti_torch_dtype_float32()}, device);
  if (!zero_point) return;
  if (f.is_float) fail(op, "zero_point", std::string("None for ") + f.name, "a tensor");
  Result z = {expected, aoti_torch_dtype_int32()};
  if (zero_point->dtype() == f.dtype) z = {expected, f.dtype}, z.sizes.back() = f.columns(expected.back());
  check_tensor(op, "zero_point", *zero_point, z, device);
}

// Looking at values would make a device wait for the host, so only the CPU's are; a kernel clamps in any case.
inline void check_zero_point(const char* op, const char* argument, const int32_t* zero_point, int64_t n,
                             const Format& f) {
  int32_t lowest = 0, highest = 0;  // zero is inside every range
  for (int64_t i = 0; i < n; ++i) {
    lowest = std::min(lowest, zero_point[i]);
    highest = std::max(highest, zero_point[i]);
  }
  if (lowest < f.qmin || highest > f.qmax)
    fail(op, argument, "in " + std::to_string(f.qmin) + ".." + std::to_string(f.qmax),
         std::to_string(lowest < f.qmin ? lowest : highest));
}

// The shape of what `codes` stand for; `size` is K, which bytes that several codes share cannot tell.
inline Sizes check_size(const char* op, SizesView codes, const Format& f, std::optional<int64_t> size) {
  const int64_t last = codes.empty() ? 1 : codes.back(), K = last * f.per_byte;
  const int64_t least = std::max<int64_t>(K - f.per_byte + 1, 0);
  if (size && (*size < least || *size > K)) {
    std::string expected = std::to_string(least);
    for (int64_t n = least + 1; n <= K; ++n) expected += (n == K ? " or " : ", ") + std::to_string(n);
    fail(op, "size", expected, std::to_string(*size));
  }
  Sizes sizes = codes.vec();
  if (!f.packed()) return sizes;
  if (sizes.empty()) sizes.push_back(1);
  sizes.back() = size.value_or(K);
  return sizes;
}

// ---- the matmuls: quantlib/ops/weight.py and scaled_matmul.py -------------------------------------------------------

// K of x [..., K]
inline int64_t check_last_size(const char* op, const char* argument, const Tensor& x) {
  if (x.sizes().empty()) fail(op, argument, "[..., K]", described(x.sizes(), x.dtype(), x.device()));
  return x.sizes().back();
}

// N of codes [N, K] of the format
inline int64_t check_codes(const char* op, const Tensor& codes, const Format& f, int64_t K, Device device) {
  const int64_t columns = f.columns(K);
  if (codes.sizes().size() != 2 || codes.sizes()[1] != columns || codes.dtype() != f.dtype ||
      !(codes.device() == device))
    fail(op, "codes", name_of(f.dtype) + " [N, " + std::to_string(columns) + "] on " + text_of(device),
         described(codes.sizes(), codes.dtype(), codes.device()));
  return codes.sizes()[0];
}

inline Activation check_activation(const char* op, const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  const std::pair<const char*, Activation> all[] = {{"relu", Activation::relu},
                                                    {"gelu", Activation::gelu},
                                                    {"gelu_tanh", Activation::gelu_tanh},
                                                    {"silu", Activation::silu}};
  for (const auto& [known, activation] : all)
    if (*name == known) return activation;
  fail(op, "activation", "None, relu, gelu, gelu_tanh or silu", *name);
}

// An int32 holds the sum of as many products as share a scale.
inline void check_sum(const char* op, const Grid& weight, const Format& x_format, bool x_affine, const Format& f,
                      bool affine) {
  // the largest magnitude of a code less its zero point
  const auto widest = [](const Format& f, bool affine) { return affine ? f.qmax - f.qmin : std::max(-f.qmin, f.qmax); };
  const int most = INT32_MAX / (widest(x_format, x_affine) * widest(f, affine));
  const int64_t terms = std::min(weight.K, weight.bk);
  if (terms > most)
    fail(op, "K", "at most " + std::to_string(most) + ", so that an int32 holds the sum", std::to_string(terms));
}

}  // namespace quantlib
