// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#include "dequantize_rows.h"

#include "../glue.h"

namespace quantlib {

QL_KERNEL(dequantize_rows, DequantizeRows)

// Rows that exist, and of these alone the scales and zero points: a table may have many more.
static void check_rows(const char* op, const DequantizeRows& p, const Format& f, const Backend& backend) {
  const int64_t N = p.grid.M, columns = p.grid.scale_cols();
  for (int64_t r = 0; r < p.R; ++r)
    if (const int64_t i = p.index(r); i < 0 || i >= N)
      fail(op, "indices", "in 0.." + std::to_string(N - 1), std::to_string(i));
  const int64_t bytes = columns * (p.scale_type == Type::float32 ? 4 : 2);
  float least = 0.0f;
  if (columns == 1 && p.scale_type == Type::float32) {
    const auto* scale = static_cast<const float*>(p.scale);
    for (int64_t r = 0; r < p.R; ++r) least = std::min(least, scale[p.index(r) / p.grid.br]);
  } else {
    for (int64_t r = 0; r < p.R; ++r) {
      const char* scale = static_cast<const char*>(p.scale) + p.index(r) / p.grid.br * bytes;
      least = std::min(least, backend.least_scale(scale, p.scale_type, columns));
    }
  }
  if (least < 0) fail(op, "scale", ">= 0", text_of(double(least)));
  if (!p.zero_point) return;
  for (int64_t r = 0; r < p.R; ++r)
    check_zero_point(op, "zero_point", p.zero_point + p.index(r) / p.grid.br * columns, columns, f);
}

static void dequantize_rows(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dequantize_rows";
  Arguments in(op, stack, results);
  Tensor indices = in.tensor("indices"), codes = in.tensor("codes"), scale = in.tensor("scale");
  const std::string format = in.text();
  const Sizes block = in.sizes();
  auto zero_point = in.optional_tensor("zero_point");
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  const std::optional<int64_t> size = in.optional_size();
  auto out = in.out("out");

  const Format& f = check_format(op, format, targets);
  const bool wide = indices.dtype() == aoti_torch_dtype_int64();
  if (!wide && indices.dtype() != aoti_torch_dtype_int32())
    fail(op, "indices", "int64 or int32", name_of(indices.dtype()));
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Sizes table = check_size(op, codes.sizes(), f, size);
  const int64_t K = table.empty() ? 1 : table.back();
  const int64_t N = check_codes(op, codes, f, K, indices.device());
  const Grid grid = check_block(op, Sizes{N, K}, block);
  check_scale(op, scale, zero_point, f, scale_sizes(grid), indices.device());
  Sizes sizes = indices.sizes().vec();
  sizes.push_back(K);
  Output y(op, "out", std::move(out), {sizes, dtype}, indices.device());
  indices.make_contiguous();
  codes.make_contiguous();
  scale.make_contiguous();
  if (zero_point) zero_point->make_contiguous();
  Backend backend(indices.device());
  DequantizeRows p{.grid = grid,
                   .R = indices.numel(),
                   .indices = indices.data(),
                   .wide = wide,
                   .codes = codes.data(),
                   .format = f.type,
                   .scale = scale.data(),
                   .scale_type = check_dtype(op, "scale", scale.dtype(), inputs).type,
                   .zero_point = zero_point ? static_cast<const int32_t*>(zero_point->data()) : nullptr,
                   .y = nullptr,
                   .y_type = y_format.type};
  if constexpr (Backend::reads_values) check_rows(op, p, f, backend);
  p.y = y.data({&indices, &codes, &scale, address(zero_point)});
  if (p.R && K) backend.run(p);
  y.finish(stack[0]);
}

QL_REGISTER("dequantize_rows", dequantize_rows)

}  // namespace quantlib
