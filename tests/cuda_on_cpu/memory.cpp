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
// known[t][l]: how much of what lane l of its warp did thread t has waited for
uint32_t known[1024][32];

struct Event {
  uint32_t time = 0;   // 0: never
  uint32_t clock = 0;  // of the thread
  uint32_t from = 0;   // the code's address
  uint16_t thread = 0;
  bool atomic = false;
};

// What a thread of a block that is over knew when it was at a fence: all of its own, of others what was before a
// barrier.
struct Release {
  uint32_t block_began, barrier_passed, fence;
  uint16_t thread;
};
std::map<uintptr_t, std::vector<Release>> told;  // by atomic operations at this address, in this launch
// What this block has learned so, and the time and the thread that did; the others know after a barrier.
struct Lesson {
  Release release;
  uint32_t time;
  uint16_t thread;
};
std::vector<Lesson> lessons;
std::vector<Release> fences;  // of this block

struct Byte {
  Event written, read;      // last
  Event in_another_block;   // one that read it, before those in this one
  int32_t more = -1;        // an index into `readers`: others that read it since the last barrier,
  uint32_t more_since = 0;  // this one
  bool in_flight = false;   // an asynchronous copy to it has not been waited for
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
  std::vector<Byte> bytes;  // made when it is first used
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
  return {now, known[thread][thread % 32], uint32_t(uintptr_t(from)), uint16_t(thread), atomic};
}

bool was_told(const Event& e, const Event& me) {
  return std::any_of(lessons.begin(), lessons.end(), [&](const Lesson& lesson) {
    const Release& of = lesson.release;
    return (lesson.time < barrier_passed || lesson.thread == me.thread) && of.block_began <= e.time &&
           (e.time < of.barrier_passed || (e.time <= of.fence && e.thread == of.thread));
  });
}

// An atomic operation tells what was known at the thread's last fence, and learns what others told.
void tell(uintptr_t p, const Event& me) {
  for (const Release& release : told[p])
    if (release.block_began < block_began) lessons.push_back({release, now, me.thread});
  const auto fence =
      std::find_if(fences.rbegin(), fences.rend(), [&](const Release& f) { return f.thread == me.thread; });
  if (fence != fences.rend()) told[p].push_back(*fence);
}

// Whether what happened is sure to have happened before the running thread goes on; each block has its own shared
// arrays.
bool is_before(const Region& r, const Event& e, const Event& me) {
  if (e.time < launch_began) return true;
  if (e.time < block_began) return r.shared || was_told(e, me);
  return e.time < barrier_passed || e.thread == me.thread ||
         (e.thread / 32 == me.thread / 32 && known[me.thread][e.thread % 32] >= e.clock);
}

[[noreturn]] void race(const char* what, const Region& r, uintptr_t p, const Event& me, const Event& other) {
  const std::string who =
      other.time < block_began ? "another block" : "thread " + std::to_string(other.thread) + " of the same block";
  fail("race: it " + std::string(what) + " at byte " + std::to_string(p - r.begin) + " of " + r.name + ", from " +
       hex(me.from) + "; " + who + " did from " + hex(other.from));
}

void check_readers(const Region& r, uintptr_t p, const Byte& b, const Event& me) {
  const auto check = [&](const Event& reader) {
    if (!is_before(r, reader, me) && !(reader.atomic && me.atomic)) race("writes what is read", r, p, me, reader);
  };
  check(b.read);
  check(b.in_another_block);
  if (b.more_since == barrier_passed)
    for (int32_t k = b.more; k >= 0; k = readers[size_t(k)].next) check(readers[size_t(k)].event);
}

void add_reader(const Region& r, Byte& b, const Event& me) {
  if (b.read.time >= launch_began && b.read.time < block_began) {
    b.in_another_block = b.read;
  } else if (b.read.thread != me.thread && !is_before(r, b.read, me)) {
    readers.push_back({b.read, b.more_since == barrier_passed ? b.more : -1});
    b.more = int32_t(readers.size()) - 1, b.more_since = barrier_passed;
  }
  b.read = me;
}

void check_written(const Region& r, uintptr_t p, const Byte& b, const Event& me) {
  const bool written = r.shared ? b.written.time >= block_began : r.written || b.written.time;
  if (!written)
    fail("it reads byte " + std::to_string(p - r.begin) + " of " + r.name + ", which nobody wrote, from " +
         hex(me.from));
}

void read(const Region& r, uintptr_t p, Byte& b, const Event& me) {
  if (b.in_flight) fail("it reads an asynchronous copy that nobody has waited for, from " + hex(me.from));
  check_written(r, p, b, me);
  if (!is_before(r, b.written, me)) race("reads what is written", r, p, me, b.written);
  add_reader(r, b, me);
}

void write(const Region& r, uintptr_t p, Byte& b, const Event& me) {
  if (b.in_flight) fail("it writes where an asynchronous copy is on its way, from " + hex(me.from));
  if (me.atomic) check_written(r, p, b, me);
  if (!is_before(r, b.written, me) && !(b.written.atomic && me.atomic))
    race("writes what is written", r, p, me, b.written);
  check_readers(r, p, b, me);
  b.written = me;
  if (me.atomic) return add_reader(r, b, me);
  b.read = b.in_another_block = {};
  b.more = -1;
}

Byte* bytes_of(Region& r, uintptr_t p) {
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
  Byte* b = bytes_of(*region_of(p, bytes, from, "writes"), p);
  for (size_t k = 0; k < bytes; ++k) b[k].in_flight = value;
}

}  // namespace

void touch(const void* address, size_t bytes, Access access, const void* from) {
  if (!is_running() || ThreadBlock::running->on_stack(address)) return;
  const auto p = uintptr_t(address);
  if (access == Access::read && image().begin <= p && p < image().written) return;  // constants
  Region* r = region_of(p, bytes, from, access == Access::read ? "reads" : "writes");
  const Event me = event_of(from, access == Access::atomic);
  Byte* b = bytes_of(*r, p);
  if (access == Access::atomic) tell(p, me);
  for (size_t k = 0; k < bytes; ++k) {
    if (access == Access::read) read(*r, p + k, b[k], me);
    else write(*r, p + k, b[k], me);
  }
}

void write_from_host(const void* address, size_t bytes) {
  if (!watched) return;
  Region* r = region_of(uintptr_t(address), bytes, nullptr, "sets");
  Byte* b = bytes_of(*r, uintptr_t(address));
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
  told.clear();
  if (!watched || !shared.empty()) return;
  for (const Symbol& s : image().shared) shared.push_back({s.begin, s.end, "shared " + s.name, true, false, {}});
}

void start_block() {
  block_began = barrier_passed = ++now;
  readers.clear();
  lessons.clear();
  fences.clear();
  if (!watched) return;
  for (unsigned t = 0; t < blockDim.size(); ++t) {
    std::fill_n(known[t], 32, 0);
    known[t][t % 32] = 1;
  }
}

void meet_block() {
  barrier_passed = ++now;
  readers.clear();
}

void meet(const std::vector<unsigned>& threads) {
  uint32_t all[32] = {};
  for (unsigned t : threads)
    for (int l = 0; l < 32; ++l) all[l] = std::max(all[l], known[t][l]);
  for (unsigned t : threads) {
    std::copy_n(all, 32, known[t]);
    ++known[t][t % 32];
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
