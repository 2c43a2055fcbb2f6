// The tiles of AMX: eight registers of 16 rows of 64 bytes, and products of two of them. For functions that carry
// QL_TILES, in the kernels of avx512_bf16 where has_amx(); Tiles is alive around whatever uses them.
#pragma once
#if defined(__x86_64__) && defined(__AVX512VNNI__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>)
#include <immintrin.h>

#include "kernels.h"

#define QL_AMX
#define QL_TILES __attribute__((target("amx-tile,amx-int8,amx-bf16")))

namespace quantlib {
namespace QL_ISA {

// Every tile of this thread has 16 rows of 64 bytes, until the end of the scope.
class Tiles {
 public:
  QL_TILES Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));  // g++ 12 takes _tile_loadconfig to read its first eight bytes alone
  }
  QL_TILES ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The compiler does not know what memory a tile is loaded from or stored to: what it keeps in registers goes there
// before a load, and is read again after a store.
#define QL_TILE_MEMORY() asm volatile("" ::: "memory")

}  // namespace QL_ISA
}  // namespace quantlib
#endif
#endif
