// Kernels that are right, and with FAULT have one error of the kind that a person makes: what has to be caught by those
// who run kernels here. argv: the kernel, 0 or 1 for FAULT, a seed for the order of threads. Where an error stands, its
// line says so: "fault".
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

#include "block.h"
#include "cuda/intrinsics.cuh"
#include "memory.h"

using namespace quantlib::cuda;

namespace {

constexpr int kBlock = 64, kBlocks = 3, kWords = kBlock * kBlocks;

struct Args {
  const uint32_t* x;  // [kWords + 4]
  uint32_t* y;        // [kWords]
  uint32_t* ticket;   // [1], zero
};

QL_DEVICE int me() { return int(threadIdx.x); }
QL_DEVICE int at() { return int(blockIdx.x) * kBlock + me(); }

// ---- addresses ------------------------------------------------------------------------------------------------------

template <bool FAULT>
__global__ void read_past_the_end(const Args a) {
  a.y[at()] = a.x[FAULT && at() == kWords - 1 ? kWords + 4 : at()];  // fault
}

template <bool FAULT>
__global__ void read_before_the_start(const Args a) {
  a.y[at()] = a.x[FAULT ? at() - 1 : at()];  // fault
}

template <bool FAULT>
__global__ void write_past_the_end(const Args a) {
  a.y[FAULT ? at() + 1 : at()] = a.x[at()];  // fault
}

template <bool FAULT>
__global__ void read_a_row_too_far(const Args a) {
  a.y[at()] = a.x[FAULT && me() == 0 ? at() + 16384 : at()];  // fault
}

template <bool FAULT>
__global__ void shared_past_the_end(const Args a) {
  __shared__ uint32_t one[kBlock], other[kBlock];
  one[me()] = other[me()] = a.x[at()];
  const uint32_t* p = one + me();
  a.y[at()] = p[FAULT && me() == kBlock - 1 ? 1 : 0] + other[me()];  // fault
}

template <bool FAULT>
__global__ void index_of_a_shared_array(const Args a) {
  __shared__ uint32_t rows[4][kBlock];
  rows[1][me()] = rows[0][me()] = a.x[at()];
  a.y[at()] = rows[0][FAULT && me() == kBlock - 1 ? me() + 1 : me()];  // fault
}

template <bool FAULT>
__global__ void index_of_registers(const Args a) {
  uint32_t x[4] = {};
  for (int k = 0; k < (FAULT ? 5 : 4); ++k) x[k] = a.x[at()];  // fault
  a.y[at()] = x[me() % 4];
}

template <bool FAULT>
__global__ void misaligned(const Args a) {
  const auto four = Vector<uint32_t, 4>::load(a.x + at() / 4 * 4 + (FAULT ? 2 : 0));  // fault
  a.y[at()] = four[me() % 4];
}

template <bool FAULT>
__global__ void misaligned_store(const Args a) {
  if (me() >= kBlock / 4 - 1) return;
  Vector<uint32_t, 4>::zero().store(a.y + int(blockIdx.x) * kBlock + me() * 4 + (FAULT ? 1 : 0));  // fault
}

template <bool FAULT>
__global__ void misaligned_shared(const Args a) {
  __shared__ uint32_t x[16][FAULT ? 5 : 8];                   // rows of 20 bytes
  if (me() < 16) Vector<uint32_t, 4>::zero().store(x[me()]);  // fault
  __syncthreads();
  a.y[at()] = x[me() / 4][me() % 4];
}

template <bool FAULT>
__global__ void shift_by_the_width(const Args a) {
  a.y[at()] = a.x[at()] << (FAULT ? me() % 33 : me() % 32);  // fault
}

// ---- shared memory --------------------------------------------------------------------------------------------------

template <bool FAULT>
__global__ void missing_barrier(const Args a) {
  __shared__ uint32_t x[kBlock];
  x[me()] = a.x[at()];  // fault
  if (!FAULT) __syncthreads();
  a.y[at()] = x[kBlock - 1 - me()];  // fault
}

template <bool FAULT>
__global__ void overwritten_while_read(const Args a) {
  __shared__ uint32_t x[kBlock];
  uint32_t sum = 0;
  for (int round = 0; round < 3; ++round) {
    x[me()] = a.x[at()] + uint32_t(round);  // fault
    __syncthreads();
    sum += x[kBlock - 1 - me()];  // fault
    if (!FAULT) __syncthreads();
  }
  a.y[at()] = sum;
}

template <bool FAULT>
__global__ void never_written(const Args a) {
  __shared__ uint32_t x[kBlock];
  if (!FAULT || blockIdx.x == 1) x[me()] = a.x[at()];  // the other blocks may find what this one wrote
  __syncthreads();
  a.y[at()] = x[kBlock - 1 - me()];  // fault
}

template <bool FAULT>
__global__ void two_writers(const Args a) {
  __shared__ uint32_t x[kBlock];
  x[FAULT ? me() / 2 : me()] = a.x[at()];  // fault
  __syncthreads();
  a.y[at()] = x[me() / 2];
}

template <bool FAULT>
__global__ void neighbouring_bytes(const Args a) {
  __shared__ uint8_t x[kBlock + 1];
  x[me()] = uint8_t(a.x[at()]);  // fault
  if (FAULT) x[me() + 1] = 0;    // fault
  __syncthreads();
  a.y[at()] = x[me()];
}

template <bool FAULT>
__global__ void warp_for_block(const Args a) {
  __shared__ uint32_t x[kBlock];
  x[me()] = a.x[at()];  // fault
  if (FAULT) __syncwarp();
  else __syncthreads();
  a.y[at()] = x[kBlock - 1 - me()];  // fault
}

template <bool FAULT>
__global__ void half_a_warp(const Args a) {
  __shared__ uint32_t x[kBlock];
  x[me()] = a.x[at()];  // fault
  __syncwarp(FAULT ? (me() & 16 ? 0xffff0000u : 0xffffu) : 0xffffffffu);
  a.y[at()] = x[me() ^ 16];  // fault
}

// A shuffle brings lanes together, but promises nothing about memory.
template <bool FAULT>
__global__ void shuffle_for_barrier(const Args a) {
  __shared__ uint32_t x[kBlock];
  x[me()] = a.x[at()];  // fault
  const int32_t other = __shfl_xor_sync(0xffffffffu, me(), 1);
  if (!FAULT) __syncwarp();
  a.y[at()] = x[other];  // fault
}

// ---- who meets ------------------------------------------------------------------------------------------------------

template <bool FAULT>
__global__ void divergent_barrier(const Args a) {
  if (FAULT && me() < 32) {
    __syncthreads();  // fault
  } else {
    __syncthreads();  // fault
  }
  a.y[at()] = a.x[at()];
}

template <bool FAULT>
__global__ void barrier_in_a_branch(const Args a) {
  if (!FAULT || me() % 2) __syncthreads();                                // fault
  a.y[at()] = uint32_t(__shfl_sync(0xffffffffu, int32_t(a.x[at()]), 0));  // fault
}

template <bool FAULT>
__global__ void a_lane_that_left(const Args a) {
  if (FAULT && me() == kBlock - 1) return;
  a.y[at()] = __ballot_sync(0xffffffffu, a.x[at()] % 2);  // fault
}

template <bool FAULT>
__global__ void lane_outside_of_the_mask(const Args a) {
  const uint32_t mask = FAULT && me() % 32 < 16 ? 0xffffu : FAULT ? 0xffff0000u : 0xffffffffu;
  a.y[at()] = uint32_t(__shfl_xor_sync(mask, me(), 16));  // fault
}

// No fault: x where every vote and shuffle gives what it should.
template <bool>
__global__ void votes_and_shuffles(const Args a) {
  const int lane = me() % 32;
  const uint32_t all = 0xffffffffu, odd = __ballot_sync(all, lane % 2);
  const bool right = odd == 0xaaaaaaaau && __any_sync(all, lane == 3) && !__any_sync(all, lane == 32) &&
                     __all_sync(all, lane < 32) && !__all_sync(all, lane < 31) && __shfl_sync(all, lane, 5) == 5 &&
                     __shfl_xor_sync(all, lane, 6) == (lane ^ 6) &&
                     __shfl_up_sync(all, lane, 3) == (lane < 3 ? lane : lane - 3) &&
                     __shfl_down_sync(all, lane, 3) == (lane > 28 ? lane : lane + 3);
  a.y[at()] = right ? a.x[at()] : 0;
}

// ---- memory of all blocks -------------------------------------------------------------------------------------------

template <bool FAULT>
__global__ void blocks_write_the_same(const Args a) {
  a.y[FAULT ? me() : at()] = a.x[at()];  // fault
}

template <bool FAULT>
__global__ void block_reads_another(const Args a) {
  a.y[at()] = a.x[at()];                                 // fault
  if (FAULT && blockIdx.x == 1) a.y[at()] += a.y[me()];  // fault
  if (FAULT && blockIdx.x == 0) a.y[me()] = 1;           // fault
}

template <bool FAULT>
__global__ void sum_without_an_atomic(const Args a) {
  if (FAULT) *a.ticket += a.x[at()];  // fault
  else atomicAdd(a.ticket, a.x[at()]);
  a.y[at()] = 0;
}

template <bool FAULT>
__global__ void reads_an_output(const Args a) {
  if (FAULT) a.y[at()] += a.x[at()];  // fault
  else a.y[at()] = a.x[at()];
}

// The last block to take a ticket adds what all have left.
template <bool FAULT>
__global__ void ticket_without_a_fence(const Args a) {
  __shared__ bool last;
  a.y[at()] = a.x[at()];  // fault
  __syncthreads();
  if (me() == 0) {
    if (!FAULT) __threadfence();
    last = atomicAdd(a.ticket, 1) == kBlocks - 1;
  }
  __syncthreads();
  if (!last || me() != 0) return;
  uint32_t sum = 0;
  for (int k = 0; k < kWords; ++k) sum += a.y[k];  // fault
  *a.ticket = 0;
  a.y[0] = sum;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

enum class Copy { right, not_waited, not_met, one_group_left, overwritten, written, left };

// y = x, by way of two buffers that take turns
template <Copy FAULT>
__global__ void copies(const Args a) {
  __shared__ __attribute__((aligned(16))) uint32_t x[2][kBlock];
  const auto fetch = [&](int block, int buffer) {
    if (me() < kBlock / 4) copy_async(&x[buffer][me() * 4], a.x + block * kBlock + me() * 4);  // fault
    commit_copies();
  };
  fetch(0, 0);
  for (int block = 0; block < kBlocks; ++block) {
    fetch((block + 1) % kBlocks, (block + 1) % 2);  // fault
    if (FAULT == Copy::one_group_left) wait_copies<2>();
    else if (FAULT != Copy::not_waited) wait_copies<1>();  // fault
    if (FAULT != Copy::not_met) __syncthreads();
    if (FAULT == Copy::written && me() == 0) x[(block + 1) % 2][0] = 0;  // fault
    const uint32_t word = x[block % 2][kBlock - 1 - me()];               // fault
    if (int(blockIdx.x) == block) a.y[block * kBlock + kBlock - 1 - me()] = word;
    if (FAULT != Copy::overwritten) __syncthreads();
  }
  if (FAULT != Copy::left) wait_copies<0>();
}

// ---- the host -------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Args);
// clang-format off
#define BOTH(NAME) {#NAME, {NAME<false>, NAME<true>}}
#define COPY(NAME) {"copy_" #NAME, {copies<Copy::right>, copies<Copy::NAME>}}
const std::map<std::string, std::pair<Kernel, Kernel>> kernels = {
    BOTH(read_past_the_end), BOTH(read_before_the_start), BOTH(write_past_the_end), BOTH(read_a_row_too_far),
    BOTH(shared_past_the_end), BOTH(index_of_a_shared_array), BOTH(index_of_registers), BOTH(misaligned),
    BOTH(misaligned_store), BOTH(misaligned_shared), BOTH(shift_by_the_width), BOTH(missing_barrier),
    BOTH(overwritten_while_read), BOTH(never_written), BOTH(two_writers), BOTH(neighbouring_bytes),
    BOTH(warp_for_block), BOTH(half_a_warp), BOTH(shuffle_for_barrier), BOTH(divergent_barrier),
    BOTH(barrier_in_a_branch), BOTH(a_lane_that_left), BOTH(lane_outside_of_the_mask), BOTH(votes_and_shuffles),
    BOTH(blocks_write_the_same), BOTH(block_reads_another), BOTH(sum_without_an_atomic), BOTH(reads_an_output),
    BOTH(ticket_without_a_fence), COPY(not_waited), COPY(not_met), COPY(one_group_left), COPY(overwritten),
    COPY(written), COPY(left)
};
// clang-format on

template <int WORDS>
class Words {
 public:
  explicit Words(bool written) : known_(words_, sizeof words_, written) {
    for (int k = 0; k < WORDS; ++k) words_[k] = written ? uint32_t(k * 7) : 0xa5a5a5a5u;
  }
  uint32_t* get() { return words_; }

 private:
  alignas(16) uint32_t words_[WORDS];
  cuda_on_cpu::memory::Buffer known_;
};

}  // namespace

int main(int, char** argv) {
  const auto kernel = kernels.find(argv[1]);
  if (kernel == kernels.end()) return 2;
  cuda_on_cpu::random_order.seed(unsigned(std::atoi(argv[3])));
  Words<kWords + 4> x(true);
  Words<kWords> y(false);
  Words<1> ticket(true);
  *ticket.get() = 0;
  const auto run = argv[2][0] == '1' ? kernel->second.second : kernel->second.first;
  launch("fault", run, kBlocks, kBlock, {}, Args{x.get(), y.get(), ticket.get()});
  for (int k = 0; k < kWords; ++k) std::printf("%u\n", y.get()[k]);
}
