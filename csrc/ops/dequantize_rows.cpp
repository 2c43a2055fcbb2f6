// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#include "dequantize_rows.h"

#include "../glue.h"
#include "weight.h"

namespace quantlib {

QL_KERNEL(dequantize_rows, DequantizeRows)

// Its scales and zero points as they are kept: a table may have many more than the rows that are read.
struct TableArguments : WeightArguments {
  using WeightArguments::WeightArguments;

  Weight check(const char* op, int64_t N, int64_t K, Device device) {
    const Grid grid = check_block(op, Sizes{N, K}, block);
    check_scale(op, scale, zero_point, *format, scale_sizes(grid), device);
    codes.make_contiguous(), scale.make_contiguous();
    if (zero_point) zero_point->make_contiguous();
    Weight table = {
        .grid = grid, .codes = codes.data(), .format = format->type, .scale = nullptr, .zero_point = nullptr};
    if (is_float32(scale)) table.scale = static_cast<const float*>(scale.data());
    else keep_scale(table);
    if (has_zero_codes()) keep_zero_codes(table);
    else if (zero_point) table.zero_point = static_cast<const int32_t*>(zero_point->data());
    return table;
  }
};

// Rows that exist, and of these alone the zero points.
static void check_rows(const char* op, const DequantizeRows& p, const Format& f) {
  const Grid& grid = p.table.grid;
  const int64_t columns = grid.scale_cols();
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t i = p.index(r);
    if (i < 0 || i >= grid.M) fail(op, "indices", "in 0.." + std::to_string(grid.M - 1), std::to_string(i));
    if (p.table.zero_point) check_zero_point(op, "zero_point", p.table.zero_point + i / grid.br * columns, columns, f);
  }
}

static void dequantize_rows(StableIValue* stack, uint64_t, uint64_t results) {
  const char* op = "dequantize_rows";
  Arguments in(op, stack, results);
  Tensor indices = in.tensor("indices");
  TableArguments w(in);
  w.keeps_zero_codes = true;
  w.zero_point = in.optional_tensor("zero_point");
  const int32_t dtype = in.optional_dtype().value_or(aoti_torch_dtype_float32());
  const std::optional<int64_t> size = in.optional_size();
  auto out = in.out("out");

  const Format& f = *(w.format = &check_format(op, w.format_name, targets));
  const bool wide = indices.dtype() == aoti_torch_dtype_int64();
  if (!wide && indices.dtype() != aoti_torch_dtype_int32())
    fail(op, "indices", "int64 or int32", name_of(indices.dtype()));
  const Format& y_format = check_dtype(op, "dtype", dtype, inputs);
  const Sizes sizes_of_table = check_size(op, w.codes.sizes(), f, size);
  const int64_t K = sizes_of_table.empty() ? 1 : sizes_of_table.back();
  const int64_t N = check_codes(op, w.codes, f, K, indices.device());
  const Weight table = w.check(op, N, K, indices.device());
  Sizes sizes = indices.sizes().vec();
  sizes.push_back(K);
  Output y(op, "out", std::move(out), {sizes, dtype}, indices.device());
  indices.make_contiguous();
  DequantizeRows p{.table = table,
                   .R = indices.numel(),
                   .indices = indices.data(),
                   .wide = wide,
                   .y = nullptr,
                   .y_type = y_format.type};
  if constexpr (Backend::reads_values) check_rows(op, p, f);
  p.y = y.data({&indices, &w.codes, &w.scale, address(w.zero_point)});
  if (p.R && K) Backend(indices.device()).run(p);
  y.finish(stack[0]);
}

QL_REGISTER("dequantize_rows", dequantize_rows)

}  // namespace quantlib
