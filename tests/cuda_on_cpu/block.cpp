// Runs a grid. The launch configuration is the real one. Thread blocks run one after another in a random order; the
// threads of one are fibers that run in a random order between barriers, so what a missing barrier leaves to chance
// comes out wrong. A thread keeps its stack only if it waits: a kernel without barriers costs one switch a thread.
//
// Stricter than a GPU: threads that meet at a barrier, a shuffle or a product of matrices must have come from the same
// line, and a shuffle names no thread that has left.
#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "memory.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

std::mt19937 random_order;
int call = 0;
std::set<uintptr_t> launched;

void fail(const std::string& why) {
  std::string where;
  if (ThreadBlock::running)
    where = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": ";
  std::fprintf(stderr, "call %d: %s%s\n", call, where.c_str(), why.c_str());
  std::_Exit(3);
}

static std::vector<std::unique_ptr<Fiber>> spare;

ThreadBlock::ThreadBlock(const Launch& launch)
    : kernel_([&launch] { launch.start(launch); }), threads_(blockDim.size()) {}

void ThreadBlock::run() {
  memory::start_block();
  std::vector<unsigned> ready(threads_.size());
  for (unsigned t = 0; t < ready.size(); ++t) ready[t] = t;
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), random_order);
    for (unsigned t : ready) resume(t);
    ready = release();
  }
}

void ThreadBlock::wait(Meeting at) {
  threads_[current_].at = at;
  threads_[current_].fiber->suspend();
}

void ThreadBlock::resume(unsigned t) {
  Thread& thread = threads_[t];
  thread.at = {};
  current_ = t;
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  if (!thread.fiber && spare.empty()) thread.fiber = std::make_unique<Fiber>();
  if (!thread.fiber) {
    thread.fiber = std::move(spare.back());
    spare.pop_back();
  }
  if (!thread.fiber->run(kernel_)) return;
  for (const auto& group : thread.copies)
    if (!group.empty()) fail("it left without waiting for its asynchronous copies");
  thread.left = true;
  spare.push_back(std::move(thread.fiber));
}

// The threads that may go on: of the meetings that are complete, some.
std::vector<unsigned> ThreadBlock::release() {
  std::vector<std::vector<unsigned>> complete;
  std::vector<unsigned> present;
  for (unsigned t = 0; t < threads_.size(); ++t)
    if (!threads_[t].left) present.push_back(t);
  if (present.empty()) return {};
  if (meet(present, true)) complete.push_back(present);
  for (unsigned first = 0; first < threads_.size(); first += 32) {
    const Thread* lane = nullptr;
    for (unsigned t = first; t < std::min<size_t>(first + 32, threads_.size()); ++t)
      if (threads_[t].at.kind >= Meeting::warp) lane = &threads_[t];
    if (!lane) continue;
    std::vector<unsigned> named;
    for (unsigned t = first; t < first + 32; ++t)
      if (lane->at.mask >> (t % 32) & 1) {
        if (t >= threads_.size() || threads_[t].left)
          fail("a shuffle names a lane that has left, line " + std::to_string(lane->at.line));
        named.push_back(t);
      }
    if (meet(named, false)) complete.push_back(named);
  }
  if (complete.empty()) fail("deadlock: " + waiting(present));
  if (hurry_) {
    std::swap(complete[0], complete[favourite_ % complete.size()]);
    complete.resize(1);
  } else {
    std::shuffle(complete.begin(), complete.end(), random_order);
    complete.resize(1 + random_order() % complete.size());  // the others are late
  }
  std::vector<unsigned> ready;
  for (const auto& threads : complete) {
    const Meeting::Kind kind = threads_[threads[0]].at.kind;
    if (kind == Meeting::block) memory::meet_block();
    if (kind == Meeting::warp) memory::meet(threads);
    ready.insert(ready.end(), threads.begin(), threads.end());
  }
  return ready;
}

bool ThreadBlock::meet(const std::vector<unsigned>& threads, bool of_block) const {
  const Meeting& at = threads_[threads[0]].at;
  return of_block == (at.kind == Meeting::block) &&
         std::all_of(threads.begin(), threads.end(), [&](unsigned t) { return threads_[t].at == at; });
}

std::string ThreadBlock::waiting(const std::vector<unsigned>& present) const {
  static const char* const names[] = {"", "barrier", "barrier of a warp", "shuffle"};
  std::string text;
  for (size_t k = 0; k < present.size(); ++k) {
    const Meeting& at = threads_[present[k]].at;
    size_t same = 1;
    while (k + 1 < present.size() && threads_[present[k + 1]].at == at) ++same, ++k;
    if (text.size() > 200) return text + "...";
    text += std::to_string(same) + " threads at the " + names[at.kind] + " of line " + std::to_string(at.line) + "; ";
  }
  return text;
}

cudaError_t launch(const Launch& launch, dim3 grid, dim3 block) {
  if (grid.size() == 0 || block.size() == 0 || block.size() > 1024 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  launched.insert(uintptr_t(launch.kernel));
  memory::start_launch();
  gridDim = grid, blockDim = block;
  std::vector<size_t> order(grid.size());
  for (size_t b = 0; b < order.size(); ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), random_order);
  for (size_t b : order) {
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    ThreadBlock thread_block(launch);
    ThreadBlock::running = &thread_block;
    thread_block.run();
    ThreadBlock::running = nullptr;
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
