// A call of torch becomes a problem for a kernel: shared by the files of csrc/ops. Each of them takes the arguments of
// its op, checks them, allocates and launches. It is compiled for every backend that has a kernel of the op, as one
// with the backend's other ops, and with the backend's folder on the include path: <backend.h> is csrc/cpu/backend.h or
// csrc/cuda/backend.h.
//
//   class Backend                          one object a call
//     explicit Backend(Device)             makes the device of x current
//     static constexpr bool reads_values   whether the host may look at zero points
//     static constexpr bool takes_tiles    whether its dequant_matmul reads the tiles of quantlib/backends/tiles.py
//     void run(const <Problem>&) const     calls the kernel: contiguous memory, never empty
//   QL_KERNEL(<op>, <Problem>)             declares the kernel that `run` calls for a problem
//   QL_IMPL(m)                             begins a function that registers with torch, for the backend's device type
#pragma once
#include <backend.h>

#include "check.h"
#include "ops/cast.h"
#include "ops/widen.h"

namespace quantlib {

QL_KERNEL(cast, Cast)  // those of ops are declared in their own files; this one also widens a bias
QL_KERNEL(widen, Widen)

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
  // Refuse two results in the same memory: one would be written over the other.
  void apart_from(const Output& other) const {
    if (given_ && other.given_ && given_->overlaps(*other.given_))
      fail(name_.op, name_.argument, "in memory of its own", std::string("that of ") + other.name_.argument);
  }

  // The memory that the kernel writes: contiguous, and over none of the inputs (null: not given) that it still reads.
  void* data(std::initializer_list<const Tensor*> inputs) {
    const bool direct = given_ && given_->is_contiguous() &&
                        std::none_of(inputs.begin(), inputs.end(), [&](auto x) { return x && given_->overlaps(*x); });
    if (!direct) own_.emplace(Tensor::empty(result_.sizes, result_.dtype, device_, name_));
    return (direct ? *given_ : *own_).data();
  }
  template <class T>
  T* data(std::initializer_list<const Tensor*> inputs) {
    return static_cast<T*>(data(inputs));
  }

  // Put the written result into the caller's tensor, or onto the stack.
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

// The function that serves an overload, "quantize" say, and its out form, "quantize.out", told apart by their results.
using Glue = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

inline void register_glue(torch::stable::detail::StableLibrary& m, const std::string& overload, Glue glue) {
  m.impl(overload.c_str(), glue);
  m.impl((overload + (overload.find('.') == std::string::npos ? ".out" : "_out")).c_str(), glue);
}
#define QL_REGISTER(OVERLOAD, GLUE) \
  QL_IMPL(m) { register_glue(m, OVERLOAD, GLUE); }

inline const Tensor* address(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }

inline Sizes scale_sizes(const Grid& grid) { return {grid.scale_rows(), grid.scale_cols()}; }

// One float32, or int32, a block.
inline Result scale_of(const Grid& grid) { return {scale_sizes(grid), aoti_torch_dtype_float32()}; }
inline Result zero_point_of(const Grid& grid) { return {scale_sizes(grid), aoti_torch_dtype_int32()}; }

// x's codes: of x's shape, or [..., ceil(K / P)] bytes where P of them share one.
inline Result codes_of(const Tensor& x, const Grid& grid, const Format& f) {
  Result codes = {x.sizes().vec(), f.dtype};
  if (!f.packed()) return codes;
  if (codes.sizes.empty()) codes.sizes.push_back(1);
  codes.sizes.back() = f.columns(grid.K);
  return codes;
}

// The codes of `narrow` [.., K], zero points or E8M0, as 32 bits in its place.
inline void widen(const char* op, Tensor& narrow, const char* argument, int64_t K, Type format, int32_t dtype) {
  Sizes sizes = narrow.sizes().vec();
  sizes.back() = K;
  Tensor wide = Tensor::empty(sizes, dtype, narrow.device(), {op, argument});
  if (const int64_t n = wide.numel())
    Backend(narrow.device())
        .run(Widen{.M = n / K, .K = K, .codes = narrow.data(), .format = format, .out = wide.data()});
  narrow = std::move(wide);
}

// The values of a scale. One of 8 or 16 bits becomes float32, which holds it exactly.
inline const float* scales(const char* op, Tensor& scale, const char* argument = "scale") {
  scale.make_contiguous();
  if (is_e8m0(scale)) {
    widen(op, scale, argument, scale.sizes().back(), Type::float32, aoti_torch_dtype_float32());
    return static_cast<const float*>(scale.data());
  }
  const Type type = check_dtype(op, argument, scale.dtype(), inputs).type;
  if (type != Type::float32) {
    Tensor wide = Tensor::empty(scale.sizes(), aoti_torch_dtype_float32(), scale.device(), {op, argument});
    const int64_t n = scale.numel();
    if (n) Backend(scale.device()).run(Cast{scale.data(), type, wide.data(), Type::float32, n, false});
    scale = std::move(wide);
  }
  return static_cast<const float*>(scale.data());
}

// The values of a zero point, one for each of K blocks in a row, checked where that costs no wait.
inline const int32_t* zero_points(const char* op, std::optional<Tensor>& zero_point, const Format& f, int64_t K,
                                  const char* argument = "zero_point") {
  if (!zero_point) return nullptr;
  zero_point->make_contiguous();
  if (zero_point->dtype() != aoti_torch_dtype_int32()) {
    widen(op, *zero_point, argument, K, f.type, aoti_torch_dtype_int32());
    return static_cast<const int32_t*>(zero_point->data());
  }
  const auto* data = static_cast<const int32_t*>(zero_point->data());
  if constexpr (Backend::reads_values) check_zero_point(op, argument, data, zero_point->numel(), f);
  return data;
}

}  // namespace quantlib
