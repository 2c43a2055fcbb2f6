// y[...] = encode(decode(x[...]))
#include "../glue.h"

namespace quantlib {

static void cast(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "cast";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const bool saturate = in.flag();
  auto out = in.out("out");

  const Format& f = check_format(op, format, casts);
  const Format& x_format = check_dtype(op, "x", x.dtype(), casts);
  Output y(op, "out", std::move(out), {x.sizes().vec(), f.dtype}, x.device());
  x.make_contiguous();
  void* data = y.data({&x});
  Backend backend(x.device());
  if (x.numel())
    backend.run(Cast{
        .x = x.data(), .x_type = x_format.type, .y = data, .y_type = f.type, .n = x.numel(), .saturate = saturate});
  y.finish(stack[0]);
}

QL_REGISTER("cast", cast)

}  // namespace quantlib
