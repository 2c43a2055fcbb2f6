// The instruction set that this machine's kernels are of, and the threads that they run on.
#include "backend.h"

#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quantlib {
namespace {

// Each has what those before it have. Kernels for AMX are compiled with those for BF16.
constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether there are tiles of BF16 and the operating system lets this process use them.
bool best_has_amx() {
#ifdef __x86_64__
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// The last that this machine can run. __builtin_cpu_supports asks the operating system for the registers too.
int best() {
#ifdef __x86_64__
  unsigned eax, ebx, ecx = 0, edx;
  __builtin_cpu_init();
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
  return !bf16 ? 2 : best_has_amx() ? 4 : 3;
#else
  return 0;
#endif
}

int choose() {
  const int last = best();
  const char* forced = std::getenv("QUANTLIB_ISA");
  if (!forced || !*forced) return last;
  std::string names;
  for (int k = 0; k <= last; ++k) {
    if (!std::strcmp(kNames[k], forced)) return k;
    names += (names.empty() ? "" : ", ") + std::string(kNames[k]);
  }
  throw std::runtime_error("quantlib: QUANTLIB_ISA must be one of " + names + " on this machine, got " + forced);
}

}  // namespace

int isa() {
  static const int chosen = choose();
  return chosen;
}

bool has_amx() { return isa() == 4; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (end - begin <= grain) return body(begin, end, context);
  check_torch(torch_parallel_for(begin, end, grain, body, context));
}

}  // namespace quantlib

// The instruction set in use, for `quantlib info`; empty where QUANTLIB_ISA asks for one that is not there.
extern "C" __attribute__((visibility("default"))) const char* quantlib_isa() {
  try {
    return quantlib::kNames[quantlib::isa()];
  } catch (const std::exception&) {
    return "";
  }
}

// For quantlib/measure.py, which has checked its arguments. Types are rows of the table by their number.
extern "C" __attribute__((visibility("default"))) int quantlib_squared_error(
    const void* x, int x_type, const void* codes, int format, const float* scale, const int32_t* zero_point, int64_t M,
    int64_t K, int64_t br, int64_t bk, double* signal, double* noise) {
  try {
    quantlib::launch(quantlib::SquaredError{.grid = {M, K, br, bk},
                                            .x = x,
                                            .x_type = quantlib::Type(x_type),
                                            .codes = codes,
                                            .format = quantlib::Type(format),
                                            .scale = scale,
                                            .zero_point = zero_point,
                                            .signal = signal,
                                            .noise = noise});
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
