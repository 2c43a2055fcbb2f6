// Runs calls of csrc/cuda's ops: reads them from the file argv[1], writes every buffer as it is afterwards to argv[2],
// and the addresses of the kernels that ran to its output. Each buffer is exactly as large as the call says and begins
// `shift` bytes past an aligned address; what a call must write holds 0xa5 before it. Exit status 3: a kernel or a
// launch failed, and stderr says why.
#include <cuda_runtime.h>

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "absent.h"
#include "block.h"
#include "cuda/kernels.h"
#include "memory.h"
#include "numerics.h"

using namespace quantlib;
namespace memory = cuda_on_cpu::memory;

struct Call {
  int32_t op;  // in the order of ops.def; of a matmul 16 and its place in MATMULS of emulator.py, 32 and in FAKE
  Type from, to, result;
  uint8_t flag;  // saturate, tiled, x_per_row or lsq_mask
  Activation activation;
  uint32_t seed, buffers;
  Grid grid;
  int64_t M;  // of a matmul
};

struct Header {
  int64_t bytes, shift;
  int64_t given;  // 1: the bytes follow
};

class Buffer {
 public:
  Buffer(std::istream& in) {
    Header h;
    in.read(reinterpret_cast<char*>(&h), sizeof h);
    bytes_ = h.bytes, shift_ = h.shift;
    if (bytes_ < 0) return;
    memory_ = static_cast<char*>(std::malloc(2 * kGap + shift_ + bytes_));
    std::memset(data() - shift_ - kGuard, 0xa5, kGuard + shift_ + bytes_ + kGuard);
    if (h.given) in.read(data(), bytes_);
    known_ = std::make_unique<memory::Buffer>(data(), bytes_, h.given);
  }
  Buffer(Buffer&& other)
      : bytes_(other.bytes_),
        shift_(other.shift_),
        memory_(std::exchange(other.memory_, nullptr)),
        known_(std::move(other.known_)) {}
  ~Buffer() { std::free(memory_); }

  char* data() const { return memory_ ? memory_ + kGap + shift_ : nullptr; }
  bool overrun() const {
    const auto written = [&](const char* p, int64_t n) {
      return std::any_of(p, p + n, [](char c) { return c != '\xa5'; });
    };
    return memory_ && (written(data() - shift_ - kGuard, kGuard + shift_) || written(data() + bytes_, kGuard));
  }
  void write(std::ostream& out) const {
    if (memory_) out.write(data(), bytes_);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0, kGap = 0;  // so that it sees the first byte past the end
#else
  static constexpr int64_t kGuard = 64, kGap = 1 << 20;  // a row too far is still in no other buffer
#endif
  int64_t bytes_ = -1, shift_ = 0;
  char* memory_ = nullptr;
  std::unique_ptr<memory::Buffer> known_;
};

// total [M, n] += x [M, L] * w [L, n], w of these strides
static void multiply(Type type, const void* x, const void* w, float* total, int64_t M, int64_t n, int64_t L,
                     const int64_t (&strides)[2]) {
  const auto value = [&](const void* values, int64_t at) {
    const uint16_t code = static_cast<const uint16_t*>(values)[at];
    return type == Type::float16 ? decode_float<float16>(code) : decode_float<bfloat16>(code);
  };
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t l = 0; l < L; ++l)
        total[m * n + j] += value(x, m * L + l) * value(w, l * strides[0] + j * strides[1]);
}

// dequant_matmul and its gradient as csrc/cuda/slab.h has them, with two slabs and no byte to spare: `columns` of y, a
// multiple of `step` in the first slab.
template <class Decode, class Finish>
void in_slabs(Type type, const void* x, int64_t M, int64_t columns, int64_t L, int64_t step, bool transposed,
              Decode decode, Finish finish) {
  const int64_t half = (columns / 2 + step - 1) / step * step;
  for (int64_t first = 0; first < columns; first += half) {
    const int64_t end = std::min(first + half, columns), n = end - first;
    const auto slab = std::make_unique<uint16_t[]>(size_t(n * L));
    const auto total = std::make_unique<float[]>(size_t(M * n));
    const memory::Buffer known_slab(slab.get(), size_t(n * L) * 2, false),
        known_total(total.get(), size_t(M * n) * 4, true);
    const void* w = decode(first, end, slab.get());
    multiply(type, x, w, total.get(), M, n, L, {transposed ? n : 1, transposed ? 1 : L});
    finish(first, end, total.get());
  }
}

static void multiply_slabs(const DequantMatmul& p) {
  const Weight& weight = p.weight;
  const int64_t N = weight.grid.M, K = weight.grid.K;
  const bool scaled = weight.grid.bk < K;
  in_slabs(
      p.x_type, p.x, p.M, N, K, 16, false,
      [&](int64_t n, int64_t end, void* slab) {
        return cuda::decode_slab({weight, p.tiled, scaled, p.x_type, n, end, 0, K, slab}, nullptr);
      },
      [&](int64_t n, int64_t end, const float* total) {
        cuda::finish_slab({p.M, total, scaled ? nullptr : &weight, n, end, N, p.epilogue, p.x_type, p.y}, nullptr);
      });
}

static void multiply_slabs(const DequantMatmulBackward& p) {
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  in_slabs(
      p.dy_type, p.dy, p.M, K, N, 128, true,
      [&](int64_t k, int64_t end, void* slab) {
        return cuda::decode_slab({p.weight, false, true, p.dy_type, 0, N, k, end, slab}, nullptr);
      },
      [&](int64_t k, int64_t end, const float* total) {
        cuda::finish_slab({p.M, total, nullptr, k, end, K, {nullptr, Activation::none}, p.dy_type, p.dx}, nullptr);
      });
}

static void run(const Call& c, const std::vector<Buffer>& buffers) {
  const auto p = [&](int k) { return static_cast<void*>(buffers.at(k).data()); };
  const auto scale = [&](int k) { return reinterpret_cast<float*>(buffers.at(k).data()); };
  const auto zero_point = [&](int k) { return reinterpret_cast<int32_t*>(buffers.at(k).data()); };
  switch (c.op) {
    case 0:
      return cuda::cast({p(0), c.from, p(1), c.to, c.grid.K, c.flag != 0}, nullptr);
    case 1:
      return cuda::compute_scale({c.grid, p(0), c.from, c.to, scale(1), zero_point(2)}, nullptr);
    case 2:
      return cuda::quantize({c.grid, p(0), c.from, c.to, scale(1), zero_point(2), p(3)}, nullptr);
    case 3:
      return cuda::dequantize({c.grid, p(0), c.from, scale(1), zero_point(2), p(3), c.to}, nullptr);
    case 4:
      return cuda::quantize_dynamic({c.grid, p(0), c.from, c.to, p(1), scale(2), zero_point(3)}, nullptr);
    case 16: {
      const Weight w = {c.grid, p(1), c.to, scale(2), zero_point(3)};
      const DequantMatmul problem = {c.M, p(0), c.from, w, {scale(4), c.activation}, false, p(5), c.flag != 0};
      return cuda::takes_slabs(problem) ? multiply_slabs(problem) : cuda::dequant_matmul(problem, nullptr);
    }
    case 17: {
      const Weight w = {c.grid, p(1), c.to, scale(2), zero_point(3)};
      const DequantMatmulBackward problem = {c.M, p(0), c.from, w, p(4)};
      return cuda::takes_slabs(problem) ? multiply_slabs(problem) : cuda::dequant_matmul_backward(problem, nullptr);
    }
    case 18: {
      const Weight w = {c.grid, p(3), c.to, scale(4), zero_point(5)};
      return cuda::scaled_matmul(
          {c.M, p(0), c.from, scale(1), zero_point(2), c.flag != 0, w, {scale(6), c.activation}, p(7), c.result},
          nullptr);
    }
    case 32: {
      const int32_t* q = zero_point(3);  // qmin, qmax
      return cuda::fake_quantize({c.grid, p(0), c.from, c.to, scale(1), scale(2), q[0], q[1], p(4)}, nullptr);
    }
    case 33: {
      const int32_t* q = zero_point(4);
      return cuda::fake_quantize_backward({c.grid, p(0), p(1), c.from, c.to, scale(2), scale(3), q[0], q[1],
                                           c.flag != 0, 1.0f, p(5), scale(6), scale(7), scale(8)},
                                          nullptr);
    }
  }
}

int main(int, char** argv) {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // memory of a call is that of the next: no pages to clear
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  Call c;
  for (int n = 0; in.read(reinterpret_cast<char*>(&c), sizeof c); ++n) {
    std::vector<Buffer> buffers;
    for (uint32_t k = 0; k < c.buffers; ++k) buffers.emplace_back(in);
    cuda_on_cpu::random_order.seed(c.seed);
    cuda_on_cpu::call = n;
    try {
      run(c, buffers);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "call %d: %s\n", n, error.what());
      return 3;
    }
    for (const Buffer& buffer : buffers) {
      if (buffer.overrun()) {
        std::fprintf(stderr, "call %d: a kernel wrote outside of a buffer\n", n);
        return 3;
      }
      buffer.write(out);
    }
  }
  for (uintptr_t kernel : cuda_on_cpu::launched) std::printf("%zu\n", size_t(kernel));
  return out ? 0 : 1;
}
