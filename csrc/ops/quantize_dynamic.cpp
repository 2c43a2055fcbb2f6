// scale = compute_scale(x), codes = quantize(x, scale), in one pass over x
#include "quantize_dynamic.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(quantize_dynamic, QuantizeDynamic)

template <bool AFFINE>
static void quantize_dynamic(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "quantize_dynamic";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto codes_out = in.out("codes"), scale_out = in.out("scale"),
       zero_point_out = AFFINE ? in.out("zero_point") : std::nullopt;

  const Format& f = check_format(op, format, AFFINE ? integers : targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  Output codes(op, "codes", std::move(codes_out), codes_of(x, grid, f), x.device());
  Output scale(op, "scale", std::move(scale_out), scale_of(grid), x.device());
  Output zero_point(op, "zero_point", std::move(zero_point_out), zero_point_of(grid), x.device());
  scale.apart_from(codes);
  zero_point.apart_from(codes);
  zero_point.apart_from(scale);
  x.make_contiguous();
  void* data = codes.data({&x});
  auto* s = scale.data<float>({&x});
  auto* z = AFFINE ? zero_point.data<int32_t>({&x}) : nullptr;
  Backend backend(x.device());
  if (x.numel())
    backend.run(QuantizeDynamic{.grid = grid,
                                .x = x.data(),
                                .x_type = x_format.type,
                                .format = f.type,
                                .codes = data,
                                .scale = s,
                                .zero_point = z});
  codes.finish(stack[0]);
  scale.finish(stack[1]);
  if constexpr (AFFINE) zero_point.finish(stack[2]);
}

QL_REGISTER("quantize_dynamic", quantize_dynamic<false>)
QL_REGISTER("quantize_dynamic.affine", quantize_dynamic<true>)

}  // namespace quantlib
