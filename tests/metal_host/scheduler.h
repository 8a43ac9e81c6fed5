// Fibers of one grid: each thread of a threadgroup is one, and they switch at barriers and SIMD
// operations. Included once, by runtime.cpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fiber.h"
#include "records.h"

#if defined(HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kArena = 256 * 1024;  // of threadgroup memory, far above what Metal allows
constexpr uint32_t kSimd = 32;

struct Simd {  // the layout of HostSimd in metal/compat/host.h
  alignas(32) unsigned char slot[kSimd][32];
  alignas(32) unsigned char result[32];
  uint32_t mask;
  uint32_t have_result;
};

struct Thread {  // the layout of HostThread there
  uint32_t grid[3], group[3], groups[3], local[3], group_size[3], grid_size[3];
  uint32_t linear, lane, simd, n_simd;
};

enum State { kReady, kAtSimd, kAtSimdBarrier, kAtBarrier, kDone };

struct Fiber {
  Thread info;
  void* sp = nullptr;
  char* stack = nullptr;
  State state = kDone;
  int kind = 0, line = 0, flags = 0;
  uint32_t parity = 0;
  Clock clock{};
};

struct Block {  // one threadgroup variable
  std::string name;
  char* at;
  size_t bytes;
};

std::vector<Fiber> fibers;
std::vector<Simd> simds;  // two for each SIMD group: lanes may be one operation apart
std::map<const void*, Block> blocks;
char* arena = nullptr;
size_t arena_used = 0;
Fiber* running = nullptr;
void* scheduler_sp = nullptr;
void (*entry_point)(void**) = nullptr;
std::vector<void*> arguments;
uint32_t threadgroup_index = 0;
std::string failure;
Records records;

std::string text(const char* format, ...) {
  char buffer[512];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof(buffer), format, list);
  va_end(list);
  return buffer;
}

void poison(char* at, size_t bytes) {
  memset(at, 0xff, bytes);
}

#if defined(HOST_ASAN)
const void* main_stack = nullptr;
size_t main_stack_bytes = 0;
#endif

void to_scheduler() {
  Fiber* me = running;
#if defined(HOST_ASAN)
  __sanitizer_start_switch_fiber(nullptr, main_stack, main_stack_bytes);
#endif
  host_switch(&me->sp, scheduler_sp);
#if defined(HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Ends the run: the fibers are never resumed, so nothing after the defect is executed.
[[noreturn]] void fail(const std::string& message) {
  if (failure.empty()) {
    failure = message;
  }
  to_scheduler();
  abort();
}

void fiber_main() {
#if defined(HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  entry_point(arguments.data());
  running->state = kDone;
  to_scheduler();
  abort();
}

}  // namespace

extern "C" {

Thread* host_current = nullptr;

Simd* host_simd(const void* value, unsigned size, int kind, int line) {
  Fiber* me = running;
  Simd* s = &simds[me->info.simd * 2 + (me->parity++ & 1)];
  memcpy(s->slot[me->info.lane], value, size);
  s->have_result = 0;
  me->state = kAtSimd;
  me->kind = kind;
  me->flags = 0;
  me->line = line;
  to_scheduler();
  return s;
}

void host_barrier(int scope, int flags, int line) {
  running->state = scope ? kAtBarrier : kAtSimdBarrier;
  running->kind = 0;
  running->flags = flags;
  running->line = line;
  to_scheduler();
}

void* host_threadgroup(const void* key, size_t bytes, size_t align, const char* name) {
  auto found = blocks.find(key);
  if (found != blocks.end()) {
    return found->second.at;
  }
  size_t at = (arena_used + kSimd + align - 1) / align * align;
  if (at + bytes + kSimd > kArena) {
    fail(text("threadgroup memory: '%s' needs %zu bytes more than Metal has", name, bytes));
  }
  Block block{name, arena + at, bytes};
  arena_used = at + bytes;
#if defined(HOST_ASAN)
  __asan_unpoison_memory_region(block.at, bytes);
#endif
  poison(block.at, bytes);
  block = blocks.emplace(key, block).first->second;
  if (records.enabled) {
    records.regions.push_back(Region{blocks[key].name.c_str(), block.at, bytes, true, 1, {}});
    records.regions.back().reset(false);
  }
  return block.at;
}

void host_atomic(const void* address, size_t bytes) {
  if (records.enabled) {
    records.mark_written(reinterpret_cast<uintptr_t>(address), bytes);
  }
}

}  // extern "C"

#if defined(HOST_RECORDS)
namespace {
char* device_low = nullptr;
char* device_high = nullptr;

void record(const void* address, size_t bytes, bool write, void* pc) {
  if (running == nullptr || !records.enabled) {
    return;
  }
  const char* at = static_cast<const char*>(address);
  bool in_arena = at >= arena && at < arena + kArena;
  bool in_device = at >= device_low && at < device_high;
  if (!in_arena && !in_device) {
    const char* low = fibers[0].stack;
    const char* high = low + fibers.size() * kStack;
    if (at >= low && at < high && (at < running->stack || at >= running->stack + kStack)) {
      fail(text("access to the private memory of another thread by thread %u at {pc %lx}",
                running->info.linear, (unsigned long)pc));
    }
    return;
  }
  std::string wrong =
      records.access(reinterpret_cast<uintptr_t>(address), bytes, write, running->info.linear,
                     threadgroup_index, running->clock, reinterpret_cast<uintptr_t>(pc) - 1);
  if (!wrong.empty()) {
    fail(wrong);
  }
}
}  // namespace

#define HOST_TSAN(n)                                  \
  void __tsan_read##n(void* p) {                      \
    record(p, n, false, __builtin_return_address(0)); \
  }                                                   \
  void __tsan_write##n(void* p) {                     \
    record(p, n, true, __builtin_return_address(0));  \
  }                                                   \
  void __tsan_unaligned_read##n(void* p) {            \
    record(p, n, false, __builtin_return_address(0)); \
  }                                                   \
  void __tsan_unaligned_write##n(void* p) {           \
    record(p, n, true, __builtin_return_address(0));  \
  }                                                   \
  void __tsan_volatile_read##n(void* p) {             \
    record(p, n, false, __builtin_return_address(0)); \
  }                                                   \
  void __tsan_volatile_write##n(void* p) {            \
    record(p, n, true, __builtin_return_address(0));  \
  }
extern "C" {
HOST_TSAN(1)
HOST_TSAN(2)
HOST_TSAN(4)
HOST_TSAN(8)
HOST_TSAN(16)
void __tsan_read_range(void* p, size_t n) {
  record(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  record(p, n, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
#endif

namespace {

// Every lane of a SIMD group that exists must have arrived in the same place.
bool release(uint32_t first, uint32_t last, State at, const char* what) {
  const Fiber& a = fibers[first];
  for (uint32_t i = first; i < last; i++) {
    const Fiber& f = fibers[i];
    if (f.state != at || f.kind != a.kind || f.line != a.line || f.flags != a.flags) {
      failure = text("divergent %s in threadgroup %u: thread %u is at line %d, thread %u %s", what,
                     threadgroup_index, first, a.line, i,
                     f.state == kDone ? "has returned" : text("at line %d", f.line).c_str());
      return false;
    }
  }
  return true;
}

void resume(Fiber& f) {
  running = &f;
  host_current = &f.info;
#if defined(HOST_ASAN)
  __sanitizer_start_switch_fiber(nullptr, f.stack, kStack);
#endif
  host_switch(&scheduler_sp, f.sp);
#if defined(HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  running = nullptr;
}

// Runs one SIMD group until all of its threads wait at a threadgroup barrier or have returned.
bool run_simd(uint32_t first, uint32_t last, const std::vector<uint32_t>& order) {
  while (true) {
    for (uint32_t i : order) {
      if (first + i < last && fibers[first + i].state == kReady) {
        resume(fibers[first + i]);
        if (!failure.empty()) {
          return false;
        }
      }
    }
    State at = kDone;
    for (uint32_t i = first; i < last; i++) {
      if (fibers[i].state == kAtSimd || fibers[i].state == kAtSimdBarrier) {
        at = fibers[i].state;
      }
    }
    if (at == kDone) {
      return true;
    }
    if (!release(first, last, at, at == kAtSimd ? "SIMD operation" : "SIMD-group barrier")) {
      return false;
    }
    for (uint32_t i = first; i < last; i++) {
      Fiber& f = fibers[i];
      if (at == kAtSimdBarrier) {
        f.clock.simd[0] += (f.flags & 1) != 0;
        f.clock.simd[1] += (f.flags & 2) != 0;
      }
      f.state = kReady;
    }
  }
}

bool run_threadgroup(uint32_t n, const std::vector<uint32_t>& lanes,
                     const std::vector<uint32_t>& groups) {
  uint32_t n_simd = (n + kSimd - 1) / kSimd;
  while (true) {
    for (uint32_t s : groups) {
      if (s < n_simd && !run_simd(s * kSimd, std::min(n, s * kSimd + kSimd), lanes)) {
        return false;
      }
    }
    bool done = true;
    for (uint32_t i = 0; i < n; i++) {
      done = done && fibers[i].state == kDone;
    }
    if (done) {
      return true;
    }
    uint32_t first = 0;
    if (fibers[0].state == kDone) {
      failure = text("divergent threadgroup barrier in threadgroup %u: thread 0 has returned",
                     threadgroup_index);
      return false;
    }
    if (!release(first, n, kAtBarrier, "threadgroup barrier")) {
      return false;
    }
    for (uint32_t i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      for (int m = 0; m < 2; m++) {
        f.clock.group[m] += (f.flags & (1 << m)) != 0;
        f.clock.simd[m] += (f.flags & (1 << m)) != 0;
      }
      f.state = kReady;
    }
  }
}

void permute(std::vector<uint32_t>& v, uint32_t order, uint64_t seed) {
  if (order == 1) {
    std::reverse(v.begin(), v.end());
  } else if (order == 2) {
    uint64_t x = seed | 1;
    for (size_t i = v.size(); i > 1; i--) {
      x = x * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(v[i - 1], v[(x >> 33) % i]);
    }
  }
}

std::vector<uint32_t> ordered(uint32_t n, uint32_t order, uint64_t seed) {
  std::vector<uint32_t> v(n);
  for (uint32_t i = 0; i < n; i++) {
    v[i] = i;
  }
  permute(v, order, seed);
  return v;
}

void make_fibers(uint32_t n) {
  if (fibers.size() >= n) {
    return;
  }
  size_t count = std::max<size_t>(n, 1024);
  char* memory = static_cast<char*>(mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fibers.resize(count);
  simds.resize((count + kSimd - 1) / kSimd * 2);
  for (size_t i = 0; i < count; i++) {
    fibers[i].stack = memory + i * kStack;
  }
}

void start(uint32_t n, const uint32_t* tg, const uint32_t* grid, const uint32_t* size,
           const uint32_t* groups, const uint32_t* nominal) {
  for (uint32_t i = 0; i < n; i++) {
    Fiber& f = fibers[i];
    Thread& t = f.info;
    t.linear = i;
    t.lane = i % kSimd;
    t.simd = i / kSimd;
    t.n_simd = (n + kSimd - 1) / kSimd;
    uint32_t local[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      t.local[d] = local[d];
      t.group[d] = tg[d];
      t.groups[d] = groups[d];
      t.group_size[d] = size[d];
      t.grid_size[d] = grid[d];
      t.grid[d] = tg[d] * nominal[d] + local[d];
    }
    f.sp = fiber_start(f.stack, kStack, fiber_main);
    f.state = kReady;
    f.parity = 0;
    f.clock = Clock{};
  }
  for (uint32_t s = 0; s * kSimd < n; s++) {
    uint32_t lanes = std::min(kSimd, n - s * kSimd);
    for (int p = 0; p < 2; p++) {
      simds[s * 2 + p].mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
    }
  }
  for (auto& b : blocks) {
    poison(b.second.at, b.second.bytes);
  }
  for (Region& r : records.regions) {
    if (r.memory == 1) {
      r.reset(false);
    }
  }
}

void run_grid(const uint32_t* grid, const uint32_t* group, uint32_t order, uint64_t seed) {
  uint32_t groups[3];
  for (int d = 0; d < 3; d++) {
    groups[d] = (grid[d] + group[d] - 1) / group[d];
  }
  uint32_t n_max = group[0] * group[1] * group[2];
  make_fibers(n_max);
#if defined(HOST_ASAN)
  __asan_unpoison_memory_region(fibers[0].stack, fibers.size() * kStack);
  __asan_poison_memory_region(arena, kArena);
#endif
  std::vector<uint32_t> lanes = ordered(kSimd, order, seed);
  std::vector<uint32_t> simd_order = ordered((n_max + kSimd - 1) / kSimd, order, seed + 7);
  for (uint32_t g : ordered(groups[0] * groups[1] * groups[2], order, seed + 13)) {
    uint32_t tg[3] = {g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    uint32_t size[3];
    for (int d = 0; d < 3; d++) {
      size[d] = std::min(group[d], grid[d] - tg[d] * group[d]);
    }
    threadgroup_index = g;
    uint32_t n = size[0] * size[1] * size[2];
    start(n, tg, grid, size, groups, group);
    if (!run_threadgroup(n, lanes, simd_order)) {
      return;
    }
  }
}

}  // namespace
