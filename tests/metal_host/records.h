// Access records: for each byte of threadgroup and device memory, who wrote it and who read it.
//
// Kernels of the second build are compiled with -fsanitize=thread, whose calls (__tsan_read4 and
// so on) arrive here instead of in ThreadSanitizer. Two accesses to a byte, one of them a write,
// by two threads are in order only if a barrier of the right scope and kind of memory lies
// between them; SIMD operations order nothing.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct Clock {        // counts the barriers that a thread has passed, by scope and kind of memory
  uint32_t group[2];  // [device, threadgroup]
  uint32_t simd[2];
};

struct Access {
  uint32_t thread = 0;  // linear index in its group + 1; 0: nobody
  uint32_t threadgroup = 0;
  uint32_t group_clock = 0, simd_clock = 0;
  uintptr_t pc = 0;
};

struct Cell {
  Access write, read;
  bool written = false;
  bool many_lanes = false;  // other threads of the reader's SIMD group read it as well
  bool many_simds = false;  // and threads of other SIMD groups, or of other threadgroups
};

struct Region {
  const char* name;
  char* base;
  size_t bytes;
  bool writable;
  int memory;  // 0 device, 1 threadgroup
  std::vector<Cell> cells;

  void reset(bool written) {
    cells.assign(writable ? bytes : 0, Cell());
    if (written) {
      for (Cell& c : cells) {
        c.written = true;
      }
    }
  }
};

class Records {
 public:
  std::vector<Region> regions;
  bool enabled = false;

  Region* find(uintptr_t address) {
    if (last_ < regions.size() && contains(regions[last_], address)) {
      return &regions[last_];
    }
    for (size_t i = 0; i < regions.size(); i++) {
      if (contains(regions[i], address)) {
        last_ = i;
        return &regions[i];
      }
    }
    return nullptr;
  }

  // Returns an empty string, or what is wrong with the access.
  std::string access(uintptr_t address, size_t bytes, bool write, uint32_t linear,
                     uint32_t threadgroup, const Clock& clock, uintptr_t pc) {
    Region* r = find(address);
    const char* verb = write ? "write" : "read";
    if (r == nullptr) {
      return text(
          "out of bounds %s of %zu bytes, outside every buffer, by thread %u of "
          "threadgroup %u at {pc %lx}",
          verb, bytes, linear, threadgroup, pc);
    }
    size_t offset = address - reinterpret_cast<uintptr_t>(r->base);
    if (offset + bytes > r->bytes) {
      return text(
          "out of bounds %s of %zu bytes at byte %zu of '%s' (%zu bytes) by thread %u of "
          "threadgroup %u at {pc %lx}",
          verb, bytes, offset, r->name, r->bytes, linear, threadgroup, pc);
    }
    if (!r->writable) {
      return write ? text("write to the input '%s' by thread %u at {pc %lx}", r->name, linear, pc)
                   : std::string();
    }
    Access now{linear + 1, threadgroup, clock.group[r->memory], clock.simd[r->memory], pc};
    for (size_t i = offset; i < offset + bytes; i++) {
      Cell& c = r->cells[i];
      if (!write && !c.written) {
        return text(
            "read of byte %zu of '%s' that nobody wrote, by thread %u of threadgroup %u "
            "at {pc %lx}",
            i, r->name, linear, threadgroup, pc);
      }
      if (conflict(c.write, now)) {
        return race(*r, i, "written", c.write, write ? "written" : "read", now);
      }
      if (write) {
        if (c.read.thread != 0 && conflict_with_readers(c, now)) {
          return race(*r, i, "read", c.read, "written", now);
        }
        c.write = now;
        c.written = true;
        c.many_lanes = c.many_simds = false;
        c.read = Access();
      } else {
        note_reader(c, now);
      }
    }
    return std::string();
  }

  void mark_written(uintptr_t address, size_t bytes) {
    Region* r = find(address);
    if (r != nullptr && r->writable) {
      size_t offset = address - reinterpret_cast<uintptr_t>(r->base);
      for (size_t i = offset; i < offset + bytes && i < r->bytes; i++) {
        r->cells[i].written = true;
      }
    }
  }

 private:
  size_t last_ = 0;

  static bool contains(const Region& r, uintptr_t address) {
    return address - reinterpret_cast<uintptr_t>(r.base) < r.bytes;
  }

  static bool same_simd(const Access& a, const Access& b) {
    return (a.thread - 1) / 32 == (b.thread - 1) / 32;
  }

  static bool conflict(const Access& old, const Access& now) {
    if (old.thread == 0 || (old.thread == now.thread && old.threadgroup == now.threadgroup)) {
      return false;
    }
    if (old.threadgroup != now.threadgroup) {
      return true;  // nothing orders two threadgroups of one launch
    }
    if (old.group_clock < now.group_clock) {
      return false;
    }
    return !(same_simd(old, now) && old.simd_clock < now.simd_clock);
  }

  static bool conflict_with_readers(const Cell& c, const Access& now) {
    if (c.read.threadgroup != now.threadgroup) {
      return true;
    }
    if (c.read.group_clock < now.group_clock) {
      return false;
    }
    if (c.many_simds || !same_simd(c.read, now)) {
      return true;
    }
    return (c.many_lanes || c.read.thread != now.thread) && c.read.simd_clock >= now.simd_clock;
  }

  static void note_reader(Cell& c, const Access& now) {
    const Access& old = c.read;
    bool concurrent = old.thread != 0 &&
                      (old.threadgroup != now.threadgroup || old.group_clock >= now.group_clock);
    if (!concurrent) {
      c.many_lanes = c.many_simds = false;
    } else if (old.threadgroup != now.threadgroup || !same_simd(old, now)) {
      c.many_simds = true;
    } else if (old.thread != now.thread) {
      c.many_lanes = old.simd_clock >= now.simd_clock;
    } else if (old.simd_clock < now.simd_clock) {
      c.many_lanes = false;
    }
    c.read = now;
  }

  template <typename... A>
  static std::string text(const char* format, A... args) {
    char buffer[512];
    snprintf(buffer, sizeof(buffer), format, args...);
    return buffer;
  }

  static std::string race(const Region& r, size_t byte, const char* did, const Access& old,
                          const char* does, const Access& now) {
    return text(
        "race on byte %zu of '%s': %s by thread %u of threadgroup %u at {pc %lx}, %s by "
        "thread %u of threadgroup %u at {pc %lx}, with no barrier between them",
        byte, r.name, did, old.thread - 1, old.threadgroup, old.pc, does, now.thread - 1,
        now.threadgroup, now.pc);
  }
};
