// The process that loads kernels and runs them (scheduler.h).
//
// Built twice: with AddressSanitizer (HOST_ASAN), and with access records (HOST_RECORDS).
// It reads requests from stdin and writes answers to stdout; worker.py is the other end.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "scheduler.h"

namespace {

constexpr size_t kGuard = 64 * 1024;  // between buffers, so that accesses just outside hit none

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
  size_t second;  // where the second half of the bytes lies, far away; 0: after the first

  size_t half() const { return second != 0 ? bytes / 2 : bytes; }
  size_t span() const { return second != 0 ? second + bytes - half() : bytes; }
};

// Memory that takes up what is written to alone.
void* sparse(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
              -1, 0);
}

// Device buffers: on the heap under AddressSanitizer, else in one range with guard zones.
class Device {
 public:
  explicit Device(std::vector<Buffer>& buffers) : buffers_(buffers) {
#if !defined(HOST_ASAN)
    bytes_ = kGuard;
    for (Buffer& b : buffers) {
      bytes_ += (b.bytes + 255) / 256 * 256 + kGuard;
    }
    base_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
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
      b.at = static_cast<char*>(b.second == 0 ? malloc(b.bytes) : sparse(b.span()));
    }
#endif
  }
  ~Device() {
#if !defined(HOST_ASAN)
    munmap(base_, bytes_);
#else
    for (Buffer& b : buffers_) {
      if (b.second == 0) {
        free(b.at);
      } else {
        munmap(b.at, b.span());
      }
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
    b.second = get<uint64_t>();
  }
  Device device(buffers);
  for (Buffer& b : buffers) {
    if (b.kind == 1) {
      poison(b.at, b.half());
      poison(b.at + b.second, b.bytes - b.half());
    } else {
      must_read(b.at, b.half());
      must_read(b.at + b.second, b.bytes - b.half());
    }
  }
  failure.clear();
  blocks.clear();
  arena_used = 0;
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
  entry_point = handle ? reinterpret_cast<void (*)(void**)>(dlsym(handle, "host_entry")) : nullptr;
  Dl_info where{};
  if (entry_point == nullptr) {
    failure = text("cannot load the kernel: %s", dlerror());
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
  for (Buffer& b : buffers) {
    if (n == 0 && b.kind != 0) {
      must_write(b.at, b.half());
      must_write(b.at + b.second, b.bytes - b.half());
    }
  }
}

#if !defined(HOST_ASAN)
char signal_stack[64 * 1024];

// Reports a wild access and exits, as AddressSanitizer does in the other build.
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
  arena = static_cast<char*>(
      mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#if defined(HOST_RECORDS)
  records.enabled = true;
#endif
#if !defined(HOST_ASAN)
  stack_t alternate{};
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof(signal_stack);
  sigaltstack(&alternate, nullptr);
  struct sigaction action {};
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
