// g++ -fsanitize=thread puts a call of these before each load and store of memory that others may see. Here they are
// not those of its library.
#include <cstdio>
#include <cstdlib>

#include "block.h"
#include "memory.h"

using cuda_on_cpu::memory::Access;
using cuda_on_cpu::memory::touch;

static void touch_aligned(const void* p, size_t bytes, Access access, const void* from) {
  if (uintptr_t(p) % bytes && cuda_on_cpu::memory::watched && cuda_on_cpu::ThreadBlock::running) {
    char text[96];
    std::snprintf(text, sizeof text, "misaligned: %zu bytes at %p, from %p", bytes, p, from);
    cuda_on_cpu::fail(text);
  }
  touch(p, bytes, access, from);
}

extern "C" {
#define TOUCH(BYTES)                                                                                         \
  void __tsan_read##BYTES(void* p) { touch_aligned(p, BYTES, Access::read, __builtin_return_address(0)); }   \
  void __tsan_write##BYTES(void* p) { touch_aligned(p, BYTES, Access::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##BYTES(void* p) { touch(p, BYTES, Access::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##BYTES(void* p) { touch(p, BYTES, Access::write, __builtin_return_address(0)); }
TOUCH(1)
TOUCH(2)
TOUCH(4)
TOUCH(8)
TOUCH(16)
#undef TOUCH
void __tsan_read_range(void* p, size_t n) { touch(p, n, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { touch(p, n, Access::write, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {
  const char* unwatched = std::getenv("CUDA_ON_CPU_UNWATCHED");
  cuda_on_cpu::memory::watched = !unwatched || !*unwatched;
}
}
