// Arguments of every kernel of this folder beside its problem. An <op>.cpp is compiled once per instruction set, with
// -DQL_ISA=<name> naming its namespace; backend.h chooses among them at run time and includes no code of theirs.
#pragma once
#include "../problem.h"

namespace quantlib {

// Calls body(begin, end, context) for pieces of [begin, end) of at least `grain`, on the threads of the caller's pool.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

// True if the kernels of avx2 may multiply bytes by AVX-VNNI, those of avx512_bf16 by the tiles of AMX.
bool has_avx_vnni();
bool has_amx();
// True if two dot products of bfloat16 take no longer than one fused multiply-add of float32: on AMD, not on Intel.
bool has_fast_pairs();

// The distance of codes from the weight, row by row: no op, but a measurement for the report of `quantize_`.
struct SquaredError {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type;
  const void* codes;  // [M, K], or fewer bytes where codes share them
  Type format;
  const float* scale;         // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
  double *signal, *noise;     // [M]
};

}  // namespace quantlib
