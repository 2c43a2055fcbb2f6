// Every op of csrc/cpu against the same functions of numerics.h called one element at a time, over awkward sizes and
// buffers that end where the data ends. Linked with kernels that tests/test_cpu_sanitizers.py compiles; no torch.
#ifdef WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "activation.h"
#include "cpu/kernels.h"
#include "fake_quantize.h"
#include "one_at_a_time.h"
#include "ops/cast.h"
#include "ops/compute_scale.h"
#include "ops/dequant_matmul.h"
#include "ops/dequant_matmul_backward.h"
#include "ops/dequantize.h"
#include "ops/fake_quantize.h"
#include "ops/fake_quantize_backward.h"
#include "ops/quantize.h"
#include "ops/quantize_dynamic.h"
#include "ops/scaled_matmul.h"

// X(op, its problem)
#define QL_KERNELS(X)                               \
  X(cast, Cast)                                     \
  X(compute_scale, ComputeScale)                    \
  X(quantize, Quantize)                             \
  X(dequantize, Dequantize)                         \
  X(quantize_dynamic, QuantizeDynamic)              \
  X(fake_quantize, FakeQuantize)                    \
  X(fake_quantize_backward, FakeQuantizeBackward)   \
  X(dequant_matmul, DequantMatmul)                  \
  X(dequant_matmul_backward, DequantMatmulBackward) \
  X(scaled_matmul, ScaledMatmul)

namespace quantlib {
namespace TESTED_ISA {
#define QL_DECLARE(OP, PROBLEM) void OP(const PROBLEM&, ParallelFor);
QL_KERNELS(QL_DECLARE)
#undef QL_DECLARE
}  // namespace TESTED_ISA
}  // namespace quantlib

namespace quantlib {
#ifdef WITH_AMX
bool has_amx() { return true; }
#else
bool has_amx() { return false; }
#endif
bool has_fast_pairs() { return true; }
bool has_avx_vnni() { return __builtin_cpu_supports("avxvnni"); }
}  // namespace quantlib

using namespace quantlib;

namespace {

void threads(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t pieces = (end - begin) / grain >= 3 ? 3 : 1;
  std::vector<std::thread> others;
  for (int64_t k = 1; k < pieces; ++k)
    others.emplace_back(body, begin + (end - begin) * k / pieces, begin + (end - begin) * (k + 1) / pieces, context);
  if (end > begin) body(begin, begin + (end - begin) / pieces, context);
  for (std::thread& other : others) other.join();
}

struct Ops {
  const char* isa;
#define QL_POINTER(OP, PROBLEM) void (*OP)(const PROBLEM&, ParallelFor);
  QL_KERNELS(QL_POINTER)
#undef QL_POINTER
};

std::mt19937 random_bits(1);
int64_t compared = 0, wrong = 0;

void compare(const std::string& where, int64_t i, int64_t j, uint32_t got, uint32_t want) {
  ++compared;
  if (got != want && wrong++ < 20)
    std::printf("%s [%ld, %ld]: got 0x%x, expected 0x%x\n", where.c_str(), long(i), long(j), got, want);
}

// Any bits now and then, so that NaN, infinities and subnormals come up; moderate values mostly.
uint32_t random_float(Type type) {
  const uint32_t any = random_bits();
  const float x = (float(int32_t(random_bits())) / 1e9f) * float(1 << (any % 9));
  const uint32_t bits = any % 61 == 0 ? any : bits_of(x);
  return type == Type::float32    ? bits
         : type == Type::bfloat16 ? bits >> 16
         : any % 61               ? encode_float<float16>(x, false)
                                  : any >> 16;
}

void fill(Type type, void* x, int64_t n) {
  const int bytes = row_of(type).bytes;
  for (int64_t e = 0; e < n; ++e) {
    const uint32_t code = bytes >= 2 ? random_float(type) : random_bits();
    std::memcpy(static_cast<char*>(x) + e * bytes, &code, size_t(bytes));
  }
}

void check_cast(const Ops& ops, Type from, Type to, bool saturate, int64_t n) {
  const Row x_row = row_of(from), y_row = row_of(to);
  const Buffer x(n * x_row.bytes, x_row.bytes), y(n * y_row.bytes, y_row.bytes);
  const std::string where =
      std::string(ops.isa) + " cast " + std::to_string(int(from)) + " to " + std::to_string(int(to));
  fill(from, x.data(), n);
  ops.cast({x.data(), from, y.data(), to, n, saturate}, threads);
  for (int64_t j = 0; j < n; ++j)
    compare(where, 0, j, code_at(y.data(), y_row, n, 0, j),
            encode_one(to, decode_one(from, code_at(x.data(), x_row, n, 0, j), false, 0), saturate, false, 0));
}

void check_block(const Ops& ops, Type x_type, Type format, bool affine, Grid g) {
  const std::string where = std::string(ops.isa) + " format " + std::to_string(int(format)) + " x " +
                            std::to_string(int(x_type)) + (affine ? " affine" : "") + " block " + std::to_string(g.br) +
                            " x " + std::to_string(g.bk) + " of " + std::to_string(g.M) + " x " + std::to_string(g.K);
  const Row x_row = row_of(x_type), row = row_of(format);
  const int64_t rows = g.scale_rows(), cols = g.scale_cols(), code_bytes = g.M * row_bytes(row, g.K);
  const Buffer x(g.M * g.K * x_row.bytes, x_row.bytes), scale(rows * cols * 4, 4), zero_point(rows * cols * 4, 4);
  fill(x_type, x.data(), g.M * g.K);
  auto* s = static_cast<float*>(scale.data());
  auto* z = affine ? static_cast<int32_t*>(zero_point.data()) : nullptr;
  const auto x_at = [&](int64_t i, int64_t j) {
    return decode_one(x_type, code_at(x.data(), x_row, g.K, i, j), false, 0);
  };

  ops.compute_scale({g, x.data(), x_type, format, s, z}, threads);
  for (int64_t I = 0; I < rows; ++I)
    for (int64_t J = 0; J < cols; ++J) {
      float lowest = 0, highest = 0;
      bool is_nan = false;
      for (int64_t i = I * g.br; i < std::min((I + 1) * g.br, g.M); ++i)
        for (int64_t j = J * g.bk; j < std::min((J + 1) * g.bk, g.K); ++j) {
          lowest = std::min(lowest, x_at(i, j)), highest = std::max(highest, x_at(i, j));
          is_nan |= x_at(i, j) != x_at(i, j);
        }
      if (is_nan) lowest = highest = float_of(kNaN);
      const Affine want = range_one(format, lowest, highest, affine);
      compare("compute_scale " + where, I, J, bits_of(s[I * cols + J]), bits_of(want.scale));
      if (affine) compare("zero_point " + where, I, J, uint32_t(z[I * cols + J]), uint32_t(want.zero_point));
    }

  const auto check_codes = [&](const std::string& op, const void* codes) {
    const std::string here = op + where;
    for (int64_t i = 0; i < g.M; ++i)
      for (int64_t j = 0; j < row_bytes(row, g.K) / row.bytes * row.per_byte; ++j) {
        const int64_t at = i / g.br * cols + j / g.bk;
        uint32_t want = 0;  // what follows the last code of a row
        if (j < g.K)
          want =
              encode_one(format, x_at(i, j) * reciprocal(scale_one(format, s[at])), true, affine, affine ? z[at] : 0);
        compare(here, i, j, code_at(codes, row, g.K, i, j), want & ((1u << row.bits) - 1));
      }
  };
  {
    const Buffer codes(code_bytes, 1 + row.bits / 16), again(rows * cols * 4, 0), again_z(rows * cols * 4, 0);
    ops.quantize_dynamic({g, x.data(), x_type, format, codes.data(), static_cast<float*>(again.data()),
                          affine ? static_cast<int32_t*>(again_z.data()) : nullptr},
                         threads);
    check_codes("quantize_dynamic ", codes.data());
    compare("scale of quantize_dynamic " + where, 0, 0, uint32_t(std::memcmp(again.data(), s, size_t(again.size))), 0);
    if (affine)
      compare("zero_point of quantize_dynamic " + where, 0, 0,
              uint32_t(std::memcmp(again_z.data(), z, size_t(again.size))), 0);
  }
  for (int64_t at = 0; at < rows * cols; ++at) {
    s[at] = at % 7 ? s[at] : float_of(random_bits());
    if (affine) z[at] = at % 5 ? z[at] : int32_t(random_bits());  // out of range: as good as the nearest inside
  }
  const Buffer codes(code_bytes, 1 + row.bits / 16);
  ops.quantize({g, x.data(), x_type, format, s, z, codes.data()}, threads);
  check_codes("quantize ", codes.data());

  const Buffer y(g.M * g.K * x_row.bytes, x_row.bytes);
  fill(Type::uint8, codes.data(), code_bytes);
  ops.dequantize({g, codes.data(), format, s, z, y.data(), x_type}, threads);
  const std::string back = "dequantize " + where;
  for (int64_t i = 0; i < g.M; ++i)
    for (int64_t j = 0; j < g.K; ++j) {
      const int64_t at = i / g.br * cols + j / g.bk;
      const float value = decode_one(format, code_at(codes.data(), row, g.K, i, j), affine, affine ? z[at] : 0);
      compare(back, i, j, code_at(y.data(), x_row, g.K, i, j),
              encode_one(x_type, canonical(value * scale_one(format, s[at])), false, false, 0));
    }
}

void one_thread(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(begin, end, context);
}

// Elements exactly, sums within n * 2^-24 * sum|terms|, and the same with three threads as with one.
template <class F, bool LSQ>
void check_fake(const Ops& ops, Type x_type, Type format, bool affine, Limits q, Grid g) {
  const std::string where = std::string(ops.isa) + " fake_quantize " + std::to_string(int(format)) + " x " +
                            std::to_string(int(x_type)) + (affine ? " affine" : "") + (LSQ ? " lsq" : "") + " block " +
                            std::to_string(g.br) + " x " + std::to_string(g.bk) + " ";
  const Row row = row_of(x_type);
  const int64_t n = g.M * g.K, blocks = g.scale_rows() * g.scale_cols();
  const Buffer x(n * row.bytes, row.bytes), dy(x.size, row.bytes), y(x.size, row.bytes), dx(x.size, 0);
  const Buffer scale(blocks * 4, 4), zero_point(blocks * 4, 4), dscale(blocks * 8, 4), dzero_point(blocks * 8, 4);
  fill(x_type, x.data(), n), fill(x_type, dy.data(), n);
  auto *s = static_cast<float*>(scale.data()), *z = static_cast<float*>(zero_point.data());
  for (int64_t k = 0; k < blocks; ++k) s[k] = std::exp2(float(k % 9) - 5), z[k] = float(k % 11) * 3.3f - 9;
  auto *ds = static_cast<float*>(dscale.data()), *dz = static_cast<float*>(dzero_point.data());
  ops.fake_quantize({g, x.data(), x_type, format, s, affine ? z : nullptr, int32_t(q.qmin), int32_t(q.qmax), y.data()},
                    threads);
  for (const ParallelFor run : {one_thread, threads}) {
    ops.fake_quantize_backward({g, dy.data(), x.data(), x_type, format, s, affine ? z : nullptr, int32_t(q.qmin),
                                int32_t(q.qmax), LSQ, 1.0f, dx.data(), ds, affine ? dz : nullptr},
                               run);
    if (run == one_thread)
      std::memcpy(ds + blocks, ds, size_t(blocks * 4)), std::memcpy(dz + blocks, dz, size_t(blocks * 4));
  }
  const std::string y_where = "y " + where, dx_where = "dx " + where;
  std::vector<double> sums[2] = {std::vector<double>(blocks), std::vector<double>(blocks)},
                      sizes[2] = {sums[0], sums[0]};
  const auto value = [&](uint32_t code) { return decode_one(x_type, code, false, 0); };
  for (int64_t i = 0; i < g.M; ++i)
    for (int64_t j = 0; j < g.K; ++j) {
      const int64_t at = i / g.br * g.scale_cols() + j / g.bk;
      const float s_eff = scale_one(format, s[at]);
      const Shared<float> of = {reciprocal(s_eff), s_eff, affine ? code_of(z[at], q) : 0.0f};
      const uint32_t dy_code = code_at(dy.data(), row, g.K, i, j);
      const float xij = value(code_at(x.data(), row, g.K, i, j));
      const Gradients<float> want = gradients<F, LSQ>(value(dy_code), xij, of, q);
      compare(y_where, i, j, code_at(y.data(), row, g.K, i, j),
              encode_one(x_type, fake_quantized<F>(xij, of, q), false, false, 0));
      compare(dx_where, i, j, code_at(dx.data(), row, g.K, i, j), want.inside ? dy_code : 0);
      sums[0][at] += want.scale, sizes[0][at] += std::fabs(want.scale);
      sums[1][at] += want.zero_point, sizes[1][at] += std::fabs(want.zero_point);
    }
  for (int64_t at = 0; at < blocks; ++at) {
    const double terms = double(std::min(g.br, g.M)) * double(std::min(g.bk, g.K)) * 0x1p-24;
    const auto sum = [&](const char* of, const float* got, int k) {
      compare(of + where, at, 0, bits_of(got[at]), bits_of(got[at + blocks]));
      const bool representable = sizes[k][at] < 0x1p127;  // a NaN is not
      compare(of + where, at, 1, !representable || std::fabs(got[at] - sums[k][at]) <= terms * sizes[k][at], 1);
    };
    sum("dscale ", ds, 0);
    if (affine) sum("dzero_point ", dz, 1);
  }
}

void check_fake(const Ops& ops, Type x_type, Type format, bool affine, Grid g) {
  visit(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (F::bits == 32) {
      return;
    } else if constexpr (F::is_float) {
      check_fake<F, true>(ops, x_type, format, false, {}, g);
      check_fake<F, false>(ops, x_type, format, false, {}, g);
    } else {
      const Limits q = {float(affine ? F::affine_qmin : F::qmin), float(F::qmax)};
      check_fake<Integer, true>(ops, x_type, format, affine, q, g);
      check_fake<Integer, false>(ops, x_type, format, affine, q, g);
    }
  });
}

// x is [M, K], the weight [g.M, K]
void check_scaled_matmul(const Ops& ops, Type x_format, Type format, bool affine, int64_t M, Grid g) {
  g.br = std::min(g.br, g.M), g.bk = std::min(g.bk, g.K);
  const std::string where = std::string(ops.isa) + " scaled_matmul " + std::to_string(int(format)) + " x " +
                            std::to_string(int(x_format)) + (affine ? " affine" : "") + " M " + std::to_string(M) +
                            " block " + std::to_string(g.br) + " x " + std::to_string(g.bk) + " of " +
                            std::to_string(g.M) + " x " + std::to_string(g.K);
  const Type y_type = Type(M % 3);
  const auto activation = Activation(M % 5);
  const Row row = row_of(format), y_row = row_of(y_type);
  const int64_t N = g.M, K = g.K, cols = g.scale_cols(), blocks = g.scale_rows() * cols;
  const Buffer x(M * K, 1), codes(N * row_bytes(row, K), 3), y(M * N * y_row.bytes, y_row.bytes), bias(N * 4, 4);
  const Buffer x_scale(M * 4, 4), x_zero_point(M * 4, 4), scale(blocks * 4, 4), zero_point(blocks * 4, 4);
  fill(Type::uint8, x.data(), x.size), fill(Type::uint8, codes.data(), codes.size);
  fill(Type::float32, x_scale.data(), M), fill(Type::float32, scale.data(), blocks),
      fill(Type::float32, bias.data(), N);
  fill(Type::uint8, x_zero_point.data(), M * 4), fill(Type::uint8, zero_point.data(), blocks * 4);
  const auto *b = static_cast<float*>(bias.data()), *x_s = static_cast<float*>(x_scale.data());
  const auto* s = static_cast<float*>(scale.data());
  const auto *x_z = static_cast<int32_t*>(x_zero_point.data()), *z = static_cast<int32_t*>(zero_point.data());
  ops.scaled_matmul({M,
                     x.data(),
                     x_format,
                     x_s,
                     affine ? x_z : nullptr,
                     true,
                     {g, codes.data(), format, s, affine ? z : nullptr},
                     {b, activation},
                     y.data(),
                     y_type},
                    threads);
  std::vector<int32_t> xs(size_t(M * K)), w(size_t(N * K));
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t m = 0; m < M; ++m)
      xs[size_t(m * K + k)] =
          int32_t(decode_one(x_format, code_at(x.data(), row_of(x_format), K, m, k), affine, x_z[m]));
    for (int64_t n = 0; n < N; ++n)
      w[size_t(n * K + k)] =
          int32_t(decode_one(format, code_at(codes.data(), row, K, n, k), affine, z[n / g.br * cols + k / g.bk]));
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      const float s_x = scale_one(x_format, x_s[m]);
      float total = 0;
      for (int64_t J = 0; J < cols; ++J) {
        const int64_t at = n / g.br * cols + J;
        int64_t d = 0;
        for (int64_t k = J * g.bk; k < std::min((J + 1) * g.bk, K); ++k)
          d += int64_t(xs[size_t(m * K + k)]) * w[size_t(n * K + k)];
        const float s_w = scale_one(format, s[at]);
        total = cols == 1 ? float(d) * s_x * s_w : total + float(d) * s_w;
      }
      if (cols != 1) total *= s_x;
      compare(where, m, n, code_at(y.data(), y_row, N, m, n),
              encode_one(y_type, activate(total + b[n], activation), false, false, 0));
    }
}

// Small integers and powers of two, so that every sum is exact in any order; one row of x is subnormal where its type
// reaches so far down. The weight is [g.M, K].
void check_dequant_matmul(const Ops& ops, Type x_type, Type format, bool affine, int64_t M, Grid g) {
  g.br = std::min(g.br, g.M), g.bk = std::min(g.bk, g.K);
  const std::string where = std::string(ops.isa) + " dequant_matmul " + std::to_string(int(format)) + " x " +
                            std::to_string(int(x_type)) + (affine ? " affine" : "") + " M " + std::to_string(M) +
                            " block " + std::to_string(g.br) + " x " + std::to_string(g.bk) + " of " +
                            std::to_string(g.M) + " x " + std::to_string(g.K);
  const auto activation = Activation(M % 2);
  const Row row = row_of(format), x_row = row_of(x_type);
  const int64_t N = g.M, K = g.K, cols = g.scale_cols(), blocks = g.scale_rows() * cols;
  bool is_fraction = false;
  for (uint32_t code = 0; row.bits == 4 && code < 16; ++code) {
    const float value = decode_one(format, code, false, 0);
    if (bits_of(value) & 0xffff) return;  // a table of such values has no exact sums
    is_fraction |= value * 8 != std::floor(value * 8);
  }
  const Buffer x(M * K * x_row.bytes, x_row.bytes), y(M * N * x_row.bytes, x_row.bytes), bias(N * 4, 4);
  const Buffer dx(x.size, x_row.bytes), dy(y.size, x_row.bytes);
  const Buffer codes(N * row_bytes(row, K), 1 + row.bits / 16), scale(blocks * 4, 4), zero_point(blocks * 4, 4);
  const auto fill_small = [](Type type, const Buffer& to, int64_t n, float unit) {
    const int bytes = row_of(type).bytes;
    for (int64_t e = 0; e < n; ++e) {
      const uint32_t code = encode_one(type, float(int32_t(random_bits() % 9) - 4) * unit, false, false, 0);
      std::memcpy(static_cast<char*>(to.data()) + e * bytes, &code, size_t(bytes));
    }
  };
  fill_small(x_type, x, M * K, 1), fill_small(x_type, dy, M * N, 1), fill_small(Type::float32, bias, N, 1);
  if (x_type != Type::float16 && !is_fraction) fill_small(x_type, x, K, float_of(8));
  if (is_int(format) || row.bits == 4) fill(Type::uint8, codes.data(), codes.size);
  else fill_small(format, codes, N * K, 1);
  auto* s = static_cast<float*>(scale.data());
  auto* z = affine ? static_cast<int32_t*>(zero_point.data()) : nullptr;
  for (int64_t at = 0; at < blocks; ++at) {
    s[at] = float(1 << random_bits() % 3) / 4;
    if (affine) z[at] = int32_t(random_bits() % 600) - 300;  // out of range: as good as the nearest inside
  }
  const auto* b = static_cast<float*>(bias.data());
  const Weight weight = {g, codes.data(), format, s, z};
  ops.dequant_matmul({M, x.data(), x_type, weight, {b, activation}, M % 3 == 0, y.data()}, threads);
  ops.dequant_matmul_backward({M, dy.data(), x_type, weight, dx.data()}, threads);

  std::vector<float> w(size_t(N * K));
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = n / g.br * cols + k / g.bk;
      w[size_t(n * K + k)] =
          decode_one(format, code_at(codes.data(), row, K, n, k), affine, affine ? z[at] : 0) * s[at];
    }
  const auto decoded = [=](const Buffer& of, int64_t columns) {
    std::vector<float> values(size_t(M * columns));
    for (int64_t e = 0; e < M * columns; ++e)
      values[size_t(e)] = decode_one(x_type, code_at(of.data(), x_row, M * columns, 0, e), false, 0);
    return values;
  };
  const std::vector<float> xs = decoded(x, K), dys = decoded(dy, N);
  const std::string backward = "backward of " + where;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float total = 0;
      for (int64_t k = 0; k < K; ++k) total += xs[size_t(m * K + k)] * w[size_t(n * K + k)];
      compare(where, m, n, code_at(y.data(), x_row, N, m, n),
              encode_one(x_type, activate(total + b[n], activation), false, false, 0));
    }
    for (int64_t k = 0; k < K; ++k) {
      float total = 0;
      for (int64_t n = 0; n < N; ++n) total += dys[size_t(m * N + n)] * w[size_t(n * K + k)];
      compare(backward, m, k, code_at(dx.data(), x_row, K, m, k), encode_one(x_type, total, false, false, 0));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
#ifdef WITH_AMX
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
#endif
  const Ops all[] = {
#define QL_ROW(OP, PROBLEM) TESTED_ISA::OP,
      {argc > 1 ? argv[1] : "", QL_KERNELS(QL_ROW)},
#undef QL_ROW
  };
  const Grid grids[] = {
      {1, 1, 1, 1},       {7, 13, 1, 1},    {7, 13, 7, 13},     {5, 35, 1, 35},
      {3, 1030, 3, 1030}, {6, 64, 1, 16},   {6, 37, 1, 16},     {9, 35, 1, 5},
      {10, 18, 4, 4},     {20, 33, 20, 1},  {9, 70, 2, 3},      {9, 131, 4, 64},
      {3, 2050, 2, 999},  {66, 129, 64, 7}, {2, 1500, 1, 1500}, {5, 9, INT64_MAX, INT64_MAX},
  };
  const Grid weights[] = {{1, 1, 1, 1},    {7, 13, 7, 13},  {9, 35, 1, 5},
                          {37, 64, 1, 64}, {6, 131, 4, 64}, {5, 2081, 1, 32}};
  const Grid blocked[] = {{70, 1100, 1, 1100}, {39, 1350, 1, 128}};  // several blocks of every axis
  const Grid shared[] = {{2, 300001, 2, 300001}, {150001, 4, 150001, 2}};
  for (const Ops& ops : all) {
    const auto is_cast = [](Type type) { return !is_int(type) && row_of(type).bits >= 8; };
    for (Type from : kTypes)
      for (Type to : kTypes)
        for (int64_t n : {1, 3, 15, 64, 67, 1024, 2500})
          if (is_cast(from) && is_cast(to)) check_cast(ops, from, to, n % 2, n);
    for (Type format : kTypes)
      for (Type x_type : {Type::float32, Type::float16, Type::bfloat16})
        for (bool affine : {false, true})
          if (format != Type::float32 && (!affine || is_int(format)))
            for (const Grid& grid : grids) {
              check_block(ops, x_type, format, affine, grid);
              check_fake(ops, x_type, format, affine, grid);
            }
    for (Type format : kTypes)
      for (Type x_format : kTypes)
        for (bool affine : {false, true})
          for (const Grid& grid : grids)
            for (int64_t M : {1, 8, 131})
              if (is_int(format) && is_int(x_format) && row_of(x_format).bits == 8)
                check_scaled_matmul(ops, x_format, format, affine, M, grid);
    check_scaled_matmul(ops, Type::int8, Type::int4, true, 9, {70, 5301, 1, 5301});  // several parts of each axis
    for (Type format : kTypes)
      for (Type x_type : {Type::float32, Type::float16, Type::bfloat16})
        for (bool affine : {false, true})
          if (format != Type::float32 && (!affine || is_int(format)))
            for (const Grid& grid : weights)
              for (int64_t M : {1, 6, grid.K < 100 ? 131 : 7})
                check_dequant_matmul(ops, x_type, format, affine, M, grid);
    for (Type format : kTypes)
      for (Type x_type : {Type::float32, Type::float16, Type::bfloat16})
        for (const Grid& grid : blocked)
          for (int64_t M : {3, 20, 70})
            if (format != Type::float32) check_dequant_matmul(ops, x_type, format, is_int(format) && M > 3, M, grid);
    for (const Grid& grid : shared) {
      check_block(ops, Type::bfloat16, Type::int4, true, grid);
      check_fake(ops, Type::bfloat16, Type::int4, true, grid);
    }
  }
  std::printf("%ld values, %ld wrong\n", long(compared), long(wrong));
  return wrong ? 1 : 0;
}
