// dx[i, j] = inside ? dy[i, j] : 0, and what each block's scale and zero point get
#include "fake_quantize_backward.h"

#include "fake_quantize_arguments.h"

namespace quantlib {

QL_KERNEL(fake_quantize_backward, FakeQuantizeBackward)

template <bool AFFINE>
static void fake_quantize_backward(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "fake_quantize_backward";
  Arguments in(op, stack, results);
  Tensor dy = in.tensor("dy");
  FakeQuantizeArguments a(in);
  if constexpr (AFFINE) a.zero_point = in.tensor("zero_point");
  a.format_name = in.text(), a.block = in.sizes(), a.limits = in.optional_sizes();
  const bool lsq_mask = in.flag();
  const double grad_factor = in.number();
  auto dx_out = in.out("dx"), dscale_out = in.out("dscale"),
       dzero_point_out = AFFINE ? in.out("dzero_point") : std::nullopt;

  a.check(op);
  const Result like_x = {a.x.sizes().vec(), a.x.dtype()}, like_scale = {a.scale.sizes().vec(), a.scale.dtype()};
  check_tensor(op, "dy", dy, like_x, a.x.device());
  Output dx(op, "dx", std::move(dx_out), like_x, a.x.device());
  Output dscale(op, "dscale", std::move(dscale_out), like_scale, a.x.device());
  Output dzero_point(op, "dzero_point", std::move(dzero_point_out), like_scale, a.x.device());
  dscale.apart_from(dx);
  dzero_point.apart_from(dx);
  dzero_point.apart_from(dscale);
  dy.make_contiguous();
  const std::initializer_list<const Tensor*> read = {&dy, &a.x, &a.scale, address(a.zero_point)};
  void* data = dx.data(read);
  auto* ds = dscale.data<float>(read);
  auto* dz = AFFINE ? dzero_point.data<float>(read) : nullptr;
  const Sizes partials = {2, Backend::reads_values ? 0 : kPartials};
  const Tensor partial = Tensor::empty(partials, aoti_torch_dtype_float32(), a.x.device(), {op, "x"});
  Backend backend(a.x.device());
  if (a.x.numel())
    backend.run(FakeQuantizeBackward{.grid = a.grid,
                                     .dy = dy.data(),
                                     .x = a.x.data(),
                                     .x_type = a.x_type,
                                     .format = a.format->type,
                                     .scale = a.scales(),
                                     .zero_point = a.zero_points(),
                                     .qmin = int32_t(a.qmin()),
                                     .qmax = int32_t(a.qmax()),
                                     .lsq_mask = lsq_mask,
                                     .grad_factor = float(grad_factor),
                                     .dx = data,
                                     .dscale = ds,
                                     .dzero_point = dz,
                                     .partial = static_cast<float*>(partial.data())});
  dx.finish(stack[0]);
  dscale.finish(stack[1]);
  if constexpr (AFFINE) dzero_point.finish(stack[2]);
}

QL_REGISTER("fake_quantize_backward", fake_quantize_backward<false>)
QL_REGISTER("fake_quantize_backward.affine", fake_quantize_backward<true>)

}  // namespace quantlib
