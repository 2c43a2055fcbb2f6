// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), codes as they are or in tiles
#include "dequant_matmul.h"

#include "weight.h"

namespace quantlib {

QL_KERNEL(dequant_matmul, DequantMatmul)

constexpr int64_t kFewRows = 2;  // meet every scale once; for more, scales are widened once before

template <bool TILED>
static void dequant_matmul(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dequant_matmul";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  WeightArguments w(in, TILED ? "tiles" : "codes");
  const int64_t size = TILED ? in.size() : 0;
  w.zero_point = in.optional_tensor("zero_point");
  EpilogueArguments e(in);
  const bool batch_invariant = in.flag();
  auto out = in.out("out");

  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  if (TILED) check_format(op, w.format_name, in_tiles);
  const int64_t K = check_last_size(op, "x", x), M = rows_of(x);
  w.keeps_narrow_scales = Backend::takes_narrow_scales && M <= kFewRows;
  w.keeps_zero_codes = Backend::takes_narrow_scales;
  const Weight weight = TILED ? w.check_tiles(op, size, K, x.device()) : w.check(op, K, x.device(), targets);
  const int64_t N = weight.grid.M;
  e.check(op, N, x.device());
  Output y(op, "out", std::move(out), product_of(x, N, x.dtype()), x.device());
  x.make_contiguous();
  Backend backend(x.device());
  const Epilogue epilogue = e.on(op, backend);
  void* data = y.data({&x, &w.codes, &w.scale, address(w.zero_point), address(e.bias)});
  if (M && N)
    backend.run(DequantMatmul{.M = M,
                              .x = x.data(),
                              .x_type = x_format.type,
                              .weight = weight,
                              .epilogue = epilogue,
                              .batch_invariant = batch_invariant,
                              .y = data,
                              .tiled = TILED});
  y.finish(stack[0]);
}

QL_REGISTER("dequant_matmul", dequant_matmul<false>)
QL_IMPL(m) {
  if constexpr (Backend::takes_tiles) register_glue(m, "dequant_matmul.tiled", dequant_matmul<true>);
}

}  // namespace quantlib
