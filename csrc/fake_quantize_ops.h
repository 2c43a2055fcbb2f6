// From a call of torch to a problem for a device, for fake_quantize and its gradient: see ops.h.
#pragma once
#include "ops.h"

namespace quantlib {

// What forward and backward are given alike, in the order in which Python checks it: quantlib/ops/fake_quantize.py.
struct FakeQuantizeArguments {
  static constexpr int kWidest = 1 << 16;  // codes: so few that t, clamped to one beyond them, rounds exactly

  Tensor x, scale;
  std::optional<Tensor> zero_point;
  std::string format_name;
  Sizes block;
  std::optional<Sizes> limits;
  const Format* format = nullptr;
  Type x_type = Type::float32;
  Grid grid = {};

  template <class Backend>
  void check(const char* op) {
    format = &check_format(op, format_name, targets);
    x_type = check_dtype(op, "x", x.dtype(), inputs).type;
    grid = check_block(op, x.sizes(), block);
    const Result expected = {scale_sizes(grid), aoti_torch_dtype_float32()};
    check_tensor(op, "scale", scale, expected, x.device());
    scale.make_contiguous();
    if constexpr (Backend::reads_values) check_positive(op);
    if (format->is_float && zero_point) fail(op, "zero_point", std::string("None for ") + format->name, "a value");
    if (format->is_float && limits) fail(op, "limits", std::string("None for ") + format->name, "a value");
    if (zero_point) {
      check_tensor(op, "zero_point", *zero_point, expected, x.device());
      zero_point->make_contiguous();
    }
    if (limits && !(limits->size() == 2 && -kWidest <= qmin() && qmin() <= 0 && 0 < qmax() && qmax() <= kWidest))
      fail(op, "limits", "qmin <= 0 < qmax inside " + std::to_string(-kWidest) + ".." + std::to_string(kWidest),
           text_of(*limits));
    x.make_contiguous();
  }
  int64_t qmin() const {
    return limits ? (*limits)[0] : zero_point ? format->qmin : std::max(format->qmin, -format->qmax);
  }
  int64_t qmax() const { return limits ? (*limits)[1] : format->qmax; }
  const float* scales() const { return static_cast<const float*>(scale.data()); }
  const float* zero_points() const { return zero_point ? static_cast<const float*>(zero_point->data()) : nullptr; }

 private:
  void check_positive(const char* op) const {
    const int64_t n = scale.numel();
    const float* s = n ? scales() : nullptr;
    float least = n ? s[0] : 1.0f;
    for (int64_t k = 1; k < n; ++k) least = least <= s[k] ? least : least != least ? least : s[k];
    if (!(least > 0)) fail(op, "scale", "above 0", text_of(double(least)));
  }
};

// y[i, j] = c * scale[i / br, j / bk], c the code of x[i, j] less its zero point
template <class Backend, bool OUT>
void fake_quantize(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "fake_quantize";
  Arguments in(op, stack);
  Tensor x = in.tensor("x"), scale = in.tensor("scale");
  std::string format = in.text();
  Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point");
  FakeQuantizeArguments a{std::move(x),      std::move(scale), std::move(zero_point),
                          std::move(format), std::move(block), in.optional_sizes()};
  in.flag(), in.number();  // of the gradient
  auto out = take_out<OUT>(in, "out");

  a.check<Backend>(op);
  Output y(op, "out", std::move(out), {a.x.sizes().vec(), a.x.dtype()}, a.x.device());
  void* data = y.data({&a.x, &a.scale, a.zero_point ? &*a.zero_point : nullptr});
  if (a.x.numel())
    Backend(a.x.device())
        .fake_quantize({a.grid, a.x.data(), a.x_type, a.format->type, a.scales(), a.zero_points(), int32_t(a.qmin()),
                        int32_t(a.qmax()), data});
  y.finish(stack[0]);
}

// dx[i, j] = inside ? dy[i, j] : 0, and what each block's scale and zero point get
template <class Backend, bool OUT, bool AFFINE>
void fake_quantize_backward(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "fake_quantize_backward";
  Arguments in(op, stack);
  Tensor dy = in.tensor("dy"), x = in.tensor("x"), scale = in.tensor("scale");
  std::optional<Tensor> zero_point;
  if constexpr (AFFINE) zero_point = in.tensor("zero_point");
  std::string format = in.text();
  Sizes block = in.sizes();
  FakeQuantizeArguments a{std::move(x),      std::move(scale), std::move(zero_point),
                          std::move(format), std::move(block), in.optional_sizes()};
  const bool lsq_mask = in.flag();
  const double grad_factor = in.number();
  auto dx_out = take_out<OUT>(in, "dx"), dscale_out = take_out<OUT>(in, "dscale"),
       dzero_point_out = take_out<(OUT && AFFINE)>(in, "dzero_point");

  a.check<Backend>(op);
  const Result like_x = {a.x.sizes().vec(), a.x.dtype()}, like_scale = {a.scale.sizes().vec(), a.scale.dtype()};
  check_tensor(op, "dy", dy, like_x, a.x.device());
  Output dx(op, "dx", std::move(dx_out), like_x, a.x.device());
  Output dscale(op, "dscale", std::move(dscale_out), like_scale, a.x.device());
  Output dzero_point(op, "dzero_point", std::move(dzero_point_out), like_scale, a.x.device());
  dscale.apart_from(op, "dscale", dx, "dx");
  dzero_point.apart_from(op, "dzero_point", dx, "dx");
  dzero_point.apart_from(op, "dzero_point", dscale, "dscale");
  dy.make_contiguous();
  const Tensor* z = a.zero_point ? &*a.zero_point : nullptr;
  const auto into = [&](Output& out) { return out.data({&dy, &a.x, &a.scale, z}); };
  void* data = into(dx);
  auto* ds = static_cast<float*>(into(dscale));
  auto* dz = AFFINE ? static_cast<float*>(into(dzero_point)) : nullptr;
  const bool on_cpu = a.x.device().type == aoti_torch_device_type_cpu();
  const Sizes partials = {2, on_cpu ? 0 : kPartials};
  const Tensor partial = Tensor::empty(partials, aoti_torch_dtype_float32(), a.x.device(), {op, "x"});
  if (a.x.numel())
    Backend(a.x.device())
        .fake_quantize_backward({a.grid, dy.data(), a.x.data(), a.x_type, a.format->type, a.scales(), a.zero_points(),
                                 int32_t(a.qmin()), int32_t(a.qmax()), lsq_mask, float(grad_factor), data, ds, dz,
                                 static_cast<float*>(partial.data())});
  dx.finish(stack[0]);
  dscale.finish(stack[1]);
  if constexpr (AFFINE) dzero_point.finish(stack[2]);
}

template <class Backend>
void register_fake_quantize(torch::stable::detail::StableLibrary& m) {
  m.impl("fake_quantize", fake_quantize<Backend, false>);
  m.impl("fake_quantize.out", fake_quantize<Backend, true>);
  m.impl("fake_quantize_backward", fake_quantize_backward<Backend, false, false>);
  m.impl("fake_quantize_backward.out", fake_quantize_backward<Backend, true, false>);
  m.impl("fake_quantize_backward.affine", fake_quantize_backward<Backend, false, true>);
  m.impl("fake_quantize_backward.affine_out", fake_quantize_backward<Backend, true, true>);
}

}  // namespace quantlib
