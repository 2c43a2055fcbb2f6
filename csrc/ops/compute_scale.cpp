// scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or scale and zero_point of its range
#include "compute_scale.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(compute_scale, ComputeScale)

template <bool AFFINE>
static void compute_scale(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "compute_scale";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  const char* name = in.has_outs() && !AFFINE ? "out" : "scale";
  auto scale_out = in.out(name), zero_point_out = AFFINE ? in.out("zero_point") : std::nullopt;

  const Format& f = check_format(op, format, AFFINE ? integers : targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  Output scale(op, name, std::move(scale_out), scale_of(grid), x.device());
  Output zero_point(op, "zero_point", std::move(zero_point_out), zero_point_of(grid), x.device());
  zero_point.apart_from(scale);
  x.make_contiguous();
  auto* s = scale.data<float>({&x});
  auto* z = AFFINE ? zero_point.data<int32_t>({&x}) : nullptr;
  Backend backend(x.device());
  if (x.numel())
    backend.run(ComputeScale{
        .grid = grid, .x = x.data(), .x_type = x_format.type, .format = f.type, .scale = s, .zero_point = z});
  scale.finish(stack[0]);
  if constexpr (AFFINE) zero_point.finish(stack[1]);
}

QL_REGISTER("compute_scale", compute_scale<false>)
QL_REGISTER("compute_scale.affine", compute_scale<true>)

}  // namespace quantlib
