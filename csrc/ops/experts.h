// Glue of the grouped products: the arguments that make E weights, and the rows of x of each.
#pragma once
#include "groups.h"
#include "weight.h"

namespace quantlib {

struct ExpertArguments : WeightArguments {
  Tensor offsets;
  Groups groups = {};

  explicit ExpertArguments(Arguments& in) : WeightArguments(in), offsets(in.tensor("offsets")) {
    zero_point = in.optional_tensor("zero_point");
  }

  // The weight [N, K] of expert 0, checked with those of the others, which follow it; x is [T, ..]
  Weight check(const char* op, const char* argument, const Tensor& x, int64_t K, Accepts accepted) {
    format = &check_format(op, format_name, accepted);
    const Device device = x.device();
    const int64_t columns = format->columns(K);
    if (codes.sizes().size() != 3 && codes.dtype() != kNoDtype)
      fail(op, "codes", "[E, N, K], a matrix of each expert", text_of(codes.sizes()));
    if (x.sizes().size() != 2)
      fail(op, argument, std::string("[T, ") + (*argument == 'd' ? "N" : "K") + "], the rows of all experts",
           text_of(x.sizes()));
    if (codes.sizes().size() != 3 || codes.sizes()[2] != columns || codes.dtype() != format->dtype ||
        !(codes.device() == device))
      fail(op, "codes", name_of(format->dtype) + " [E, N, " + std::to_string(columns) + "] on " + text_of(device),
           described(codes.sizes(), codes.dtype(), codes.device()));
    const int64_t E = codes.sizes()[0], N = codes.sizes()[1];
    const Sizes shape = {N, K};
    Grid grid = check_block(op, shape, block);
    check_scale(op, scale, zero_point, *format, {E, grid.scale_rows(), grid.scale_cols()}, device);
    check_tensor(op, "offsets", offsets, {{E}, aoti_torch_dtype_int32()}, device);
    offsets.make_contiguous(), codes.make_contiguous(), scale.make_contiguous();
    if (zero_point) zero_point->make_contiguous();
    groups = {E, x.sizes()[0], static_cast<const int32_t*>(offsets.data())};
    if constexpr (Backend::reads_values) check_values(op, grid.scale_rows() * grid.scale_cols());
    const bool narrow = !is_float32(scale);
    const float* s = narrow && keeps_narrow_scales ? nullptr : scales(op, scale);
    const bool packed = has_zero_codes();
    if (zero_point && !packed && zero_point->dtype() != aoti_torch_dtype_int32())
      widen(op, *zero_point, "zero_point", grid.scale_cols(), format->type, aoti_torch_dtype_int32());
    grid.br = std::min(grid.br, std::max<int64_t>(N, 1)), grid.bk = std::min(grid.bk, std::max<int64_t>(K, 1));
    Weight weight = {.grid = grid, .codes = codes.data(), .format = format->type, .scale = s, .zero_point = nullptr};
    if (packed) keep_zero_codes(weight);
    else if (zero_point) weight.zero_point = static_cast<const int32_t*>(zero_point->data());
    if (!s) keep_scale(weight);
    return weight;
  }

 private:
  void check_values(const char* op, int64_t blocks) {
    const bool wide = zero_point && zero_point->dtype() == aoti_torch_dtype_int32();
    for (int64_t e = 0, start = 0; e < groups.E; ++e) {
      const int64_t end = groups.ends[e];
      if (end < start || end > groups.T)
        fail(op, "offsets", "ascending ends of groups in 0.." + std::to_string(groups.T),
             std::to_string(end) + " for expert " + std::to_string(e) + ", which begins at " + std::to_string(start));
      if (end == start) continue;
      start = end;
      if (wide)
        check_zero_point(op, "zero_point", static_cast<const int32_t*>(zero_point->data()) + e * blocks, blocks,
                         *format);
    }
  }
};

}  // namespace quantlib
