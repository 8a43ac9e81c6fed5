// A process that plays the GPU: loads kernels and runs them, one fiber for each thread of a
// threadgroup, switching at barriers and SIMD operations.
//
// Built twice: with AddressSanitizer (HOST_ASAN), and with access records (HOST_RECORDS).
// Requests come on stdin and answers go to stdout; worker.py has the other end.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

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
constexpr size_t kGuard = 64 * 1024;  // between buffers, so that a near miss hits none
constexpr size_t kArena = 256 * 1024; // of threadgroup memory, far above what Metal allows
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
size_t threadgroup_bytes = 0;
Fiber* running = nullptr;
void* scheduler_sp = nullptr;
void (*entry_point)(void**) = nullptr;
std::vector<void*> arguments;
uint32_t threadgroup_index = 0;
uint64_t switches = 0;
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

void poison(char* at, size_t bytes) { memset(at, 0xff, bytes); }

void to_scheduler() {
  Fiber* me = running;
#if defined(HOST_ASAN)
  extern void announce_scheduler();
  announce_scheduler();
#endif
  host_switch(&me->sp, scheduler_sp);
#if defined(HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if defined(HOST_ASAN)
const void* main_stack = nullptr;
size_t main_stack_bytes = 0;
void announce_scheduler() {
  __sanitizer_start_switch_fiber(nullptr, main_stack, main_stack_bytes);
}
#endif

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
  threadgroup_bytes += bytes;
#if defined(HOST_ASAN)
  __asan_unpoison_memory_region(block.at, bytes);
#endif
  poison(block.at, bytes);
  block = blocks.emplace(key, block).first->second;
  if (records.enabled) {
    records.regions.push_back(
        Region{blocks[key].name.c_str(), block.at, bytes, true, 1, {}});
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
  std::string wrong = records.access(reinterpret_cast<uintptr_t>(address), bytes, write,
                                     running->info.linear, threadgroup_index, running->clock,
                                     reinterpret_cast<uintptr_t>(pc) - 1);
  if (!wrong.empty()) {
    fail(wrong);
  }
}
}  // namespace

#define HOST_TSAN(n)                                                                        \
  void __tsan_read##n(void* p) { record(p, n, false, __builtin_return_address(0)); }        \
  void __tsan_write##n(void* p) { record(p, n, true, __builtin_return_address(0)); }        \
  void __tsan_unaligned_read##n(void* p) { record(p, n, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { record(p, n, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##n(void* p) { record(p, n, false, __builtin_return_address(0)); } \
  void __tsan_volatile_write##n(void* p) { record(p, n, true, __builtin_return_address(0)); }
extern "C" {
HOST_TSAN(1)
HOST_TSAN(2)
HOST_TSAN(4)
HOST_TSAN(8)
HOST_TSAN(16)
void __tsan_read_range(void* p, size_t n) { record(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { record(p, n, true, __builtin_return_address(0)); }
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
      failure = text("divergent %s in threadgroup %u: thread %u is at line %d, thread %u %s",
                     what, threadgroup_index, first, a.line, i,
                     f.state == kDone ? "has returned"
                                      : text("at line %d", f.line).c_str());
      return false;
    }
  }
  return true;
}

void resume(Fiber& f) {
  running = &f;
  host_current = &f.info;
  switches++;
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

int answer_fd = 1;

void must_read(void* to, size_t bytes) {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    ssize_t got = read(0, at, bytes);
    if (got <= 0) {
      exit(0);  // the other end is gone; exit() also writes the coverage counters
    }
    at += got;
    bytes -= got;
  }
}

void must_write(const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  while (bytes > 0) {
    ssize_t put = write(answer_fd, at, bytes);
    if (put <= 0) {
      _exit(1);
    }
    at += put;
    bytes -= put;
  }
}

template <typename T>
T get() {
  T v;
  must_read(&v, sizeof(v));
  return v;
}

std::string get_text() {
  std::string s(get<uint32_t>(), 0);
  must_read(&s[0], s.size());
  return s;
}

struct Buffer {
  std::string name;
  uint32_t kind;  // 0 input, 1 output to fill with NaN, 2 output that MLX has filled
  char* at;
  size_t bytes;
};

// Device buffers: on the heap under AddressSanitizer, else in one range with guard zones.
class Device {
 public:
  explicit Device(std::vector<Buffer>& buffers) : buffers_(buffers) {
#if !defined(HOST_ASAN)
    bytes_ = kGuard;
    for (Buffer& b : buffers) {
      bytes_ += (b.bytes + 255) / 256 * 256 + kGuard;
    }
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    size_t at = kGuard;
    for (Buffer& b : buffers) {
      b.at = base_ + at;
      at += (b.bytes + 255) / 256 * 256 + kGuard;
    }
#if defined(HOST_RECORDS)
    device_low = base_;
    device_high = base_ + bytes_;
#endif
#else
    for (Buffer& b : buffers) {
      b.at = static_cast<char*>(malloc(b.bytes));
    }
#endif
  }
  ~Device() {
#if !defined(HOST_ASAN)
    munmap(base_, bytes_);
#else
    for (Buffer& b : buffers_) {
      free(b.at);
    }
#endif
  }

 private:
  std::vector<Buffer>& buffers_;
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

std::map<std::string, void*> libraries;

void serve() {
  std::string library = get_text();
  std::string symbol = get_text();
  uint32_t grid[3], group[3];
  must_read(grid, sizeof(grid));
  must_read(group, sizeof(group));
  uint32_t order = get<uint32_t>();
  uint64_t seed = get<uint64_t>();
  std::vector<Buffer> buffers(get<uint32_t>());
  for (Buffer& b : buffers) {
    b.name = get_text();
    b.kind = get<uint32_t>();
    b.bytes = get<uint64_t>();
  }
  Device device(buffers);
  for (Buffer& b : buffers) {
    if (b.kind == 1) {
      poison(b.at, b.bytes);
    } else {
      must_read(b.at, b.bytes);
    }
  }
  failure.clear();
  blocks.clear();
  arena_used = threadgroup_bytes = 0;
  switches = 0;
  arguments.clear();
  records.regions.clear();
  records.regions.reserve(buffers.size() + 64);
  for (Buffer& b : buffers) {
    arguments.push_back(b.at);
    if (records.enabled) {
      records.regions.push_back(Region{b.name.c_str(), b.at, b.bytes, b.kind != 0, 0, {}});
      records.regions.back().reset(b.kind == 2);
    }
  }
  if (libraries.find(library) == libraries.end()) {
    libraries[library] = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  void* handle = libraries[library];
  entry_point =
      handle ? reinterpret_cast<void (*)(void**)>(dlsym(handle, symbol.c_str())) : nullptr;
  Dl_info where{};
  if (entry_point == nullptr) {
    failure = text("cannot load %s: %s", symbol.c_str(), dlerror());
  } else {
    dladdr(reinterpret_cast<void*>(entry_point), &where);
    run_grid(grid, group, order, seed);
  }
  if (failure.empty() && records.enabled) {
    for (Region& r : records.regions) {
      for (size_t i = 0; r.memory == 0 && i < r.cells.size(); i++) {
        if (!r.cells[i].written) {
          failure = text("unwritten output: byte %zu of '%s' (%zu bytes)", i, r.name, r.bytes);
          break;
        }
      }
    }
  }
  uint32_t n = failure.size();
  uint64_t base = reinterpret_cast<uint64_t>(where.dli_fbase);
  must_write(&n, sizeof(n));
  must_write(failure.data(), n);
  must_write(&base, sizeof(base));
  uint64_t stats[2] = {threadgroup_bytes, switches};
  must_write(stats, sizeof(stats));
  for (Buffer& b : buffers) {
    if (n == 0 && b.kind != 0) {
      must_write(b.at, b.bytes);
    }
  }
}

#if !defined(HOST_ASAN)
char signal_stack[64 * 1024];

// A wild access: say so and end, as AddressSanitizer does in the other build.
void on_signal(int number) {
  char line[160];
  int n = snprintf(line, sizeof(line), "signal %d: wild memory access by thread %u\n", number,
                   running ? running->info.linear : 0);
  (void)!write(2, line, n);
  _exit(3);
}
#endif

}  // namespace

int main() {
  answer_fd = dup(1);
  dup2(2, 1);  // nothing else may write between the answers
  arena = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#if defined(HOST_RECORDS)
  records.enabled = true;
#endif
#if !defined(HOST_ASAN)
  stack_t alternate{};
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof(signal_stack);
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#else
  main_stack = __builtin_frame_address(0);
  main_stack = static_cast<const char*>(main_stack) - (1 << 20);
  main_stack_bytes = (1 << 20) + 4096;
#endif
  while (true) {
    serve();
  }
}
