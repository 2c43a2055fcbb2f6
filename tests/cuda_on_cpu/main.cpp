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
#include "memory.h"
#include "numerics.h"

using namespace quantlib;
namespace memory = cuda_on_cpu::memory;

struct Call {
  int32_t op;  // as in ops.def; of a matmul 16 and its place in MATMULS of emulator.py; 32, 48 and 64 likewise
  Type from, to, result;
  uint8_t flag;  // saturate, tiled, x_per_row or lsq_mask
  Activation activation;
  uint32_t seed, buffers;
  Grid grid;
  int64_t M;  // of a matmul; rows of x of a grouped one
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
  int64_t bytes() const { return bytes_; }
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

// What the slabs of csrc/cuda/slab.cu ask torch for: memory with no byte to spare, and a product.
class Torch : public cuda::Torch {
 public:
  void* allocate(int64_t bytes) override {
    memory_.push_back(std::make_unique<char[]>(size_t(bytes)));
    known_.push_back(std::make_unique<memory::Buffer>(memory_.back().get(), size_t(bytes), false));
    return memory_.back().get();
  }
  void multiply(const cuda::Matrix& x, const cuda::Matrix& w, Type type, float* sums) override {
    const auto value = [&](const cuda::Matrix& m, int64_t i, int64_t j) {
      const uint16_t code = static_cast<const uint16_t*>(m.data)[i * m.strides[0] + j * m.strides[1]];
      return type == Type::float16 ? decode_float<float16>(code) : decode_float<bfloat16>(code);
    };
    memory::write_from_host(sums, size_t(x.rows * w.columns) * 4);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < w.columns; ++j) {
        float& sum = sums[i * w.columns + j] = 0.0f;
        for (int64_t l = 0; l < x.columns; ++l) sum += value(x, i, l) * value(w, l, j);
      }
  }

 private:
  std::vector<std::unique_ptr<char[]>> memory_;
  std::vector<std::unique_ptr<memory::Buffer>> known_;  // destroyed first
};

static void run(const Call& c, const std::vector<Buffer>& buffers) {
  Torch torch;
  const cuda::Stream stream = {nullptr, &torch};
  const auto p = [&](int k) { return static_cast<void*>(buffers.at(k).data()); };
  const auto scale = [&](int k) { return reinterpret_cast<float*>(buffers.at(k).data()); };
  const auto zero_point = [&](int k) { return reinterpret_cast<int32_t*>(buffers.at(k).data()); };
  switch (c.op) {
    case 0:
      return cuda::cast({p(0), c.from, p(1), c.to, c.grid.K, c.flag != 0}, stream);
    case 1:
      return cuda::compute_scale({c.grid, p(0), c.from, c.to, scale(1), zero_point(2)}, stream);
    case 2:
      return cuda::quantize({c.grid, p(0), c.from, c.to, scale(1), zero_point(2), p(3)}, stream);
    case 3:
      return cuda::dequantize({c.grid, p(0), c.from, scale(1), zero_point(2), p(3), c.to}, stream);
    case 4:
      return cuda::quantize_dynamic({c.grid, p(0), c.from, c.to, p(1), scale(2), zero_point(3)}, stream);
    case 16: {
      const Weight w = {c.grid, p(1), c.to, scale(2), zero_point(3)};
      return cuda::dequant_matmul({c.M, p(0), c.from, w, {scale(4), c.activation}, false, p(5), c.flag != 0}, stream);
    }
    case 17: {
      const Weight w = {c.grid, p(1), c.to, scale(2), zero_point(3)};
      return cuda::dequant_matmul_backward({c.M, p(0), c.from, w, p(4)}, stream);
    }
    case 18: {
      const Weight w = {c.grid, p(3), c.to, scale(4), zero_point(5)};
      return cuda::scaled_matmul(
          {c.M, p(0), c.from, scale(1), zero_point(2), c.flag != 0, w, {scale(6), c.activation}, p(7), c.result},
          stream);
    }
    case 64: {
      const Weight w = {c.grid, p(1), c.to, scale(2), zero_point(3)};
      const Groups groups = {buffers.at(4).bytes() / 4, c.M, zero_point(4)};
      return cuda::grouped_dequant_matmul({{c.M, p(0), c.from, w, {scale(5), c.activation}, false, p(6)}, groups},
                                          stream);
    }
    case 48:  // the block of the states is M; the place of the matrix in the whole parameter, those of a block
      return cuda::adamw_step({c.grid.M, c.grid.K, c.M, p(0), p(1), c.from, p(2), p(3), scale(4), scale(5), scale(6),
                               zero_point(7), c.grid.br, c.grid.bk, p(8), p(9), p(10), scale(11), scale(12)},
                              stream);
    case 32: {
      const int32_t* q = zero_point(3);  // qmin, qmax
      return cuda::fake_quantize({c.grid, p(0), c.from, c.to, scale(1), scale(2), q[0], q[1], p(4)}, stream);
    }
    case 33: {
      const int32_t* q = zero_point(4);
      return cuda::fake_quantize_backward({c.grid, p(0), p(1), c.from, c.to, scale(2), scale(3), q[0], q[1],
                                           c.flag != 0, 1.0f, p(5), scale(6), scale(7), scale(8)},
                                          stream);
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
