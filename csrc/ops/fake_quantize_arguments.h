// Glue of fake_quantize and of its gradient: their arguments, checked.
#pragma once
#include "../glue.h"

namespace quantlib {

// Arguments of forward and backward alike, in the order in which Python checks them: quantlib/ops/fake_quantize.py.
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

  explicit FakeQuantizeArguments(Arguments& in) : x(in.tensor("x")), scale(in.tensor("scale")) {}  // the rest follows

  void check(const char* op) {
    format = &check_format(op, format_name, targets);
    x_type = check_dtype(op, "x", x.dtype(), inputs).type;
    grid = check_block(op, x.sizes(), block);
    const Result expected = scale_of(grid);
    check_tensor(op, "scale", scale, expected, x.device());
    scale.make_contiguous();
    if constexpr (Backend::reads_values) check_not_zero(op);
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
  void check_not_zero(const char* op) const {
    const int64_t n = scale.numel();
    const float* s = n ? scales() : nullptr;
    for (int64_t k = 0; k < n; ++k)
      if (s[k] == 0 || s[k] != s[k]) fail(op, "scale", "a number other than 0", text_of(double(s[k])));
  }
};

}  // namespace quantlib
