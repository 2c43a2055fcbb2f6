// dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to
#include "grouped_dequant_matmul_backward.h"

#include "experts.h"

namespace quantlib {

QL_KERNEL(grouped_dequant_matmul_backward, GroupedDequantMatmulBackward)

static void grouped_dequant_matmul_backward(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "grouped_dequant_matmul_backward";
  Arguments in(op, stack, results);
  Tensor dy = in.tensor("dy");
  ExpertArguments w(in);
  const std::optional<int64_t> size = in.optional_size();
  auto out = in.out("out");

  const Format& dy_format = check_dtype(op, "dy", dy.dtype(), inputs);
  w.keeps_narrow_scales = Backend::takes_narrow_scales;
  w.keeps_zero_codes = Backend::takes_narrow_scales;
  const Sizes row = {w.codes.sizes().size() == 3 ? w.codes.sizes()[2] : 0};
  const int64_t K = check_size(op, row, check_format(op, w.format_name, targets), size).back();
  const Weight weight = w.check(op, "dy", dy, K, targets);
  if (check_last_size(op, "dy", dy) != weight.grid.M)
    fail(op, "dy", "[T, " + std::to_string(weight.grid.M) + "]", text_of(dy.sizes()));
  Output dx(op, "out", std::move(out), product_of(dy, K, dy.dtype()), dy.device());
  dy.make_contiguous();
  void* data = dx.data({&dy, &w.codes, &w.scale, &w.offsets, address(w.zero_point)});
  Backend backend(dy.device());
  if (w.groups.T && K)
    backend.run(GroupedDequantMatmulBackward{
        {.M = w.groups.T, .dy = dy.data(), .dy_type = dy_format.type, .weight = weight, .dx = data}, w.groups});
  dx.finish(stack[0]);
}

QL_REGISTER("grouped_dequant_matmul_backward", grouped_dequant_matmul_backward)

}  // namespace quantlib
