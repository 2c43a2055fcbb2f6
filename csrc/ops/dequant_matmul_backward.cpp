// dx[m, k] = sum over n of dy[m, n] * w[n, k]
#include "dequant_matmul_backward.h"

#include "weight.h"

namespace quantlib {

QL_KERNEL(dequant_matmul_backward, DequantMatmulBackward)

static void dequant_matmul_backward(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dequant_matmul_backward";
  Arguments in(op, stack, results);
  Tensor dy = in.tensor("dy");
  WeightArguments w(in);
  w.zero_point = in.optional_tensor("zero_point");
  w.keeps_narrow_scales = Backend::takes_narrow_scales;
  w.keeps_zero_codes = Backend::takes_narrow_scales;
  const std::optional<int64_t> size = in.optional_size();
  auto out = in.out("out");

  const Format& dy_format = check_dtype(op, "dy", dy.dtype(), inputs);
  const Sizes row = {w.codes.sizes().size() == 2 ? w.codes.sizes()[1] : 0};
  const int64_t K = check_size(op, row, check_format(op, w.format_name, targets), size).back();
  const Weight weight = w.check(op, K, dy.device(), targets);
  if (check_last_size(op, "dy", dy) != weight.grid.M)
    fail(op, "dy", "[..., " + std::to_string(weight.grid.M) + "]", text_of(dy.sizes()));
  const int64_t M = rows_of(dy);
  Output dx(op, "out", std::move(out), product_of(dy, K, dy.dtype()), dy.device());
  dy.make_contiguous();
  void* data = dx.data({&dy, &w.codes, &w.scale, address(w.zero_point)});
  Backend backend(dy.device());
  if (M && K)
    backend.run(
        DequantMatmulBackward{.M = M, .dy = dy.data(), .dy_type = dy_format.type, .weight = weight, .dx = data});
  dx.finish(stack[0]);
}

QL_REGISTER("dequant_matmul_backward", dequant_matmul_backward)

}  // namespace quantlib
