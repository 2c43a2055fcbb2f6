// From a call of torch to a problem for a device, for the matmuls: see ops.h.
#pragma once
#include "ops.h"

namespace quantlib {

inline const Tensor* address(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }

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

  explicit WeightArguments(Arguments& in, const char* name_of_codes = "codes")
      : codes(in.tensor(name_of_codes)), scale(in.tensor("scale")), format_name(in.text()), block(in.sizes()) {}

  // [N, K] on `device`, checked, contiguous, its block clamped to it
  template <class Backend>
  Weight check(const char* op, int64_t K, Device device, Accepts accepted) {
    format = &check_format(op, format_name, accepted);
    return check_scales<Backend>(op, check_codes(op, codes, *format, K, device), K, device);
  }
  // The same where codes are tiles, which do not tell N.
  template <class Backend>
  Weight check_tiles(const char* op, int64_t N, int64_t K, Device device) {
    const int64_t columns = 64 * format->per_byte;
    check_tensor(op, "tiles", codes, {{ceil_div(N, 16), ceil_div(K, columns), 1024}, aoti_torch_dtype_uint8()}, device);
    return check_scales<Backend>(op, N, K, device);
  }

 private:
  static int64_t ceil_div(int64_t n, int64_t d) { return n / d + (n % d > 0); }

  template <class Backend>
  Weight check_scales(const char* op, int64_t N, int64_t K, Device device) {
    const Sizes shape = {N, K};
    Grid grid = check_block(op, shape, block);
    check_scale(op, scale, zero_point, *format, scale_sizes(grid), device);
    const float* s = scales<Backend>(op, scale);
    const int32_t* z = zero_points<Backend>(op, zero_point, *format);
    grid.br = std::min(grid.br, std::max<int64_t>(N, 1)), grid.bk = std::min(grid.bk, std::max<int64_t>(K, 1));
    codes.make_contiguous();
    return {grid, codes.data(), format->type, s, z};
  }
};

// The arguments that say what follows a sum.
struct EpilogueArguments {
  std::optional<Tensor> bias;
  const std::optional<std::string> name;
  Activation activation = Activation::none;

  explicit EpilogueArguments(Arguments& in) : bias(in.optional_tensor("bias")), name(in.optional_text()) {}

  void check(const char* op, int64_t N, Device device) {
    if (bias) {
      check_dtype(op, "bias", bias->dtype(), inputs);
      check_tensor(op, "bias", *bias, {{N}, bias->dtype()}, device);
    }
    activation = check_activation(op, name);
  }

  // The bias as kernels add it: float32, which every float is exactly.
  template <class Backend>
  Epilogue on(const char* op, const Backend& backend) {
    if (!bias) return {nullptr, activation};
    bias->make_contiguous();
    if (bias->dtype() != aoti_torch_dtype_float32()) {
      Tensor wide = Tensor::empty(bias->sizes(), aoti_torch_dtype_float32(), bias->device(), {op, "bias"});
      const Type type = check_dtype(op, "bias", bias->dtype(), inputs).type;
      if (bias->numel()) backend.cast({bias->data(), type, wide.data(), Type::float32, bias->numel(), false});
      bias = std::move(wide);
    }
    return {static_cast<const float*>(bias->data()), activation};
  }
};

// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), codes as they are or in tiles
template <class Backend, bool OUT, bool TILED>
void dequant_matmul(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "dequant_matmul";
  Arguments in(op, stack);
  Tensor x = in.tensor("x");
  WeightArguments w(in, TILED ? "tiles" : "codes");
  const int64_t size = TILED ? in.size() : 0;
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  const bool batch_invariant = in.flag();
  auto out = take_out<OUT>(in, "out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  if constexpr (TILED) w.format = &check_format(op, w.format_name, in_tiles);
  const int64_t K = check_last_size(op, "x", x), M = rows_of(x);
  const Weight weight =
      TILED ? w.check_tiles<Backend>(op, size, K, x.device()) : w.check<Backend>(op, K, x.device(), targets);
  const int64_t N = weight.grid.M;
  e.check(op, N, x.device());
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  const Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N) backend.dequant_matmul({M, x.data(), x_format.type, weight, epilogue, batch_invariant, data, TILED});
  y.finish(stack[0]);
}

// dx[m, k] = sum over n of dy[m, n] * w[n, k]
template <class Backend, bool OUT>
void dequant_matmul_backward(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "dequant_matmul_backward";
  Arguments in(op, stack);
  Tensor dy = in.tensor("dy");
  WeightArguments w(in);
  w.zero_point = in.optional_tensor("zero_point");
  const std::optional<int64_t> size = in.optional_size();
  auto out = take_out<OUT>(in, "out");

  const Format& dy_format = check_dtype(op, "dy", dy.dtype(), inputs);
  const Sizes row = {w.codes.sizes().size() == 2 ? w.codes.sizes()[1] : 0};
  const int64_t K = check_size(op, row, check_format(op, w.format_name, targets), size).back();
  const Weight weight = w.check<Backend>(op, K, dy.device(), targets);
  if (check_last_size(op, "dy", dy) != weight.grid.M)
    fail(op, "dy", "[..., " + std::to_string(weight.grid.M) + "]", text_of(dy.sizes()));
  const int64_t M = rows_of(dy);
  Output dx(op, "out", std::move(out), product_of(dy, K, dy.dtype()), dy.device());
  dy.make_contiguous();
  void* data = dx.data({&dy, &w.codes, &w.scale, address(w.zero_point)});
  if (M && K) Backend(dy.device()).dequant_matmul_backward({M, dy.data(), dy_format.type, weight, data});
  dx.finish(stack[0]);
}

// y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes
template <class Backend, bool OUT>
void scaled_matmul(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "scaled_matmul";
  Arguments in(op, stack);
  Tensor x_codes = in.tensor("x_codes"), x_scale = in.tensor("x_scale");
  WeightArguments w(in);
  auto x_zero_point = in.optional_tensor("x_zero_point");
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  auto out = take_out<OUT>(in, "out");

  const Format& x_format = check_dtype(op, "x_codes", x_codes.dtype(), bytes);
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Device device = x_codes.device();
  const int64_t K = check_last_size(op, "x_codes", x_codes), M = rows_of(x_codes);
  const Weight weight = w.check<Backend>(op, K, device, integers);
  const int64_t N = weight.grid.M;
  const Sizes per_row = {M, 1}, one = {1, 1};
  const bool x_per_row = x_scale.sizes().equals(per_row);
  if (!x_per_row && !x_scale.sizes().equals(one))
    fail(op, "x_scale", "float32 " + text_of(per_row) + " or [1, 1] on " + text_of(device),
         described(x_scale.sizes(), x_scale.dtype(), x_scale.device()));
  check_tensor(op, "x_scale", x_scale, {x_scale.sizes().vec(), aoti_torch_dtype_float32()}, device);
  if (x_zero_point)
    check_tensor(op, "x_zero_point", *x_zero_point, {x_scale.sizes().vec(), aoti_torch_dtype_int32()}, device);
  const float* x_s = scales<Backend>(op, x_scale, "x_scale");
  const int32_t* x_z = zero_points<Backend>(op, x_zero_point, x_format, "x_zero_point");
  check_sum(op, weight.grid, x_format, x_zero_point.has_value(), *w.format, w.zero_point.has_value());
  e.check(op, N, device);
  Output y(op, "out", std::move(out), product_of(x_codes, N, dtype), device);
  x_codes.make_contiguous();
  const Backend backend(device);
  const Epilogue epilogue = e.on(op, backend);
  void* data =
      y.data({&x_codes, &x_scale, address(x_zero_point), &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N)
    backend.scaled_matmul(
        {M, x_codes.data(), x_format.type, x_s, x_z, x_per_row, weight, epilogue, data, y_format.type});
  y.finish(stack[0]);
}

// x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)
template <class Backend, bool OUT>
void dynamic_matmul(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "dynamic_matmul";
  Arguments in(op, stack);
  Tensor x = in.tensor("x");
  WeightArguments w(in);
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  auto out = take_out<OUT>(in, "out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Format& f = check_format("quantize_dynamic", "int8", targets);
  const int64_t K = check_last_size(op, "x", x), M = rows_of(x);
  const Weight weight = w.check<Backend>(op, K, x.device(), integers);
  const int64_t N = weight.grid.M;
  check_sum(op, weight.grid, f, false, *w.format, w.zero_point.has_value());
  e.check(op, N, x.device());
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  const Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N) {
    const Sizes shape = {M, K}, rows = {M, 1};
    const Tensor x_codes = Tensor::empty(shape, f.dtype, x.device(), {op, "x"});
    const Tensor x_scale = Tensor::empty(rows, aoti_torch_dtype_float32(), x.device(), {op, "x"});
    auto* s = static_cast<float*>(x_scale.data());
    if (K) backend.quantize_dynamic({{M, K, 1, K}, x.data(), x_format.type, f.type, x_codes.data(), s, nullptr});
    else x_scale.fill_with_zeros();  // any finite scale will do
    backend.scaled_matmul({M, x_codes.data(), f.type, s, nullptr, true, weight, epilogue, data, x_format.type});
  }
  y.finish(stack[0]);
}

template <class Backend>
void register_dequant_matmuls(torch::stable::detail::StableLibrary& m) {
  m.impl("dequant_matmul", dequant_matmul<Backend, false, false>);
  m.impl("dequant_matmul.out", dequant_matmul<Backend, true, false>);
  m.impl("dequant_matmul_backward", dequant_matmul_backward<Backend, false>);
  m.impl("dequant_matmul_backward.out", dequant_matmul_backward<Backend, true>);
}

template <class Backend>
void register_tiled_matmul(torch::stable::detail::StableLibrary& m) {
  m.impl("dequant_matmul.tiled", dequant_matmul<Backend, false, true>);
  m.impl("dequant_matmul.tiled_out", dequant_matmul<Backend, true, true>);
}

template <class Backend>
void register_scaled_matmuls(torch::stable::detail::StableLibrary& m) {
  m.impl("scaled_matmul", scaled_matmul<Backend, false>);
  m.impl("scaled_matmul.out", scaled_matmul<Backend, true>);
  m.impl("dynamic_matmul", dynamic_matmul<Backend, false>);
  m.impl("dynamic_matmul.out", dynamic_matmul<Backend, true>);
}

}  // namespace quantlib
