// The ops on CPU tensors: the best instruction set of this machine, chosen when an op is first called.
#include <cstdlib>
#include <cstring>

#include "../fake_quantize_ops.h"
#include "../matmul_ops.h"
#include "kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace quantlib {
namespace {

struct Kernels {
  const char* isa;
#define QL_POINTER(OP, PROBLEM) void (*OP)(const PROBLEM&, ParallelFor);
  QL_KERNELS(QL_POINTER)
#undef QL_POINTER
};

#define QL_PLAIN(OP, PROBLEM) plain::OP,
#define QL_AVX2(OP, PROBLEM) avx2::OP,
#define QL_AVX512(OP, PROBLEM) avx512::OP,
#define QL_AVX512_BF16(OP, PROBLEM) avx512_bf16::OP,

// What this machine can run, the best last. __builtin_cpu_supports asks the operating system for the registers too.
std::vector<Kernels> supported() {
  std::vector<Kernels> all = {{"plain", QL_KERNELS(QL_PLAIN)}};
#ifdef __x86_64__
  unsigned eax, ebx, ecx = 0, edx;
  __builtin_cpu_init();
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    all.push_back({"avx2", QL_KERNELS(QL_AVX2)});
  if (all.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    all.push_back({"avx512", QL_KERNELS(QL_AVX512)});
  if (all.size() == 3 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi"))
    all.push_back({"avx512_bf16", QL_KERNELS(QL_AVX512_BF16)});
#endif
  return all;
}

Kernels choose() {
  const std::vector<Kernels> all = supported();
  const char* forced = std::getenv("QUANTLIB_ISA");
  if (!forced || !*forced) return all.back();
  std::string names;
  for (const Kernels& kernels : all) {
    if (!std::strcmp(kernels.isa, forced)) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels.isa);
  }
  throw std::runtime_error("quantlib: QUANTLIB_ISA must be one of " + names + " on this machine, got " + forced);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (end - begin <= grain) return body(begin, end, context);
  check_torch(torch_parallel_for(begin, end, grain, body, context));
}

struct Cpu {
  static constexpr bool reads_values = true;
  explicit Cpu(Device) {}
#define QL_FORWARD(OP, PROBLEM) \
  void OP(const PROBLEM& problem) const { kernels().OP(problem, parallel_for); }
  QL_KERNELS(QL_FORWARD)
#undef QL_FORWARD
};

}  // namespace
}  // namespace quantlib

// The instruction set in use, for `quantlib info`; empty where QUANTLIB_ISA asks for one that is not there.
extern "C" __attribute__((visibility("default"))) const char* quantlib_isa() {
  try {
    return quantlib::kernels().isa;
  } catch (const std::exception&) {
    return "";
  }
}

STABLE_TORCH_LIBRARY_IMPL(quantlib, CPU, m) {
  quantlib::register_ops<quantlib::Cpu>(m);
  quantlib::register_fake_quantize<quantlib::Cpu>(m);
  quantlib::register_dequant_matmuls<quantlib::Cpu>(m);
  quantlib::register_scaled_matmuls<quantlib::Cpu>(m);
}
