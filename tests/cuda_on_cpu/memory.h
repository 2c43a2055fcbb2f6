// What is known of every byte that kernels may use: who wrote it and who read it, and what threads have waited for each
// other since. It watches nothing unless kernels were compiled to report their accesses, see tsan.cpp.
#pragma once
#include <cuda_runtime.h>

#include <vector>

namespace cuda_on_cpu {
namespace memory {

enum class Access { read, write, atomic };

// A buffer that kernels may use until it is gone; `written` tells whether it holds anything.
class Buffer {
 public:
  Buffer(const void* p, size_t bytes, bool written);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

 private:
  uintptr_t begin_;
};

// One access by the running thread, from the code at `from`. It ends the process where this is an error.
void touch(const void* p, size_t bytes, Access access, const void* from);
void write_from_host(const void* p, size_t bytes);

// The running thread asks for an asynchronous copy to p: nobody may read it until its thread has waited for it.
void start_copy(void* p, size_t bytes, const void* from);
void finish_copy(void* p, size_t bytes, const void* from);

// What the running thread knows to have happened is known to whoever learns of an atomic operation that it does next.
void fence();

void start_launch();
void start_block();
void meet_block();                                // all threads of the block
void meet(const std::vector<unsigned>& threads);  // threads of a warp

extern bool watched;  // whether accesses are reported

}  // namespace memory
}  // namespace cuda_on_cpu
