// y[i, j] = c * scale[i / br, j / bk], c the code of x[i, j] less its zero point
#include "fake_quantize.h"

#include "fake_quantize_arguments.h"

namespace quantlib {

QL_KERNEL(fake_quantize, FakeQuantize)

static void fake_quantize(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "fake_quantize";
  Arguments in(op, stack, results);
  FakeQuantizeArguments a(in);
  a.format_name = in.text(), a.block = in.sizes();
  a.zero_point = in.optional_tensor("zero_point"), a.limits = in.optional_sizes();
  in.flag(), in.number();  // of the gradient
  auto out = in.out("out");

  a.check(op);
  Output y(op, "out", std::move(out), {a.x.sizes().vec(), a.x.dtype()}, a.x.device());
  void* data = y.data({&a.x, &a.scale, address(a.zero_point)});
  Backend backend(a.x.device());
  if (a.x.numel())
    backend.run(FakeQuantize{.grid = a.grid,
                             .x = a.x.data(),
                             .x_type = a.x_type,
                             .format = a.format->type,
                             .scale = a.scales(),
                             .zero_point = a.zero_points(),
                             .qmin = int32_t(a.qmin()),
                             .qmax = int32_t(a.qmax()),
                             .y = data});
  y.finish(stack[0]);
}

QL_REGISTER("fake_quantize", fake_quantize)

}  // namespace quantlib
