// Glue of the matmuls: the arguments that make a weight, and those that say what follows a sum.
#pragma once
#include "../glue.h"

namespace quantlib {

// x [..., K] -> y [..., N]
inline Result product_of(const Tensor& x, int64_t N, int32_t dtype) {
  Result y = {x.sizes().vec(), dtype};
  y.sizes.back() = N;
  return y;
}

// M of x [..., K]: what stands before K, where any of it may be 0
inline int64_t rows_of(const Tensor& x) { return product(x.sizes().begin(), x.sizes().end() - 1); }

// The arguments that make a weight.
struct WeightArguments {
  Tensor codes, scale;
  const std::string format_name;
  const Sizes block;
  std::optional<Tensor> zero_point;  // elsewhere in the schema
  const Format* format = nullptr;
  bool keeps_narrow_scales = false, keeps_zero_codes = false;  // whether the kernels that are called take them

  explicit WeightArguments(Arguments& in, const char* name_of_codes = "codes")
      : codes(in.tensor(name_of_codes)), scale(in.tensor("scale")), format_name(in.text()), block(in.sizes()) {}

  // [N, K] on `device`, checked, contiguous, its block clamped to it
  Weight check(const char* op, int64_t K, Device device, Accepts accepted) {
    format = &check_format(op, format_name, accepted);
    return check_scales(op, check_codes(op, codes, *format, K, device), K, device);
  }
  // The same where codes are tiles, which do not tell N.
  Weight check_tiles(const char* op, int64_t N, int64_t K, Device device) {
    format = &check_format(op, format_name, in_tiles);
    const int64_t columns = 64 * format->per_byte;
    check_tensor(op, "tiles", codes, {{ceil_div(N, 16), ceil_div(K, columns), 1024}, aoti_torch_dtype_uint8()}, device);
    return check_scales(op, N, K, device);
  }

 private:
  static int64_t ceil_div(int64_t n, int64_t d) { return n / d + (n % d > 0); }

  Weight check_scales(const char* op, int64_t N, int64_t K, Device device) {
    const Sizes shape = {N, K};
    Grid grid = check_block(op, shape, block);
    check_scale(op, scale, zero_point, *format, scale_sizes(grid), device);
    const bool narrow = keeps_narrow_scales && !is_float32(scale);
    const float* s = narrow ? nullptr : scales(op, scale);
    const bool packed = has_zero_codes();
    const int32_t* z = packed ? nullptr : zero_points(op, zero_point, *format, grid.scale_cols());
    grid.br = std::min(grid.br, std::max<int64_t>(N, 1)), grid.bk = std::min(grid.bk, std::max<int64_t>(K, 1));
    codes.make_contiguous();
    Weight weight = {.grid = grid, .codes = codes.data(), .format = format->type, .scale = s, .zero_point = z};
    if (packed) keep_zero_codes(weight);
    if (narrow) {
      keep_scale(weight);
    }
    return weight;
  }

 protected:
  // Take scales in fewer bits, and zero points as codes, as they are.
  void keep_scale(Weight& weight) {
    scale.make_contiguous();
    weight.narrow_type = is_e8m0(scale)                                 ? NarrowScale::e8m0
                         : scale.dtype() == aoti_torch_dtype_bfloat16() ? NarrowScale::bfloat16
                                                                        : NarrowScale::float16;
    weight.narrow_scale = scale.data();
  }
  bool has_zero_codes() const {
    return keeps_zero_codes && zero_point && zero_point->dtype() != aoti_torch_dtype_int32();
  }
  void keep_zero_codes(Weight& weight) {
    zero_point->make_contiguous();
    weight.zero_codes = static_cast<const uint8_t*>(zero_point->data());
  }
};

// The arguments that say what follows a sum.
struct EpilogueArguments {
  std::optional<Tensor> bias;
  const std::optional<std::string> name;
  Activation activation = Activation::none;

  explicit EpilogueArguments(Arguments& in) : bias(in.optional_tensor("bias")), name(in.optional_text()) {}

  // bias is [N], or [E, N] of E experts
  void check(const char* op, int64_t N, Device device, std::optional<int64_t> E = std::nullopt) {
    if (bias) {
      check_dtype(op, "bias", bias->dtype(), inputs);
      check_tensor(op, "bias", *bias, {E ? Sizes{*E, N} : Sizes{N}, bias->dtype()}, device);
    }
    activation = check_activation(op, name);
  }

  // The bias as kernels add it: float32, which every float is exactly.
  Epilogue on(const char* op, Backend& backend) {
    if (!bias) return {nullptr, activation};
    bias->make_contiguous();
    if (bias->dtype() != aoti_torch_dtype_float32()) {
      Tensor wide = Tensor::empty(bias->sizes(), aoti_torch_dtype_float32(), bias->device(), {op, "bias"});
      const Type type = check_dtype(op, "bias", bias->dtype(), inputs).type;
      const int64_t n = bias->numel();
      if (n) backend.run(Cast{bias->data(), type, wide.data(), Type::float32, n, false});
      bias = std::move(wide);
    }
    return {static_cast<const float*>(bias->data()), activation};
  }
};

}  // namespace quantlib
