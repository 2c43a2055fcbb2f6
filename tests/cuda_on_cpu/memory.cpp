// A happens-before race detector in the manner of FastTrack (Flanagan and Freund, 2009): each thread has a vector clock
// of its warp, each byte has shadow memory that says who wrote and read it last, and atomic operations release and
// acquire.
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>

#include "block.h"
#include "image.h"

namespace cuda_on_cpu {
namespace memory {

bool watched = false;

namespace {

// Every barrier of a block, every block and every launch begins a time: blocks run one after another, so a time says
// which block and launch it was.
uint32_t now = 1, launch_began = 1, block_began = 1, barrier_passed = 1;
// The vector clock of thread t: clocks[t][l] counts how much of what lane l of its warp did happens before t goes on.
uint32_t clocks[1024][32];

struct Event {
  uint32_t time = 0;   // 0: never
  uint32_t clock = 0;  // the thread's own, of its vector clock
  uint32_t from = 0;   // the code's address
  uint16_t thread = 0;
  bool atomic = false;
};

// What happens before a fence of a thread of a block that is over: all that the thread did, of others what was before a
// barrier.
struct Release {
  uint32_t block_began, barrier_passed, fence;
  uint16_t thread;
};
std::map<uintptr_t, std::vector<Release>> released;  // by atomic operations at this address, in this launch
// What this block has acquired so, at what time and by which thread; the others have it after a barrier.
struct Acquire {
  Release release;
  uint32_t time;
  uint16_t thread;
};
std::vector<Acquire> acquired;
std::vector<Release> fences;  // of this block

struct Shadow {
  Event written, read;         // last
  Event in_another_block;      // one that read it, before those in this one
  int32_t first_reader = -1;   // an index into `readers`: others that read it since the last barrier,
  uint32_t readers_since = 0;  // this one
  bool in_flight = false;      // an asynchronous copy to it has not been waited for
};

struct Reader {
  Event event;
  int32_t next;
};
std::vector<Reader> readers;  // since the last barrier

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool shared, written;
  std::vector<Shadow> bytes;  // made when it is first used
};
std::deque<Region> buffers;
std::vector<Region> shared;  // by address
Region* last = nullptr;

std::string hex(uintptr_t p) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", size_t(p));
  return text;
}

bool is_at(uintptr_t p, size_t bytes, const Region& r) { return r.begin <= p && p + bytes <= r.end; }

Region* find(uintptr_t p, size_t bytes) {
  if (last && is_at(p, bytes, *last)) return last;
  for (Region& r : buffers)
    if (is_at(p, bytes, r)) return last = &r;
  const auto after = [&](const Region& r) { return r.begin <= p; };
  const auto next = std::partition_point(shared.begin(), shared.end(), after);
  return next != shared.begin() && is_at(p, bytes, next[-1]) ? last = &next[-1] : nullptr;
}

// Where p is, for who has gone too far.
std::string near(uintptr_t p) {
  const Region* nearest = nullptr;
  const auto distance = [&](const Region& r) { return p < r.begin ? r.begin - p : p - r.begin; };
  const auto compare = [&](const Region& r) {
    if (!nearest || distance(r) < distance(*nearest)) nearest = &r;
  };
  std::for_each(buffers.begin(), buffers.end(), compare);
  std::for_each(shared.begin(), shared.end(), compare);
  if (!nearest) return "of which there is none";
  return std::to_string(distance(*nearest)) + (p < nearest->begin ? " bytes before " : " bytes into ") + nearest->name +
         " of " + std::to_string(nearest->end - nearest->begin);
}

Event event_of(const void* from, bool atomic) {
  const unsigned thread = ThreadBlock::running->current();
  return {now, clocks[thread][thread % 32], uint32_t(uintptr_t(from)), uint16_t(thread), atomic};
}

bool was_acquired(const Event& e, const Event& me) {
  return std::any_of(acquired.begin(), acquired.end(), [&](const Acquire& acquire) {
    const Release& of = acquire.release;
    return (acquire.time < barrier_passed || acquire.thread == me.thread) && of.block_began <= e.time &&
           (e.time < of.barrier_passed || (e.time <= of.fence && e.thread == of.thread));
  });
}

// An atomic operation releases what happens before the thread's last fence, and acquires what others released there.
void synchronize(uintptr_t p, const Event& me) {
  for (const Release& release : released[p])
    if (release.block_began < block_began) acquired.push_back({release, now, me.thread});
  const auto fence =
      std::find_if(fences.rbegin(), fences.rend(), [&](const Release& f) { return f.thread == me.thread; });
  if (fence != fences.rend()) released[p].push_back(*fence);
}

// Whether what happened is sure to have happened before the running thread goes on; each block has its own shared
// arrays.
bool happens_before(const Region& r, const Event& e, const Event& me) {
  if (e.time < launch_began) return true;
  if (e.time < block_began) return r.shared || was_acquired(e, me);
  return e.time < barrier_passed || e.thread == me.thread ||
         (e.thread / 32 == me.thread / 32 && clocks[me.thread][e.thread % 32] >= e.clock);
}

[[noreturn]] void race(const char* what, const Region& r, uintptr_t p, const Event& me, const Event& other) {
  const std::string who =
      other.time < block_began ? "another block" : "thread " + std::to_string(other.thread) + " of the same block";
  fail("race: it " + std::string(what) + " at byte " + std::to_string(p - r.begin) + " of " + r.name + ", from " +
       hex(me.from) + "; " + who + " did from " + hex(other.from));
}

void check_readers(const Region& r, uintptr_t p, const Shadow& b, const Event& me) {
  const auto check = [&](const Event& reader) {
    if (!happens_before(r, reader, me) && !(reader.atomic && me.atomic)) race("writes what is read", r, p, me, reader);
  };
  check(b.read);
  check(b.in_another_block);
  if (b.readers_since == barrier_passed)
    for (int32_t k = b.first_reader; k >= 0; k = readers[size_t(k)].next) check(readers[size_t(k)].event);
}

void add_reader(const Region& r, Shadow& b, const Event& me) {
  if (b.read.time >= launch_began && b.read.time < block_began) {
    b.in_another_block = b.read;
  } else if (b.read.thread != me.thread && !happens_before(r, b.read, me)) {
    readers.push_back({b.read, b.readers_since == barrier_passed ? b.first_reader : -1});
    b.first_reader = int32_t(readers.size()) - 1, b.readers_since = barrier_passed;
  }
  b.read = me;
}

void check_written(const Region& r, uintptr_t p, const Shadow& b, const Event& me) {
  const bool written = r.shared ? b.written.time >= block_began : r.written || b.written.time;
  if (!written)
    fail("it reads byte " + std::to_string(p - r.begin) + " of " + r.name + ", which nobody wrote, from " +
         hex(me.from));
}

void read(const Region& r, uintptr_t p, Shadow& b, const Event& me) {
  if (b.in_flight) fail("it reads an asynchronous copy that nobody has waited for, from " + hex(me.from));
  check_written(r, p, b, me);
  if (!happens_before(r, b.written, me)) race("reads what is written", r, p, me, b.written);
  add_reader(r, b, me);
}

void write(const Region& r, uintptr_t p, Shadow& b, const Event& me) {
  if (b.in_flight) fail("it writes where an asynchronous copy is on its way, from " + hex(me.from));
  if (me.atomic) check_written(r, p, b, me);
  if (!happens_before(r, b.written, me) && !(b.written.atomic && me.atomic))
    race("writes what is written", r, p, me, b.written);
  check_readers(r, p, b, me);
  b.written = me;
  if (me.atomic) return add_reader(r, b, me);
  b.read = b.in_another_block = {};
  b.first_reader = -1;
}

Shadow* bytes_of(Region& r, uintptr_t p) {
  if (r.bytes.empty()) r.bytes.resize(r.end - r.begin);
  return &r.bytes[p - r.begin];
}

bool is_running() { return watched && ThreadBlock::running; }

Region* region_of(uintptr_t p, size_t bytes, const void* from, const char* what) {
  Region* r = find(p, bytes);
  if (!r)
    fail("it " + std::string(what) + " " + std::to_string(bytes) + " bytes outside of every buffer and shared array, " +
         near(p) + ", from " + hex(uintptr_t(from)));
  return r;
}

void set_in_flight(void* address, size_t bytes, const void* from, bool value) {
  if (!is_running()) return;
  const auto p = uintptr_t(address);
  Shadow* b = bytes_of(*region_of(p, bytes, from, "writes"), p);
  for (size_t k = 0; k < bytes; ++k) b[k].in_flight = value;
}

}  // namespace

void touch(const void* address, size_t bytes, Access access, const void* from) {
  if (!is_running() || ThreadBlock::running->on_stack(address)) return;
  const auto p = uintptr_t(address);
  if (access == Access::read && image().begin <= p && p < image().written) return;  // constants
  Region* r = region_of(p, bytes, from, access == Access::read ? "reads" : "writes");
  const Event me = event_of(from, access == Access::atomic);
  Shadow* b = bytes_of(*r, p);
  if (access == Access::atomic) synchronize(p, me);
  for (size_t k = 0; k < bytes; ++k) {
    if (access == Access::read) read(*r, p + k, b[k], me);
    else write(*r, p + k, b[k], me);
  }
}

void write_from_host(const void* address, size_t bytes) {
  if (!watched) return;
  Region* r = region_of(uintptr_t(address), bytes, nullptr, "sets");
  Shadow* b = bytes_of(*r, uintptr_t(address));
  for (size_t k = 0; k < bytes; ++k) b[k].written.time = now;
}

void start_copy(void* p, size_t bytes, const void* from) {
  touch(p, bytes, Access::write, from);
  set_in_flight(p, bytes, from, true);
}

void finish_copy(void* p, size_t bytes, const void* from) {
  set_in_flight(p, bytes, from, false);
  touch(p, bytes, Access::write, from);
}

void fence() {
  if (is_running()) fences.push_back({block_began, barrier_passed, now, uint16_t(ThreadBlock::running->current())});
}

void start_launch() {
  launch_began = block_began = barrier_passed = ++now;
  released.clear();
  if (!watched || !shared.empty()) return;
  for (const Symbol& s : image().shared) shared.push_back({s.begin, s.end, "shared " + s.name, true, false, {}});
}

void start_block() {
  block_began = barrier_passed = ++now;
  readers.clear();
  acquired.clear();
  fences.clear();
  if (!watched) return;
  for (unsigned t = 0; t < blockDim.size(); ++t) {
    std::fill_n(clocks[t], 32, 0);
    clocks[t][t % 32] = 1;
  }
}

void meet_block() {
  barrier_passed = ++now;
  readers.clear();
}

void meet(const std::vector<unsigned>& threads) {
  uint32_t all[32] = {};
  for (unsigned t : threads)
    for (int l = 0; l < 32; ++l) all[l] = std::max(all[l], clocks[t][l]);
  for (unsigned t : threads) {
    std::copy_n(all, 32, clocks[t]);
    ++clocks[t][t % 32];
  }
}

Buffer::Buffer(const void* p, size_t bytes, bool written) : begin_(uintptr_t(p)) {
  buffers.push_back({begin_, begin_ + bytes, "buffer " + std::to_string(buffers.size()), false, written, {}});
}

Buffer::~Buffer() {
  const auto is_this = [&](const Region& r) { return r.begin == begin_; };
  buffers.erase(std::find_if(buffers.begin(), buffers.end(), is_this));
  last = nullptr;
}

}  // namespace memory
}  // namespace cuda_on_cpu
