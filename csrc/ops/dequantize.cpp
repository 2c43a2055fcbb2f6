// y[i, j] = decode(codes[i, j]) * scale[i / br, j / bk]
#include "dequantize.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(dequantize, Dequantize)

static void dequantize(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dequantize";
  Arguments in(op, stack, results);
  Tensor codes = in.tensor("codes"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point");
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  const std::optional<int64_t> size = in.optional_size();
  auto out = in.out("out");

  const Format& f = check_format(op, format, targets);
  if (codes.dtype() != f.dtype) fail(op, "codes", name_of(f.dtype), name_of(codes.dtype()));
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Sizes sizes = check_size(op, codes.sizes(), f, size);
  const Grid grid = check_block(op, sizes, block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), codes.device());
  Output y(op, "out", std::move(out), {sizes, dtype}, codes.device());
  codes.make_contiguous();
  const float* s = scales(op, scale);
  const int32_t* z = zero_points(op, zero_point, f, grid.scale_cols());
  void* data = y.data({&codes, &scale, address(zero_point)});
  Backend backend(codes.device());
  if (grid.M && grid.K)
    backend.run(Dequantize{.grid = grid,
                           .codes = codes.data(),
                           .format = f.type,
                           .scale = s,
                           .zero_point = z,
                           .y = data,
                           .y_type = y_format.type});
  y.finish(stack[0]);
}

QL_REGISTER("dequantize", dequantize)

}  // namespace quantlib
