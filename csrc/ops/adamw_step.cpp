// parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits
#include "adamw_step.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(adamw_step, AdamwStep)

static void check_block(const char* op, int64_t block) {
  std::string blocks = "0";
  for (int64_t known = kLeastBlock; known <= kMostBlock; known *= 2) blocks += ", " + std::to_string(known);
  const bool known = block >= kLeastBlock && block <= kMostBlock && (block & (block - 1)) == 0;
  if (block != 0 && !known) fail(op, "block", "one of " + blocks, std::to_string(block));
}

static void adamw_step(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "adamw_step";
  Arguments in(op, stack, results);
  Tensor parameter = in.tensor("parameter"), gradient = in.tensor("gradient"), m = in.tensor("m"), v = in.tensor("v");
  Tensor m_scale = in.tensor("m_scale"), v_scale = in.tensor("v_scale"), constants = in.tensor("constants");
  const int64_t block = in.size();
  std::optional<Tensor> key = in.optional_tensor("key");
  const Sizes origin = in.optional_sizes().value_or(Sizes{0, 0});

  const Device device = parameter.device();
  const Format& x_format = check_dtype(op, "parameter", parameter.dtype(), inputs);
  const Sizes sizes = parameter.sizes().vec();
  if (sizes.size() != 2) fail(op, "parameter", "[M, K]", described(parameter.sizes(), parameter.dtype(), device));
  check_block(op, block);
  const int64_t M = sizes[0], K = sizes[1];
  const Sizes scales = {M, block ? Grid{M, K, 1, block}.scale_cols() : 0};
  const int32_t wide = aoti_torch_dtype_float32();
  const Result like = {sizes, parameter.dtype()}, scale = {scales, wide};
  const Result m_like = {sizes, block ? aoti_torch_dtype_int8() : wide};
  const Result v_like = {sizes, block ? aoti_torch_dtype_uint8() : wide};
  check_tensor(op, "gradient", gradient, like, device);
  check_tensor(op, "m", m, m_like, device);
  check_tensor(op, "v", v, v_like, device);
  check_tensor(op, "m_scale", m_scale, scale, device);
  check_tensor(op, "v_scale", v_scale, scale, device);
  check_tensor(op, "constants", constants, {{kConstants}, wide}, device);
  if (key) {
    check_tensor(op, "key", *key, {{2}, aoti_torch_dtype_int32()}, device);
    if (x_format.type != Type::bfloat16)
      fail(op, "key", std::string("None for a parameter of ") + x_format.name, "a tensor");
  }
  if (origin.size() != 2 || origin[0] < 0 || origin[1] < 0) fail(op, "origin", "two sizes >= 0", text_of(origin));

  // A result that is its own argument is written in place: an element is read before it is written.
  Tensor* const states[] = {&parameter, &m, &v, &m_scale, &v_scale};
  bool in_place[5];
  const auto taken = [&](int k, const char* argument) {
    auto out = in.out(argument);
    in_place[k] = out && out->is_contiguous() && states[k]->is_contiguous() && out->data() == states[k]->data();
    return out;
  };
  const auto result = [&](int k, const char* argument, const Result& expected) {
    return Output(op, argument, taken(k, argument), expected, device);
  };
  Output outs[] = {result(0, "parameter_out", like), result(1, "m_out", m_like), result(2, "v_out", v_like),
                   result(3, "m_scale_out", scale), result(4, "v_scale_out", scale)};
  for (int k = 0; k < 5; ++k)
    for (int earlier = 0; earlier < k; ++earlier) outs[k].apart_from(outs[earlier]);
  for (Tensor* state : states) state->make_contiguous();
  gradient.make_contiguous(), constants.make_contiguous();
  if (key) key->make_contiguous();
  void* written[5];
  for (int k = 0; k < 5; ++k) {
    const auto read = [&](int i) { return i == k && in_place[k] ? nullptr : states[i]; };
    written[k] = outs[k].data({&gradient, &constants, address(key), read(0), read(1), read(2), read(3), read(4)});
  }
  Backend backend(device);
  if (M && K)
    backend.run(AdamwStep{.M = M,
                          .K = K,
                          .block = block,
                          .parameter = parameter.data(),
                          .gradient = gradient.data(),
                          .x_type = x_format.type,
                          .m = m.data(),
                          .v = v.data(),
                          .m_scale = static_cast<const float*>(m_scale.data()),
                          .v_scale = static_cast<const float*>(v_scale.data()),
                          .constants = static_cast<const float*>(constants.data()),
                          .key = key ? static_cast<const int32_t*>(key->data()) : nullptr,
                          .row = origin[0],
                          .column = origin[1],
                          .parameter_out = written[0],
                          .m_out = written[1],
                          .v_out = written[2],
                          .m_scale_out = static_cast<float*>(written[3]),
                          .v_scale_out = static_cast<float*>(written[4])});
  for (int k = 0; k < 5; ++k) outs[k].finish(stack[k]);
}

QL_REGISTER("adamw_step", adamw_step)

}  // namespace quantlib
