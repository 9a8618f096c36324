// Shared by both interpreters (ptx.cpp, sass.cpp): checked memory, counts, options, and the description of a launch.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace device_code {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const char* format, ...) {
  char text[800];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  throw Failure(text);
}

// Calls f(lane) for each lane in the mask.
template <class F>
inline void for_lanes(uint32_t mask, const F& f) {
  if (mask == ~0u) {
    for (int l = 0; l < 32; ++l) f(l);
  } else {
    for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

// ---- counts
// The pipe that executes an instruction; class_names has the names in the same order. kAlu: comparisons, selections,
// minima, integer addition, logic and shifts; kImad: integer multiplication.
enum Class {
  kFp32,
  kMufu,
  kFp64,
  kImad,
  kAlu,
  kMove,
  kConvert,
  kConst,
  kGlobal,
  kShared,
  kShuffle,
  kBarrier,
  kBranch,
  kUniform,
  kOther,
  kClasses
};
extern const char* const class_names[kClasses];

// Memory accesses are counted by tensor. A tag is the number of a tensor; 0 is all other memory.
constexpr int kTags = 10;
// Requests of warps, bytes, sectors of 32 bytes, and the number of sectors if the same bytes were adjacent.
struct MemoryCount {
  uint64_t requests = 0, bytes = 0, sectors = 0, ideal_sectors = 0;
};
struct Counts {
  uint64_t warp_instructions = 0, lane_instructions = 0;
  uint64_t by_class[kClasses] = {}, lanes_by_class[kClasses] = {};
  uint64_t branches = 0, divergent = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_ideal = 0;
  MemoryCount memory[kTags][2];
  uint64_t blocks = 0, threads = 0;
};
extern Counts counts;
// One launch. "longest": the instructions of the warp that issued the most.
struct LaunchCounts {
  uint64_t blocks = 0, warps = 0, instructions = 0, longest = 0;
  uint64_t by_class[kClasses] = {};
};
extern std::vector<LaunchCounts> launches;
extern uint64_t longest_warp;  // of the launch that runs
struct Range {
  uint64_t low, high;
  int tag;
};
extern std::vector<Range> ranges;

// ---- options
struct Options {
  int policy = 0;  // order of divergent lanes; 0: the lowest lane first, 1: the highest first, 2: random
  int resident = 1;  // blocks that run interleaved
  unsigned seed = 1;
  bool races = true;  // check shared memory for races
  int ulp = 0;  // largest error added to approximate instructions, in ulp
};
extern Options options;
extern std::mt19937 generator;

// ---- memory
void check_global(uint64_t address, int size, const char* what, uint32_t pc);
void count_global(const uint64_t* addresses, uint32_t mask, int size, bool store);
void count_shared(const uint32_t* addresses, uint32_t mask, int size);

// The last accesses to a byte of shared memory, with the number of block and warp barriers before them.
struct Touch {
  int16_t writer = -1, reader = -1;  // -1: none; -2: threads of several warps
  bool atomic = false;  // the last write
  uint32_t written_block = 0, written_warp = 0, read_block = 0, read_warp = 0;
};
struct SharedMemory {
  std::vector<uint8_t> bytes;
  std::vector<Touch> touched;
  uint32_t block_epoch = 1;
  std::vector<uint32_t> warp_epoch;

  void reset(size_t size, int warps) {
    bytes.assign(size, 0xff);
    if (options.races) touched.assign(size, Touch());
    warp_epoch.assign(warps, 1);
    block_epoch = 1;
  }
  uint8_t* at(uint32_t address, int size, int thread, bool store, uint32_t pc, bool atomic = false) {
    if (address + uint64_t(size) > bytes.size()) fail("shared memory: %u of %zu at pc %u", address, bytes.size(), pc);
    if (address % size != 0) fail("shared memory: misaligned %u by %d at pc %u", address, size, pc);
    if (options.races) check_race(address, size, thread, store, pc, atomic);
    return bytes.data() + address;
  }
  static std::string name_of(int thread) {
    return thread < 0 ? "threads of several warps" : "thread " + std::to_string(thread);
  }
  // Fails if the access is a race, and records it. Atomic writes do not race with one another: `writer` is the first of
  // them if all are from one warp, else -2.
  void check_race(uint32_t address, int size, int thread, bool store, uint32_t pc, bool atomic) {
    const uint32_t epoch_of_warp = warp_epoch[thread / 32];
    const auto ordered = [&](int other, uint32_t block, uint32_t warp) {
      if (other == -1 || other == thread || block < block_epoch) return true;
      return other >= 0 && other / 32 == thread / 32 && warp < epoch_of_warp;
    };
    for (int k = 0; k < size; ++k) {
      Touch& t = touched[address + k];
      const bool written_before = ordered(t.writer, t.written_block, t.written_warp);
      if (!written_before && !(atomic && t.atomic))
        fail(
            "race in shared memory at %u: thread %d %s a byte that %s wrote, pc %u", address + k, thread,
            store ? "writes" : "reads", name_of(t.writer).c_str(), pc);
      if (store) {
        if (!ordered(t.reader, t.read_block, t.read_warp))
          fail(
              "race in shared memory at %u: thread %d writes a byte that %s read, pc %u", address + k, thread,
              name_of(t.reader).c_str(), pc);
        const bool joins_atomics = atomic && t.atomic && !written_before;
        t.writer = !joins_atomics ? thread : t.writer >= 0 && t.writer / 32 == thread / 32 ? t.writer : -2;
        t.atomic = atomic;
        t.written_block = block_epoch;
        t.written_warp = epoch_of_warp;
        t.reader = -1;
      } else {
        if (t.reader == -1 || t.read_block < block_epoch ||
            (t.reader >= 0 && t.reader / 32 == thread / 32 && t.read_warp < epoch_of_warp)) {
          t.reader = thread;
        } else if (t.reader != thread) {
          // For several lanes of one warp, it is enough to keep the first: a warp barrier orders all of them.
          t.reader = t.reader >= 0 && t.reader / 32 == thread / 32 ? t.reader : -2;
        }
        t.read_block = block_epoch;
        t.read_warp = epoch_of_warp;
      }
    }
  }
};

struct Launch {
  uint32_t blocks, threads;
  std::vector<uint8_t> parameters;
};
// The kernels of one architecture.
struct Device {
  virtual ~Device() {}
  virtual void run(const std::string& kernel, const Launch& launch) = 0;
  virtual void profile(const char*) {}  // writes the issue count of each instruction and resets it
};
std::unique_ptr<Device> load_ptx(const std::string& text);
std::unique_ptr<Device> load_sass(const std::string& text);

// Offset and size of each parameter of a kernel, in bytes; read from PTX.
struct Parameter {
  int offset, size;
};
std::map<std::string, std::vector<Parameter>> parameters_of(const std::string& ptx);
std::map<std::string, std::pair<uint64_t, uint64_t>>& symbols();  // address and size of each __device__ variable

// The approximate instructions ex2, rcp and rsq, with subnormals flushed to zero.
float ex2_approx(float x);
float rcp_approx(float x);
float rsq_approx(float x);

}  // namespace device_code
