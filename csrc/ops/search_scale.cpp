// found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error
#include "search_scale.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(search_scale, SearchScale)

struct Method {
  bool by_magnitude, is_signed;
};

static Method check_method(const char* op, const std::string& name) {
  if (name == "mse") return {false, false};
  if (name == "magnitude") return {true, false};
  if (name == "signed_mse") return {false, true};
  if (name == "signed_magnitude") return {true, true};
  fail(op, "method", "mse, magnitude, signed_mse or signed_magnitude", name);
}

static Type check_kept(const char* op, const std::string& name) {
  for (const Format& f : formats())
    if (name == f.name && inputs(f)) return f.type;
  fail(op, "kept", one_of(inputs), name);
}

// The energies of the columns, checked where that costs no wait.
static const float* energies(const char* op, std::optional<Tensor>& energy, int64_t K, Device device) {
  if (!energy) return nullptr;
  check_tensor(op, "energy", *energy, {{K}, aoti_torch_dtype_float32()}, device);
  energy->make_contiguous();
  const auto* values = static_cast<const float*>(energy->data());
  if constexpr (Backend::reads_values)
    for (int64_t j = 0; j < K; ++j)
      if (!(values[j] >= 0 && values[j] <= 3.4028234663852886e38f))
        fail(op, "energy", "finite and >= 0", text_of(double(values[j])));
  return values;
}

static void search_scale(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "search_scale";
  Arguments in(op, stack, results);
  Tensor x = in.tensor("x"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  const std::string method_name = in.text(), kept_name = in.text();
  auto zero_point = in.optional_tensor("zero_point"), energy = in.optional_tensor("energy"), out = in.out("out");

  const Format& f = check_format(op, format, targets);
  const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
  const Grid grid = check_block(op, x.sizes(), block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), x.device());
  const Method method = check_method(op, method_name);
  const Type kept = check_kept(op, kept_name);
  const float* e = energies(op, energy, grid.K, x.device());
  Output found(op, "out", std::move(out), scale_of(grid), x.device());
  x.make_contiguous();
  const float* s = scales(op, scale);
  const int32_t* z = zero_points(op, zero_point, f, grid.scale_cols());
  auto* data = found.data<float>({&x, &scale, address(zero_point), address(energy)});
  Backend backend(x.device());
  if (x.numel())
    backend.run(SearchScale{.grid = grid,
                            .x = x.data(),
                            .x_type = x_format.type,
                            .format = f.type,
                            .by_magnitude = method.by_magnitude,
                            .is_signed = method.is_signed,
                            .kept = kept,
                            .scale = s,
                            .zero_point = z,
                            .energy = e,
                            .found = data});
  found.finish(stack[0]);
}

QL_REGISTER("search_scale", search_scale)

}  // namespace quantlib
