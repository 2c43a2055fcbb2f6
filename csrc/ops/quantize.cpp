// codes[i, j] = encode(x[i, j] / scale[i / br, j / bk])
#include "quantize.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(quantize, Quantize)

static void quantize(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "quantize";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point"), out = in.out("out");

  const Format& f = check_format(op, format, targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), x.device());
  Output codes(op, "out", std::move(out), codes_of(x, grid, f), x.device());
  x.make_contiguous();
  const float* s = scales(op, scale);
  const int32_t* z = zero_points(op, zero_point, f, grid.scale_cols());
  void* data = codes.data({&x, &scale, address(zero_point)});
  Backend backend(x.device());
  if (x.numel())
    backend.run(Quantize{.grid = grid,
                         .x = x.data(),
                         .x_type = x_format.type,
                         .format = f.type,
                         .scale = s,
                         .zero_point = z,
                         .codes = data});
  codes.finish(stack[0]);
}

QL_REGISTER("quantize", quantize)

}  // namespace quantlib
