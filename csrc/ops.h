// From a call of torch to a problem for a device, for every op: take the arguments, check, allocate, launch. The
// matmuls follow in matmul_ops.h.
//
// Backend is what cpu/register.cpp and cuda/register.cpp define, one object a call:
//   explicit Backend(Device);              makes the device of x current
//   static constexpr bool reads_values;    whether the host may look at scales and zero points
//   void <op>(const <Problem>&) const;     reads and writes contiguous memory, never empty
#pragma once
#include "check.h"

namespace quantlib {

// A result: a tensor of ours, or one the caller gave.
class Output {
 public:
  Output(const char* op, const char* argument, std::optional<Tensor> given, Result result, Device device)
      : name_{op, argument}, given_(std::move(given)), result_(std::move(result)), device_(device) {
    if (!given_) return;
    check_tensor(op, argument, *given_, result_, device);
    if (given_->overlaps_itself())
      fail(op, argument, "a tensor whose elements do not share memory", "strides " + text_of(given_->strides()));
  }
  // Where two results were given the same memory one would be written over the other.
  void apart_from(const char* op, const char* argument, const Output& other, const char* its_argument) const {
    if (given_ && other.given_ && given_->overlaps(*other.given_))
      fail(op, argument, "in memory of its own", std::string("that of ") + its_argument);
  }

  // Where the kernel writes: contiguous, and over none of the inputs (null: not given), which it is still reading.
  void* data(std::initializer_list<const Tensor*> inputs) {
    const bool direct = given_ && given_->is_contiguous() &&
                        std::none_of(inputs.begin(), inputs.end(), [&](auto x) { return x && given_->overlaps(*x); });
    if (!direct) own_.emplace(Tensor::empty(result_.sizes, result_.dtype, device_, name_));
    return (direct ? *given_ : *own_).data();
  }

  // Once it is written: into the caller's tensor, or onto the stack.
  void finish(StableIValue& slot) {
    if (!given_) slot = torch::stable::detail::from(own_->release());
    else if (own_) given_->copy_from(*own_);
  }

 private:
  Name name_;
  std::optional<Tensor> given_, own_;
  Result result_;
  Device device_;
};

template <bool OUT>
std::optional<Tensor> take_out(Arguments& in, const char* argument) {
  if constexpr (OUT) return in.tensor(argument);
  else return std::nullopt;
}

inline Sizes scale_sizes(const Grid& grid) { return {grid.scale_rows(), grid.scale_cols()}; }

// x's codes: of x's shape, or [..., ceil(K / P)] bytes where P of them share one.
inline Result codes_of(const Tensor& x, const Grid& grid, const Format& f) {
  Result codes = {x.sizes().vec(), f.dtype};
  if (!f.packed()) return codes;
  if (codes.sizes.empty()) codes.sizes.push_back(1);
  codes.sizes.back() = f.columns(grid.K);
  return codes;
}

// The values of a scale, checked where that costs no wait: a kernel takes 2^-100 for one that is negative.
template <class Backend>
const float* scales(const char* op, Tensor& scale, const char* argument = "scale") {
  scale.make_contiguous();
  const auto* data = static_cast<const float*>(scale.data());
  if constexpr (Backend::reads_values) {
    float least = 0.0f;
    Backend(scale.device()).least_scale({data, scale.numel(), &least});
    if (least < 0) fail(op, argument, ">= 0", text_of(double(least)));
  }
  return data;
}

// The values of a zero point, checked where that costs no wait.
template <class Backend>
const int32_t* zero_points(const char* op, std::optional<Tensor>& zero_point, const Format& f,
                           const char* argument = "zero_point") {
  if (!zero_point) return nullptr;
  zero_point->make_contiguous();
  const auto* data = static_cast<const int32_t*>(zero_point->data());
  if constexpr (Backend::reads_values) check_zero_point(op, argument, data, zero_point->numel(), f);
  return data;
}

// y[...] = encode(decode(x[...]))
template <class Backend, bool OUT>
void cast(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "cast";
  Arguments in(op, stack);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const bool saturate = in.flag();
  auto out = take_out<OUT>(in, "out");

  const Format& f = check_format(op, format, casts);
  const Format& x_format = check_dtype(op, "x", x.dtype(), casts);
  Output y(op, "out", std::move(out), {x.sizes().vec(), f.dtype}, x.device());
  x.make_contiguous();
  void* data = y.data({&x});
  if (x.numel()) Backend(x.device()).cast({x.data(), x_format.type, data, f.type, x.numel(), saturate});
  y.finish(stack[0]);
}

// scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q)
template <class Backend, bool OUT, bool AFFINE>
void compute_scale(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "compute_scale";
  Arguments in(op, stack);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto scale_out = take_out<OUT>(in, "scale"), zero_point_out = take_out<(OUT && AFFINE)>(in, "zero_point");

  const Format& f = check_format(op, format, AFFINE ? integers : targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  Output scale(op, OUT && !AFFINE ? "out" : "scale", std::move(scale_out),
               {scale_sizes(grid), aoti_torch_dtype_float32()}, x.device());
  Output zero_point(op, "zero_point", std::move(zero_point_out), {scale_sizes(grid), aoti_torch_dtype_int32()},
                    x.device());
  zero_point.apart_from(op, "zero_point", scale, "scale");
  x.make_contiguous();
  auto* s = static_cast<float*>(scale.data({&x}));
  auto* z = AFFINE ? static_cast<int32_t*>(zero_point.data({&x})) : nullptr;
  if (x.numel()) Backend(x.device()).compute_scale({grid, x.data(), x_format.type, f.type, s, z});
  scale.finish(stack[0]);
  if constexpr (AFFINE) zero_point.finish(stack[1]);
}

// codes[i, j] = encode(x[i, j] / scale[i / br, j / bk])
template <class Backend, bool OUT>
void quantize(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "quantize";
  Arguments in(op, stack);
  Tensor x = in.tensor("x"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point"), out = take_out<OUT>(in, "out");

  const Format& f = check_format(op, format, targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), x.device());
  Output codes(op, "out", std::move(out), codes_of(x, grid, f), x.device());
  x.make_contiguous();
  const float* s = scales<Backend>(op, scale);
  const int32_t* z = zero_points<Backend>(op, zero_point, f);
  void* data = codes.data({&x, &scale, zero_point ? &*zero_point : nullptr});
  if (x.numel()) Backend(x.device()).quantize({grid, x.data(), x_format.type, f.type, s, z, data});
  codes.finish(stack[0]);
}

// y[i, j] = decode(codes[i, j]) * scale[i / br, j / bk]
template <class Backend, bool OUT>
void dequantize(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "dequantize";
  Arguments in(op, stack);
  Tensor codes = in.tensor("codes"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point");
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  const std::optional<int64_t> size = in.optional_size();
  auto out = take_out<OUT>(in, "out");

  const Format& f = check_format(op, format, targets);
  if (codes.dtype() != f.dtype) fail(op, "codes", name_of(f.dtype), name_of(codes.dtype()));
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Sizes sizes = check_size(op, codes.sizes(), f, size);
  const Grid grid = check_block(op, sizes, block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), codes.device());
  Output y(op, "out", std::move(out), {sizes, dtype}, codes.device());
  codes.make_contiguous();
  const float* s = scales<Backend>(op, scale);
  const int32_t* z = zero_points<Backend>(op, zero_point, f);
  void* data = y.data({&codes, &scale, zero_point ? &*zero_point : nullptr});
  if (grid.M && grid.K) Backend(codes.device()).dequantize({grid, codes.data(), f.type, s, z, data, y_format.type});
  y.finish(stack[0]);
}

// scale = compute_scale(x), codes = quantize(x, scale), in one pass over x
template <class Backend, bool OUT, bool AFFINE>
void quantize_dynamic(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "quantize_dynamic";
  Arguments in(op, stack);
  Tensor x = in.tensor("x");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto codes_out = take_out<OUT>(in, "codes"), scale_out = take_out<OUT>(in, "scale"),
       zero_point_out = take_out<(OUT && AFFINE)>(in, "zero_point");

  const Format& f = check_format(op, format, AFFINE ? integers : targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  Output codes(op, "codes", std::move(codes_out), codes_of(x, grid, f), x.device());
  Output scale(op, "scale", std::move(scale_out), {scale_sizes(grid), aoti_torch_dtype_float32()}, x.device());
  Output zero_point(op, "zero_point", std::move(zero_point_out), {scale_sizes(grid), aoti_torch_dtype_int32()},
                    x.device());
  scale.apart_from(op, "scale", codes, "codes");
  zero_point.apart_from(op, "zero_point", codes, "codes");
  zero_point.apart_from(op, "zero_point", scale, "scale");
  x.make_contiguous();
  void* data = codes.data({&x});
  auto* s = static_cast<float*>(scale.data({&x}));
  auto* z = AFFINE ? static_cast<int32_t*>(zero_point.data({&x})) : nullptr;
  if (x.numel()) Backend(x.device()).quantize_dynamic({grid, x.data(), x_format.type, f.type, data, s, z});
  codes.finish(stack[0]);
  scale.finish(stack[1]);
  if constexpr (AFFINE) zero_point.finish(stack[2]);
}

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("cast", cast<Backend, false>);
  m.impl("cast.out", cast<Backend, true>);
  m.impl("compute_scale", compute_scale<Backend, false, false>);
  m.impl("compute_scale.out", compute_scale<Backend, true, false>);
  m.impl("compute_scale.affine", compute_scale<Backend, false, true>);
  m.impl("compute_scale.affine_out", compute_scale<Backend, true, true>);
  m.impl("quantize", quantize<Backend, false>);
  m.impl("quantize.out", quantize<Backend, true>);
  m.impl("dequantize", dequantize<Backend, false>);
  m.impl("dequantize.out", dequantize<Backend, true>);
  m.impl("quantize_dynamic", quantize_dynamic<Backend, false, false>);
  m.impl("quantize_dynamic.out", quantize_dynamic<Backend, true, false>);
  m.impl("quantize_dynamic.affine", quantize_dynamic<Backend, false, true>);
  m.impl("quantize_dynamic.affine_out", quantize_dynamic<Backend, true, true>);
}

}  // namespace quantlib
