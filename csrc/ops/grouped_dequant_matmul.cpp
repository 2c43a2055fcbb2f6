// y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to
#include "grouped_dequant_matmul.h"

#include "experts.h"

namespace quantlib {

QL_KERNEL(grouped_dequant_matmul, GroupedDequantMatmul)

static void grouped_dequant_matmul(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "grouped_dequant_matmul";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  ExpertArguments w(in);
  EpilogueArguments e(in);
  const bool batch_invariant = in.flag();
  auto out = in.out("out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  w.keeps_narrow_scales = Backend::takes_narrow_scales;
  w.keeps_zero_codes = Backend::takes_narrow_scales;
  const Weight weight = w.check(op, "x", x, check_last_size(op, "x", x), targets);
  const int64_t N = weight.grid.M;
  e.check(op, N, x.device(), w.groups.E);
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, &w.offsets, address(w.zero_point), address(e.bias)});
  if (w.groups.T && N)
    backend.run(GroupedDequantMatmul{{.M = w.groups.T,
                                      .x = x.data(),
                                      .x_type = x_format.type,
                                      .weight = weight,
                                      .epilogue = epilogue,
                                      .batch_invariant = batch_invariant,
                                      .y = data},
                                     w.groups});
  y.finish(stack[0]);
}

QL_REGISTER("grouped_dequant_matmul", grouped_dequant_matmul)

}  // namespace quantlib
