// The threads of the thread block that runs.
#pragma once
#include <cuda_runtime.h>

#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fiber.h"

namespace cuda_on_cpu {

extern std::mt19937 random_order;     // seeded by the test
extern int call;                      // of the test, for messages
extern std::set<uintptr_t> launched;  // addresses of kernels

// Ends the process: kernels are not to be gone on with.
[[noreturn]] void fail(const std::string& why);

// A place where threads wait for each other: the block's barrier, a warp's, or an exchange between lanes of a warp.
struct Meeting {
  enum Kind { none, block, warp, exchange } kind = none;
  int line = 0;
  uint32_t mask = 0;
  bool operator==(const Meeting& o) const { return kind == o.kind && line == o.line && mask == o.mask; }
};

// 16 bytes on their way to shared memory, the last of them zeros.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;  // null before it starts and after it has left
  bool left = false;
  Meeting at;
  int exchanges = 0;
  uint32_t shown[2][6];                   // what this lane gave to its last two exchanges
  std::vector<std::vector<Copy>> copies;  // in groups, the oldest first; the last is still open
};

class ThreadBlock {
 public:
  explicit ThreadBlock(const Launch& launch);

  void run();
  void wait(Meeting at);

  // Shows `values` to the lanes in `mask` and waits for theirs; the turn at which they lie.
  template <size_t N>
  int exchange(const uint32_t (&values)[N], uint32_t mask, int line) {
    Thread& me = threads_[current_];
    const int turn = me.exchanges++ % 2;  // a lane is at most one exchange ahead of the others
    std::copy_n(values, N, me.shown[turn]);
    wait({Meeting::exchange, line, mask});
    return turn;
  }

  // What lane `lane` of this thread's warp showed at `turn`.
  const uint32_t* shown(int lane, int turn) const { return threads_[current_ / 32 * 32 + unsigned(lane)].shown[turn]; }
  int lane() const { return int(current_ % 32); }
  unsigned current() const { return current_; }
  Thread& me() { return threads_[current_]; }
  bool on_stack(const void* p) const { return threads_[current_].fiber->has(p); }

  static inline ThreadBlock* running = nullptr;

 private:
  void resume(unsigned t);
  std::vector<unsigned> release();
  bool meet(const std::vector<unsigned>& threads, bool of_block) const;
  std::string waiting(const std::vector<unsigned>& present) const;

  std::function<void()> kernel_;
  std::vector<Thread> threads_;
  unsigned current_ = 0;
  // In every other block one warp at a time goes as far as it gets: what overtakes by a step must be seen, and by a
  // lap.
  const bool hurry_ = random_order() % 2;
  const unsigned favourite_ = unsigned(random_order());
};

}  // namespace cuda_on_cpu
