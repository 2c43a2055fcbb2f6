// y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes
#include "scaled_matmul.h"

#include "weight.h"

namespace quantlib {

QL_KERNEL(scaled_matmul, ScaledMatmul)

static void scaled_matmul(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "scaled_matmul";
  Arguments in(op, stack, results);
  Tensor x_codes = in.tensor("x_codes"), x_scale = in.tensor("x_scale");
  WeightArguments w(in);
  auto x_zero_point = in.optional_tensor("x_zero_point");
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  auto out = in.out("out");

  const Format& x_format = check_dtype(op, "x_codes", x_codes.dtype(), bytes);
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Device device = x_codes.device();
  const int64_t K = check_last_size(op, "x_codes", x_codes), M = rows_of(x_codes);
  const Weight weight = w.check(op, K, device, integers);
  const int64_t N = weight.grid.M;
  const Sizes per_row = {M, 1}, one = {1, 1};
  const bool x_per_row = x_scale.sizes().equals(per_row);
  if (!x_per_row && !x_scale.sizes().equals(one))
    fail(op, "x_scale", "float32 " + text_of(per_row) + " or [1, 1] on " + text_of(device),
         described(x_scale.sizes(), x_scale.dtype(), x_scale.device()));
  check_tensor(op, "x_scale", x_scale, {x_scale.sizes().vec(), aoti_torch_dtype_float32()}, device);
  if (x_zero_point)
    check_tensor(op, "x_zero_point", *x_zero_point, {x_scale.sizes().vec(), aoti_torch_dtype_int32()}, device);
  const float* x_s = scales(op, x_scale, "x_scale");
  const int32_t* x_z = zero_points(op, x_zero_point, x_format, x_scale.sizes().back(), "x_zero_point");
  check_sum(op, weight.grid, x_format, x_zero_point.has_value(), *w.format, w.zero_point.has_value());
  e.check(op, N, device);
  Output y(op, "out", std::move(out), product_of(x_codes, N, dtype), device);
  x_codes.make_contiguous();
  Backend backend(device);
  const Epilogue epilogue = e.on(op, backend);
  void* data =
      y.data({&x_codes, &x_scale, address(x_zero_point), &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N)
    backend.run(ScaledMatmul{.M = M,
                             .x_codes = x_codes.data(),
                             .x_format = x_format.type,
                             .x_scale = x_s,
                             .x_zero_point = x_z,
                             .x_per_row = x_per_row,
                             .weight = weight,
                             .epilogue = epilogue,
                             .y = data,
                             .y_type = y_format.type});
  y.finish(stack[0]);
}

QL_REGISTER("scaled_matmul", scaled_matmul)

}  // namespace quantlib
