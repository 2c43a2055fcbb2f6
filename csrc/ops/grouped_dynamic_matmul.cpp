// y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to
#include "grouped_dynamic_matmul.h"

#include "experts.h"

namespace quantlib {

QL_KERNEL(grouped_dynamic_matmul, GroupedDynamicMatmul)

static void grouped_dynamic_matmul(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "grouped_dynamic_matmul";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  ExpertArguments w(in);
  EpilogueArguments e(in);
  auto out = in.out("out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Format& f = check_format("quantize_dynamic", "int8", targets);
  const int64_t K = check_last_size(op, "x", x);
  const Weight weight = w.check(op, "x", x, K, integers);
  const int64_t N = weight.grid.M, T = w.groups.T;
  check_sum(op, weight.grid, f, false, *w.format, w.zero_point.has_value());
  e.check(op, N, x.device(), w.groups.E);
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, &w.offsets, address(w.zero_point), address(e.bias)});
  if (T && N) {
    const Sizes shape = {T, K}, rows = {T, 1};
    const Tensor x_codes = Tensor::empty(shape, f.dtype, x.device(), {op, "x"});
    const Tensor x_scale = Tensor::empty(rows, aoti_torch_dtype_float32(), x.device(), {op, "x"});
    backend.run(GroupedDynamicMatmul{{.M = T,
                                      .x = x.data(),
                                      .x_type = x_format.type,
                                      .weight = weight,
                                      .epilogue = epilogue,
                                      .x_codes = x_codes.data(),
                                      .x_scale = static_cast<float*>(x_scale.data()),
                                      .y = data},
                                     w.groups});
  }
  y.finish(stack[0]);
}

QL_REGISTER("grouped_dynamic_matmul", grouped_dynamic_matmul)

}  // namespace quantlib
