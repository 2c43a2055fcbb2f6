// x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)
#include "dynamic_matmul.h"

#include "weight.h"

namespace quantlib {

QL_KERNEL(dynamic_matmul, DynamicMatmul)

static void dynamic_matmul(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dynamic_matmul";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  WeightArguments w(in);
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  auto out = in.out("out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Format& f = check_format("quantize_dynamic", "int8", targets);
  const int64_t K = check_last_size(op, "x", x), M = rows_of(x);
  const Weight weight = w.check(op, K, x.device(), integers);
  const int64_t N = weight.grid.M;
  check_sum(op, weight.grid, f, false, *w.format, w.zero_point.has_value());
  e.check(op, N, x.device());
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N) {
    const Sizes shape = {M, K}, rows = {M, 1};
    const Tensor x_codes = Tensor::empty(shape, f.dtype, x.device(), {op, "x"});
    const Tensor x_scale = Tensor::empty(rows, aoti_torch_dtype_float32(), x.device(), {op, "x"});
    backend.run(DynamicMatmul{.M = M,
                              .x = x.data(),
                              .x_type = x_format.type,
                              .weight = weight,
                              .epilogue = epilogue,
                              .x_codes = x_codes.data(),
                              .x_scale = static_cast<float*>(x_scale.data()),
                              .y = data});
  }
  y.finish(stack[0]);
}

QL_REGISTER("dynamic_matmul", dynamic_matmul)

}  // namespace quantlib
