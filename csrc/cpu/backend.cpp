// The instruction set that this machine's kernels are of, and the threads that they run on.
#include "backend.h"
#include "matmul_choice.h"

#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quantlib {

QL_KERNEL(dequant_matmul_choice, DequantMatmulChoice)
QL_KERNEL(scaled_matmul_choice, ScaledMatmulChoice)

namespace {

// The levels of QUANTLIB_ISA, slowest first. Each runs the kernels compiled for `kernels`, an index of
// QL_KERNEL; avx2_vnni and amx are those of avx2 and avx512_bf16, some of which ask has_avx_vnni and has_amx.
struct Level {
  const char* name;
  int kernels;
};
constexpr Level kLevels[] = {{"plain", 0},  {"avx2", 1},        {"avx2_vnni", 1},
                             {"avx512", 2}, {"avx512_bf16", 3}, {"amx", 3}};
constexpr int kCount = sizeof kLevels / sizeof kLevels[0], kAvxVnni = 2, kAmx = 5;

#ifdef __x86_64__
// Linux gives a process the registers of AMX only when it asks for them: the threads that it starts have them too.
bool may_use_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

// Find the levels of this machine. __builtin_cpu_supports asks the operating system for the registers too.
void find_supported(bool (&can)[kCount]) {
  can[0] = true;
#ifdef __x86_64__
  unsigned eax, ebx, ecx = 0, edx = 0;
  __builtin_cpu_init();
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
  can[1] = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool leaf_7_1 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  can[kAvxVnni] = can[1] && leaf_7_1 && eax >> 4 & 1;
  can[3] = can[1] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  can[4] = can[3] && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
  const bool leaf_7 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
  can[kAmx] = can[4] && leaf_7 && (edx & amx) == amx && may_use_tiles();
#endif
}

int choose() {
  bool can[kCount] = {};
  find_supported(can);
  const char* forced = std::getenv("QUANTLIB_ISA");
  int last = 0;
  std::string names;
  for (int k = 0; k < kCount; ++k) {
    if (!can[k]) continue;
    if (forced && !std::strcmp(kLevels[k].name, forced)) return k;
    names += (names.empty() ? "" : ", ") + std::string(kLevels[k].name);
    last = k;
  }
  if (!forced || !*forced) return last;
  throw std::runtime_error("quantlib: QUANTLIB_ISA must be one of " + names + " on this machine, got " + forced);
}

int level() {
  static const int chosen = choose();
  return chosen;
}

}  // namespace

int isa() { return kLevels[level()].kernels; }
bool has_avx_vnni() { return level() == kAvxVnni; }
bool has_amx() { return level() == kAmx; }
#ifdef __x86_64__
bool has_fast_pairs() { return __builtin_cpu_is("amd"); }
#else
bool has_fast_pairs() { return false; }
#endif

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (end - begin <= grain) return body(begin, end, context);
  check_torch(torch_parallel_for(begin, end, grain, body, context));
}

}  // namespace quantlib

// The instruction set in use, for `quantlib info`; empty where QUANTLIB_ISA asks for one that is not there.
extern "C" __attribute__((visibility("default"))) const char* quantlib_isa() {
  try {
    return quantlib::kLevels[quantlib::level()].name;
  } catch (const std::exception&) {
    return "";
  }
}

// quantlib/measure.py calls it and has checked its arguments. Types are rows of the table by their number.
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

// The kernel of a product with M rows of x here, and why; for quantlib/cli/info.py, which has checked its arguments.
// x_type int8 is scaled_matmul.
extern "C" __attribute__((visibility("default"))) void quantlib_matmul_choice(int64_t M, int64_t N, int64_t K,
                                                                              int64_t br, int64_t bk, int format,
                                                                              int is_affine, int x_type,
                                                                              const char** kernel, const char** why) {
  using namespace quantlib;
  const MatmulQuestion asked = {.M = M,
                                .grid = {N, K, br, bk},
                                .format = Type(format),
                                .is_affine = is_affine != 0,
                                .x_type = Type(x_type),
                                .batch_invariant = false,
                                .kernel = kernel,
                                .why = why};
  if (asked.x_type == Type::int8) launch(ScaledMatmulChoice{asked});
  else launch(DequantMatmulChoice{asked});
}
