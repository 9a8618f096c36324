// Runs CUDA kernels on the CPU, a fiber for every CUDA thread, so that they can be tested without a GPU.
//
// The threads of a launch take turns on one thread of the operating system. One runs until it has to wait at a barrier
// or in a warp's collective; then the first that can run, in the order of set_schedule(), does. So early threads run as
// far ahead of late ones as barriers let them, which shows what relies on an order that nothing enforces. What cannot
// go on, or is undefined, is a std::runtime_error that names block and thread.
//
// AddressSanitizer sees each shared variable as an allocation of its own. ThreadSanitizer sees each CUDA thread as a
// thread, ordered only by what orders it in CUDA, so that a missing barrier or fence is a race, whatever the schedule.
//
// Not here: dynamic shared memory, textures, cooperative groups, __activemask(), waiting for a plain load to change.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_X86_64 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)  // as gcc says it
#define EMULATOR_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
#elif defined(__has_feature)  // and clang
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#elif __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
#endif
#endif

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// Functions through which the threads share the emulator's own state: not accesses of the kernel.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll

// ---------------------------------------------------------------------------------------------------------------------
// The words of CUDA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // nothing: system headers write __attribute__((__noinline__))
#define __launch_bounds__(...)

// `Type& name`, which the threads of a block share; for nvcc it is to be `__shared__ Type name`.
#define SGL_SHARED(Type, name)  \
  static char name##_site_ = 0; \
  Type& name = ::emulator::detail::shared<Type>(&name##_site_)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0
};

constexpr int warpSize = 32;

namespace emulator {

namespace detail {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // of a block, which every GPU has
constexpr size_t kStackBytes = 256 * 1024;  // frames are large without optimization; what is not used costs nothing
constexpr size_t kKeptIdentities = 1024;  // each is almost 1 MB of ThreadSanitizer's memory, and takes it 1 ms to make
// Atomics without any thread getting anywhere: somebody waits, by atomics, for what does not come.
constexpr unsigned kTooManyAtomics = 1u << 22;

struct Block;
struct Launch;
struct Thread;

// Where in the kernel's source.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

// Accesses of the emulator while one lives are none of ThreadSanitizer's business. A fiber must not stop with one
// alive: it may never go on, and an end of it that is missing is an error of its own.
struct Unseen {
#if defined(EMULATOR_TSAN)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// What a thread runs on: memory, with a page below that stops what runs over, and for ThreadSanitizer an identity.
class Stack {
 public:
  void* identity = nullptr;

  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory =
        mmap(nullptr, guard_ + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, guard_, PROT_NONE);
#if defined(EMULATOR_TSAN)
    identity = __tsan_create_fiber(0);
#endif
  }
  ~Stack() {
#if defined(EMULATOR_TSAN)
    __tsan_destroy_fiber(identity);
#endif
    munmap(memory_, guard_ + kStackBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* lowest() const { return memory_ + guard_; }

 private:
  size_t guard_;
  char* memory_;
};

using Stacks = std::vector<std::unique_ptr<Stack>>;

// Those that nobody runs on, kept from launch to launch.
inline thread_local Stacks spare_stacks;

inline std::unique_ptr<Stack> take_stack() {
  if (spare_stacks.empty()) return std::make_unique<Stack>();
  std::unique_ptr<Stack> stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

// Something that runs on a stack of its own and can stop anywhere: a CUDA thread, or whoever launched.
struct Fiber {
  const void* lowest = nullptr;  // of its stack
  size_t bytes = 0;
#if defined(EMULATOR_X86_64)
  void* top = nullptr;  // of the stack where it stopped
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* identity = nullptr;  // ThreadSanitizer's
};

#if defined(EMULATOR_X86_64)

// Pushes the registers that a function has to preserve, leaves this stack at *from, and goes on where the other one was
// left: some ten times as fast as swapcontext, which asks the kernel for the signal mask. noipa: a compiler that looked
// into it would conclude that other registers survive.
__attribute__((naked, noinline, noipa)) EMULATOR_UNSEEN inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}

inline void switch_stacks(Fiber& from, Fiber& to) { switch_stacks(&from.top, to.top); }

// `entry` does not return. `skew`: tops of stacks at equal distances would all compete for the same lines of the cache.
inline void set_up(Fiber& fiber, void (*entry)(), size_t skew) {
  char* highest = static_cast<char*>(const_cast<void*>(fiber.lowest)) + fiber.bytes - skew;
  void** top = reinterpret_cast<void**>(highest);
  *--top = nullptr;  // no caller: here ends the stack for whoever walks it
  *--top = reinterpret_cast<void*>(entry);  // for `ret`
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  fiber.top = top;
}

#else

EMULATOR_UNSEEN inline void switch_stacks(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void set_up(Fiber& fiber, void (*entry)(), size_t skew) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.lowest);
  fiber.context.uc_stack.ss_size = fiber.bytes - skew;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

inline thread_local Thread* running = nullptr;  // null: no kernel runs
inline thread_local Fiber* stopped = nullptr;  // the one that ran before

// Where a fiber goes on, and where it starts.
EMULATOR_UNSEEN inline void arrived(Fiber& fiber) {
#if defined(EMULATOR_ASAN)
  // what it says of the stack that was left is news where that is not one of ours, but whoever launched
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &stopped->lowest, &stopped->bytes);
#else
  (void)fiber;
#endif
}

EMULATOR_UNSEEN inline void switch_fibers(Fiber& from, Fiber& to, bool for_good) {
  (void)for_good;
#if defined(EMULATOR_ASAN)
  stopped = &from;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.lowest, to.bytes);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.identity, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(from, to);
  arrived(from);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fences, for ThreadSanitizer
//
// Atomics of CUDA order nothing by themselves. What came before a fence, the fence being before an atomic, comes before
// what is after another thread's later atomic at the same place and a fence after that. A barrier hands on both halves:
// one thread's fence and another's atomic order what they do if a barrier is between them, as on a GPU.

struct Fence {
  const Block* block;
  uint64_t block_number;  // the same Block is used for many
  bool of_device;  // else it orders within its block
  char token;  // by its address ThreadSanitizer knows what was before it
};

// Sorted. Shared: after a barrier all threads have the same ones.
using Fences = std::shared_ptr<const std::vector<Fence*>>;

inline Fences both(const Fences& a, const Fences& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  std::vector<Fence*> all;
  std::set_union(a->begin(), a->end(), b->begin(), b->end(), std::back_inserter(all), std::less<Fence*>());
  return std::make_shared<const std::vector<Fence*>>(std::move(all));
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads, warps, blocks

enum class State : uint8_t {
  kReady,  // or running
  kAtBarrier,
  kInCollective,
  kDone,
};

enum class Collective : uint8_t {
  kSync,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
  kAdd,
  kMin,
  kMax,
  kMinUnsigned,
  kMaxUnsigned,
};

enum class Barrier : uint8_t {
  kPlain,
  kCount,
  kOr,
  kAnd,
};

struct Warp;

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  uint3 index;
  unsigned lane;
  unsigned rank;  // its place in the schedule

  State state;
  // what it waits in: the last that it arrived at
  Collective collective;
  Barrier barrier;
  unsigned mask;
  unsigned source;  // the lane whose value a shuffle wants
  uint64_t value, result;
  Site site;

  Fences fenced;  // those before its next atomic
  Fences seen;  // that its atomics met and none of its fences came after
};

struct Warp {
  Thread* lanes;
  unsigned alive;  // bits of lanes that exist and have not exited
  unsigned waiting;  // in collectives
};

struct SharedVariable {
  const void* site;
  size_t bytes, alignment;
  void* memory;
};

struct Block {
  Launch* launch;
  uint64_t number;
  uint3 index;
  unsigned size, live;
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};
  Warp warps[kMaxThreads / kWarp];
  Stacks stacks;  // of the threads
  std::vector<SharedVariable> shared;

  // bits of threads that can run, by rank, and of words that have any
  uint64_t ready[kMaxThreads / 64];
  unsigned ready_words;

  unsigned at_barrier;
  Thread* first_at_barrier;
  unsigned predicates, result;  // that are true: so far, and at the last barrier
  const Thread* exited;  // the first that did

  void set_ready(Thread& thread) {
    thread.state = State::kReady;
    ready[thread.rank / 64] |= uint64_t{1} << thread.rank % 64;
    ready_words |= 1u << thread.rank / 64;
  }

  void set_waiting(Thread& thread, State state) {
    thread.state = state;
    const unsigned word = thread.rank / 64;
    ready[word] &= ~(uint64_t{1} << thread.rank % 64);
    if (ready[word] == 0) ready_words &= ~(1u << word);
  }

  // null: nobody can go on
  Thread* first_ready() const;

  void free_shared() {
    for (const SharedVariable& v : shared) ::operator delete(v.memory, std::align_val_t(v.alignment));
    shared.clear();
  }
};

struct Launch {
  dim3 grid, block;
  void (*call)(void*);  // of the kernel with its arguments
  void* kernel;

  Fiber host;  // whoever launched
  std::vector<unsigned> order;  // of threads: their numbers by rank
  std::vector<std::unique_ptr<Block>> resident;
  size_t active = 0;  // the resident block whose turn it is
  int direction = 1;  // the next one's; 0: any
  std::minstd_rand random;
  unsigned atomics = 0;  // since any thread got anywhere

  std::exception_ptr error;
  // for ThreadSanitizer: tokens of what was before all threads, and of what they did; and stacks that are done with
  std::unique_ptr<char> began{new char}, ended{new char};
  Stacks used;
  std::deque<Fence> fences;
  std::map<const void*, Fences> met;  // at the places of atomics

  void next_block() {
    const size_t n = resident.size();
    if (n > 1) active = direction == 0 ? random() % n : (active + (direction > 0 ? 1 : n - 1)) % n;
  }
};

inline Thread* Block::first_ready() const {
  if (ready_words == 0) return nullptr;
  const unsigned word = static_cast<unsigned>(__builtin_ctz(ready_words));
  return &threads[launch->order[64 * word + static_cast<unsigned>(__builtin_ctzll(ready[word]))]];
}

EMULATOR_UNSEEN inline Thread& current() { return *running; }

inline std::string text_of(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

inline std::string text_of(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name == nullptr ? site.file : name + 1) + ":" + std::to_string(site.line);
}

inline std::string lane_text(unsigned lane) { return "lane " + std::to_string(lane); }

[[noreturn]] inline void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error(
      "emulator: block " + text_of(thread.block->index) + ", thread " + text_of(thread.index) + ": " + what);
}

inline const char* name_of(Collective collective) {
  static const char* const names[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_xor_sync",  "__shfl_up_sync",    "__shfl_down_sync",
      "__ballot_sync",     "__any_sync",        "__all_sync",       "__reduce_add_sync", "__reduce_min_sync",
      "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync"};
  return names[static_cast<int>(collective)];
}

inline const char* name_of(Barrier barrier) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_or", "__syncthreads_and"};
  return names[static_cast<int>(barrier)];
}

inline std::string place_of(const Thread& thread) {
  if (thread.state == State::kAtBarrier) return std::string(name_of(thread.barrier)) + " at " + text_of(thread.site);
  char mask[16];
  snprintf(mask, sizeof(mask), "0x%08x", thread.mask);
  return std::string(name_of(thread.collective)) + " with mask " + mask + " at " + text_of(thread.site);
}

// A block where nobody can go on: what the threads wait for, those that wait for the same thing as one.
inline std::string deadlock_text(const Block& block) {
  std::map<std::string, std::pair<unsigned, const Thread*>> places;
  for (unsigned i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::kDone) continue;
    auto& place = places.emplace(place_of(thread), std::make_pair(0u, &thread)).first->second;
    ++place.first;
  }
  std::string text = "emulator: block " + text_of(block.index) + ": nobody can go on;";
  for (const auto& place : places) {
    text += " " + std::to_string(place.second.first) + " threads, the first " + text_of(place.second.second->index) +
            ", wait in " + place.first + ";";
  }
  return text + " " + std::to_string(block.size - block.live) + " have exited";
}

// ---------------------------------------------------------------------------------------------------------------------
// Taking turns

// What the threads (of a warp, the lanes of the mask; of a block, all) did before comes before what each does next.
EMULATOR_UNSEEN inline void synchronize(Thread* threads, unsigned count, unsigned mask) {
#if defined(EMULATOR_TSAN)
  // At a place that was never used, so that nothing else is ordered by it. Nobody has done anything since they arrived:
  // each can be spoken for.
  Thread& me = current();
  char* token = new char;
  Fences fenced, seen;
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarp & 1u)) continue;
    fenced = both(fenced, threads[i].fenced);
    seen = both(seen, threads[i].seen);
  }
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarp & 1u)) continue;
    __tsan_switch_to_fiber(threads[i].fiber.identity, __tsan_switch_to_fiber_no_sync);
    __tsan_release(token);
  }
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarp & 1u)) continue;
    __tsan_switch_to_fiber(threads[i].fiber.identity, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(token);
  }
  __tsan_switch_to_fiber(me.fiber.identity, __tsan_switch_to_fiber_no_sync);
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarp & 1u)) continue;
    threads[i].fenced = fenced;
    threads[i].seen = seen;
  }
  delete token;
#else
  (void)threads, (void)count, (void)mask;
#endif
}

// Lets the first thread of the active block run that can; whoever launched, if there is none.
EMULATOR_UNSEEN inline void give_way(Thread& me, bool for_good) {
  Launch& launch = *me.block->launch;
  Thread* next;
  {
    Unseen unseen;
    next = launch.error == nullptr ? launch.resident[launch.active]->first_ready() : nullptr;
  }
  if (next == &me) return;
  running = next;
  switch_fibers(me.fiber, next == nullptr ? launch.host : next->fiber, for_good);
}

inline void finish_barrier(Block& block) {
  synchronize(block.threads.get(), block.size, ~0u);
  block.result = block.predicates;
  block.predicates = block.at_barrier = 0;
  for (unsigned i = 0; i < block.size; ++i) block.set_ready(block.threads[i]);
  block.launch->atomics = 0;
  block.launch->next_block();
}

inline void arrive_at_barrier(Thread& me, Barrier barrier, bool predicate, const Site& site) {
  Block& block = *me.block;
  me.barrier = barrier;
  me.site = site;
  block.set_waiting(me, State::kAtBarrier);
  if (block.exited != nullptr)
    fail(me, "waits in " + place_of(me) + ", but thread " + text_of(block.exited->index) + " has exited");
  if (block.at_barrier == 0) {
    block.first_at_barrier = &me;
  } else {
    const Thread& first = *block.first_at_barrier;
    if (first.barrier != barrier || !(first.site == site))
      fail(me, "waits in " + place_of(me) + ", but thread " + text_of(first.index) + " in " + place_of(first));
  }
  if (predicate) ++block.predicates;
  if (++block.at_barrier == block.size) finish_barrier(block);
}

// How many threads came with a predicate that is true.
EMULATOR_UNSEEN inline unsigned barrier(Barrier kind, bool predicate, const Site& site) {
  Thread& me = current();
  {
    Unseen unseen;
    arrive_at_barrier(me, kind, predicate, site);
  }
  give_way(me, false);
  return me.block->result;  // the next barrier has to wait for this thread
}

template <class Combine>
void give_all(Warp& warp, unsigned lanes, const Combine& combine) {
  uint64_t result = warp.lanes[__builtin_ctz(lanes)].value;
  for (unsigned rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1)
    result = combine(result, warp.lanes[__builtin_ctz(rest)].value);
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) warp.lanes[__builtin_ctz(rest)].result = result;
}

// Everybody gets the result right here: a lane that runs ahead may be in the next collective before others go on.
inline void finish_collective(Warp& warp, unsigned mask) {
  const unsigned lanes = mask & warp.alive;
  const Thread& any = warp.lanes[__builtin_ctz(lanes)];
  synchronize(warp.lanes, kWarp, lanes);
  switch (any.collective) {
    case Collective::kSync:
      break;
    case Collective::kShuffle:
    case Collective::kShuffleXor:
    case Collective::kShuffleUp:
    case Collective::kShuffleDown:
      for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
        Thread& thread = warp.lanes[__builtin_ctz(rest)];
        if (!(lanes >> thread.source & 1u)) {
          const bool in_mask = mask >> thread.source & 1u;
          fail(
              thread, "reads " + lane_text(thread.source) +
                          (in_mask ? ", which has exited or never was" : ", which is not in the mask") + ", in " +
                          place_of(thread));
        }
        thread.result = warp.lanes[thread.source].value;
      }
      break;
    case Collective::kBallot:
    case Collective::kAny:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) { return a | b; });
      break;
    case Collective::kAll:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) { return a & b; });
      break;
    case Collective::kAdd:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) { return a + b; });
      break;
    case Collective::kMin:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) {
        return static_cast<int64_t>(a) < static_cast<int64_t>(b) ? a : b;
      });
      break;
    case Collective::kMax:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) {
        return static_cast<int64_t>(a) > static_cast<int64_t>(b) ? a : b;
      });
      break;
    case Collective::kMinUnsigned:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) { return std::min(a, b); });
      break;
    case Collective::kMaxUnsigned:
      give_all(warp, lanes, [](uint64_t a, uint64_t b) { return std::max(a, b); });
      break;
  }
  warp.waiting &= ~lanes;
  Block& block = *any.block;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) block.set_ready(warp.lanes[__builtin_ctz(rest)]);
  block.launch->atomics = 0;
}

// Lanes that have exited are not waited for, as on a GPU.
inline bool all_arrived(const Warp& warp, Collective collective, unsigned mask) {
  const unsigned lanes = mask & warp.alive;
  if ((warp.waiting & lanes) != lanes) return false;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const Thread& thread = warp.lanes[__builtin_ctz(rest)];
    if (thread.mask != mask || thread.collective != collective) return false;
  }
  return true;
}

inline void arrive_in_collective(
    Thread& me, Collective collective, unsigned mask, uint64_t value, unsigned source, const Site& site) {
  Warp& warp = *me.warp;
  me.collective = collective;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.site = site;
  me.block->set_waiting(me, State::kInCollective);
  if (!(mask >> me.lane & 1u)) fail(me, "is " + lane_text(me.lane) + ", which is not in its own mask: " + place_of(me));
  // A lane may be in another collective, which goes on without this one. It is enough to ask one of those that wait:
  // what escapes here is found when nobody can go on.
  if (const unsigned others = warp.waiting & mask) {
    const Thread& other = warp.lanes[__builtin_ctz(others)];
    const bool same = other.collective == collective && other.mask == mask;
    if (!same && (other.mask >> me.lane & 1u)) {
      fail(
          me,
          "is in " + place_of(me) + ", but thread " + text_of(other.index) + " of the same warp in " + place_of(other));
    }
  }
  warp.waiting |= 1u << me.lane;
  if (all_arrived(warp, collective, mask)) finish_collective(warp, mask);
}

EMULATOR_UNSEEN inline uint64_t collective(
    Collective kind, unsigned mask, uint64_t value, unsigned source, const Site& site) {
  Thread& me = current();
  {
    Unseen unseen;
    arrive_in_collective(me, kind, mask, value, source, site);
  }
  give_way(me, false);
  return me.result;
}

inline void exit_thread(Thread& me) {
  Block& block = *me.block;
  Warp& warp = *me.warp;
  block.set_waiting(me, State::kDone);
  --block.live;
  block.launch->atomics = 0;
  if (block.exited == nullptr) block.exited = &me;
  warp.alive &= ~(1u << me.lane);
  if (block.at_barrier > 0) {
    const Thread& first = *block.first_at_barrier;
    fail(me, "has exited, but thread " + text_of(first.index) + " waits in " + place_of(first));
  }
  for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const Thread& other = warp.lanes[__builtin_ctz(rest)];
    if (other.state == State::kInCollective && all_arrived(warp, other.collective, other.mask))
      finish_collective(warp, other.mask);
  }
}

// What runs on a thread's stack.
EMULATOR_UNSEEN inline void run_thread() {
  Thread& me = current();
  arrived(me.fiber);
  Launch& launch = *me.block->launch;
  // in a function of its own: no exception may be alive where another fiber goes on
  const auto run = [&me, &launch] {
    try {
      launch.call(launch.kernel);
      Unseen unseen;
      exit_thread(me);
    } catch (...) {
      Unseen unseen;
      if (launch.error == nullptr) launch.error = std::current_exception();
    }
  };
  run();
  give_way(me, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

inline void* shared_memory(const void* site, size_t bytes, size_t alignment) {
  Unseen unseen;
  Thread& me = current();
  Block& block = *me.block;
  for (const SharedVariable& v : block.shared) {
    if (v.site == site) return v.memory;
  }
  size_t total = bytes;
  for (const SharedVariable& v : block.shared) total += v.bytes;
  if (total > kSharedBytes) fail(me, "the block needs " + std::to_string(total) + " bytes of shared memory");
  void* memory = ::operator new(bytes, std::align_val_t(alignment));
  std::memset(memory, 0xff, bytes);  // NaN, -1, and no bool: what reads it before it is written shows
  block.shared.push_back({site, bytes, alignment, memory});
  return memory;
}

template <class Type>
Type& shared(const void* site) {
  static_assert(
      std::is_trivially_default_constructible<Type>::value && std::is_trivially_destructible<Type>::value,
      "nvcc takes no initializer of shared memory");
  return *static_cast<Type*>(shared_memory(site, sizeof(Type), alignof(Type)));
}

// Where blocks may overlap, they do at fences and atomics.
EMULATOR_UNSEEN inline void let_other_blocks_run() {
  Thread& me = current();
  Launch& launch = *me.block->launch;
  {
    Unseen unseen;
    if (launch.resident.size() == 1) return;
    launch.next_block();
  }
  give_way(me, false);
}

inline void fence(bool of_device) {
#if defined(EMULATOR_TSAN)
  {
    Unseen unseen;
    Thread& me = current();
    Block& block = *me.block;
    if (me.seen != nullptr) {
      std::vector<Fence*> others;
      for (Fence* f : *me.seen) {
        const bool same_block = f->block == &block && f->block_number == block.number;
        if (same_block || (f->of_device && of_device)) {
          __tsan_acquire(&f->token);
        } else {
          others.push_back(f);
        }
      }
      me.seen = others.empty() ? nullptr : std::make_shared<const std::vector<Fence*>>(std::move(others));
    }
    block.launch->fences.push_back({&block, block.number, of_device, 0});
    Fence* mine = &block.launch->fences.back();
    __tsan_release(&mine->token);
    const auto only_mine = std::make_shared<const std::vector<Fence*>>(1, mine);
    me.fenced =
        of_device ? only_mine : both(me.fenced, only_mine);  // what was before earlier fences is before this one
  }
#else
  (void)of_device;
#endif
  let_other_blocks_run();
}

// Before an atomic at this place.
inline void meet_at(const void* place) {
  Unseen unseen;
  Thread& me = current();
  Launch& launch = *me.block->launch;
  if (++launch.atomics > kTooManyAtomics) fail(me, "waits by atomics for what does not come");
#if defined(EMULATOR_TSAN)
  if (launch.fences.empty()) return;
  Fences& here = launch.met[place];
  here = both(here, me.fenced);
  me.seen = both(me.seen, here);
#else
  (void)place;
#endif
}

// The fibers of a launch share a thread, so nothing comes between load and store. Both are atomic and relaxed for
// ThreadSanitizer: they are in no race with one another, and order nothing else.
template <class T, class Change>
T atomic(T* p, const Change& change) {
  meet_at(p);
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  after = change(before);
  __atomic_store(p, &after, __ATOMIC_RELAXED);
  let_other_blocks_run();
  return before;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

inline unsigned schedule = 0;
inline unsigned residents = 1;
inline thread_local std::vector<std::unique_ptr<Block>> spare_blocks;

// 0 .. n - 1, upwards, downwards, or shuffled by a generator that is seeded with the schedule
inline std::vector<unsigned> scheduled(size_t n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) {
    std::mt19937 random(schedule);
    for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  }
  return order;
}

#if defined(EMULATOR_TSAN)
// Before its threads start, what the token stands for is before what they do; after them, it stands for that, too.
EMULATOR_UNSEEN inline void speak_for_all(
    Block& block, Launch& launch, const std::unique_ptr<char>& token, bool start) {
  Thread* threads = block.threads.get();
  char* address = token.get();
  for (unsigned i = 0; i < block.size; ++i) {
    __tsan_switch_to_fiber(threads[i].fiber.identity, __tsan_switch_to_fiber_no_sync);
    if (start) {
      __tsan_acquire(address);
    } else {
      __tsan_release(address);
    }
  }
  __tsan_switch_to_fiber(launch.host.identity, __tsan_switch_to_fiber_no_sync);
}
#endif

inline void start_block(Launch& launch, Block& block, uint64_t number) {
  const dim3 grid = launch.grid, dim = launch.block;
  block.launch = &launch;
  block.number = number;
  block.index = {
      static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
      static_cast<unsigned>(number / grid.x / grid.y)};
  block.size = block.live = dim.x * dim.y * dim.z;
  block.at_barrier = block.predicates = block.result = 0;
  block.first_at_barrier = nullptr;
  block.exited = nullptr;
  while (block.stacks.size() < block.size) block.stacks.push_back(take_stack());
  for (unsigned w = 0; w * kWarp < block.size; ++w) {
    const unsigned lanes = std::min(kWarp, block.size - w * kWarp);
    block.warps[w] = {&block.threads[w * kWarp], lanes == kWarp ? ~0u : (1u << lanes) - 1, 0};
  }
  std::memset(block.ready, 0, sizeof(block.ready));
  block.ready_words = 0;
  for (unsigned rank = 0; rank < block.size; ++rank) {
    const unsigned i = launch.order[rank];
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.warp = &block.warps[i / kWarp];
    thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    thread.lane = i % kWarp;
    thread.rank = rank;
    block.set_ready(thread);
    thread.fenced = thread.seen = nullptr;
    thread.fiber.lowest = block.stacks[i]->lowest();
    thread.fiber.bytes = kStackBytes;
    thread.fiber.identity = block.stacks[i]->identity;
    thread.fiber.fake_stack = nullptr;
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(thread.fiber.lowest, kStackBytes);  // of who was here before and did not return
#endif
    set_up(thread.fiber, run_thread, i % 64 * 192);
  }
#if defined(EMULATOR_TSAN)
  speak_for_all(block, launch, launch.began, true);
#endif
}

// Also where threads will never go on.
inline void end_block(Launch& launch, Block& block) {
#if defined(EMULATOR_TSAN)
  speak_for_all(block, launch, launch.ended, false);
  // What threads of a launch did is not before what others of it do. A thread on a stack that was another's, or with
  // its identity, would be in a race with that one, or after it: they are used again from the next launch on only.
  for (auto& stack : block.stacks) {
    if (launch.used.size() < kKeptIdentities) launch.used.push_back(std::move(stack));
  }
#else
  std::move(block.stacks.begin(), block.stacks.end(), std::back_inserter(spare_stacks));
#endif
  block.stacks.clear();
  for (const SharedVariable& v : block.shared) {
    const char* memory = static_cast<const char*>(v.memory);
    launch.met.erase(launch.met.lower_bound(memory), launch.met.lower_bound(memory + v.bytes));
  }
  block.free_shared();
}

EMULATOR_UNSEEN inline void run_until_host(Launch& launch, Thread& first) {
  running = &first;
  switch_fibers(launch.host, first.fiber, false);
}

inline void run(Launch& launch) {
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  launch.order = scheduled(threads);
  launch.direction = schedule == 0 ? 1 : schedule == 1 ? -1 : 0;
  launch.random.seed(schedule);
  const std::vector<unsigned> numbers = scheduled(blocks);
#if defined(EMULATOR_TSAN)
  launch.host.identity = __tsan_get_current_fiber();
  __tsan_release(launch.began.get());
#endif
  uint64_t started = 0;
  while (started < blocks && launch.resident.size() < residents) {
    if (spare_blocks.empty()) spare_blocks.push_back(std::make_unique<Block>());
    launch.resident.push_back(std::move(spare_blocks.back()));
    spare_blocks.pop_back();
    start_block(launch, *launch.resident.back(), numbers[started++]);
  }
  while (!launch.resident.empty()) {
    Block& block = *launch.resident[launch.active];
    Thread* first = block.first_ready();
    if (first != nullptr) run_until_host(launch, *first);
    Block& stopped_in = *launch.resident[launch.active];
    if (launch.error == nullptr && stopped_in.live > 0)
      launch.error = std::make_exception_ptr(std::runtime_error(deadlock_text(stopped_in)));
    if (launch.error != nullptr) break;
    end_block(launch, stopped_in);
    if (started < blocks) {
      start_block(launch, stopped_in, numbers[started++]);
    } else {
      spare_blocks.push_back(std::move(launch.resident[launch.active]));
      launch.resident.erase(launch.resident.begin() + static_cast<std::ptrdiff_t>(launch.active));
      if (launch.active == launch.resident.size()) launch.active = 0;
    }
    launch.next_block();
  }
  for (auto& block : launch.resident) {
    end_block(launch, *block);
    spare_blocks.push_back(std::move(block));
  }
#if defined(EMULATOR_TSAN)
  __tsan_acquire(launch.ended.get());
  if (launch.used.size() + spare_stacks.size() > kKeptIdentities) spare_stacks.clear();
  std::move(launch.used.begin(), launch.used.end(), std::back_inserter(spare_stacks));
#endif
}

template <class Kernel, class... Arguments>
struct Bound {
  Kernel kernel;
  std::tuple<Arguments...> arguments;

  static void call(void* bound) {
    const Bound& self = *static_cast<const Bound*>(bound);
    std::apply(self.kernel, self.arguments);
  }
};

}  // namespace detail

// In which order threads run, and blocks: 0 first to last, 1 last to first, else an order at random that k decides.
inline void set_schedule(unsigned k) { detail::schedule = k; }

// How many blocks run at a time. They take turns at barriers, fences and atomics.
inline void set_resident(unsigned n) { detail::residents = std::max(n, 1u); }

// kernel<<<grid, block>>>(arguments...), done when it returns
template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  if (detail::running != nullptr) throw std::runtime_error("emulator: a launch from within a kernel");
  const auto text = [](const dim3& d) { return detail::text_of(uint3{d.x, d.y, d.z}); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > detail::kMaxThreads)
    throw std::runtime_error("emulator: no GPU has blocks of " + text(block) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulator: no GPU has grids of " + text(grid) + " blocks");

  using Bound = detail::Bound<Kernel, Arguments...>;
  Bound bound{kernel, {arguments...}};
  detail::Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.call = Bound::call;
  launch.kernel = &bound;
  {
    detail::Unseen unseen;
    detail::run(launch);
  }
  detail::running = nullptr;
  if (launch.error != nullptr) std::rethrow_exception(launch.error);
}

namespace detail {

EMULATOR_UNSEEN inline uint3 thread_index() { return current().index; }
EMULATOR_UNSEEN inline uint3 block_index() { return current().block->index; }
EMULATOR_UNSEEN inline dim3 block_dimensions() { return current().block->launch->block; }
EMULATOR_UNSEEN inline dim3 grid_dimensions() { return current().block->launch->grid; }
EMULATOR_UNSEEN inline unsigned lane() { return current().lane; }

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles

template <class T>
T shuffle(Collective kind, unsigned mask, T value, unsigned source, const Site& site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA has no shuffle of this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(kind, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of the segment that this one is in.
inline unsigned segment(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(current(), "shuffles with width " + std::to_string(width));
  return lane() & ~(static_cast<unsigned>(width) - 1);
}

}  // namespace detail
}  // namespace emulator

#define threadIdx (::emulator::detail::thread_index())
#define blockIdx (::emulator::detail::block_index())
#define blockDim (::emulator::detail::block_dimensions())
#define gridDim (::emulator::detail::grid_dimensions())

// The last parameters of what threads wait in: where it was called.
#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

inline void __syncthreads(EMULATOR_SITE) {
  emulator::detail::barrier(emulator::detail::Barrier::kPlain, false, {file, line});
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return static_cast<int>(emulator::detail::barrier(emulator::detail::Barrier::kCount, predicate != 0, {file, line}));
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::detail::barrier(emulator::detail::Barrier::kOr, predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::detail::barrier(emulator::detail::Barrier::kAnd, predicate == 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::detail::collective(emulator::detail::Collective::kSync, mask, 0, 0, {file, line});
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives of a warp

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_SITE) {
  const unsigned from = emulator::detail::segment(width) + (static_cast<unsigned>(source) & (width - 1u));
  return emulator::detail::shuffle(emulator::detail::Collective::kShuffle, mask, value, from, {file, line});
}
// A lane of an earlier segment can be read, none of a later one.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane(), from = lane ^ static_cast<unsigned>(lanes);
  const unsigned end = emulator::detail::segment(width) + static_cast<unsigned>(width);
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleXor, mask, value, from < end ? from : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane(), first = emulator::detail::segment(width);
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleUp, mask, value, lane - first >= delta ? lane - delta : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane();
  const unsigned after = emulator::detail::segment(width) + static_cast<unsigned>(width) - lane;  // lanes from here on
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleDown, mask, value, delta < after ? lane + delta : lane, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const uint64_t bit = predicate != 0 ? uint64_t{1} << emulator::detail::lane() : 0;
  return static_cast<unsigned>(
      emulator::detail::collective(emulator::detail::Collective::kBallot, mask, bit, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::detail::collective(emulator::detail::Collective::kAny, mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::detail::collective(emulator::detail::Collective::kAll, mask, predicate != 0, 0, {file, line}) != 0;
}

// int is widened with its sign, so that the order of 64 bits is that of 32
inline int __reduce_add_sync(unsigned mask, int value, EMULATOR_SITE) {
  return static_cast<int>(emulator::detail::collective(
      emulator::detail::Collective::kAdd, mask, static_cast<uint64_t>(int64_t{value}), 0, {file, line}));
}
inline int __reduce_min_sync(unsigned mask, int value, EMULATOR_SITE) {
  return static_cast<int>(emulator::detail::collective(
      emulator::detail::Collective::kMin, mask, static_cast<uint64_t>(int64_t{value}), 0, {file, line}));
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATOR_SITE) {
  return static_cast<int>(emulator::detail::collective(
      emulator::detail::Collective::kMax, mask, static_cast<uint64_t>(int64_t{value}), 0, {file, line}));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  return static_cast<unsigned>(
      emulator::detail::collective(emulator::detail::Collective::kAdd, mask, value, 0, {file, line}));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  return static_cast<unsigned>(
      emulator::detail::collective(emulator::detail::Collective::kMinUnsigned, mask, value, 0, {file, line}));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  return static_cast<unsigned>(
      emulator::detail::collective(emulator::detail::Collective::kMaxUnsigned, mask, value, 0, {file, line}));
}

#undef EMULATOR_SITE

// ---------------------------------------------------------------------------------------------------------------------
// Memory

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

inline void __threadfence() { emulator::detail::fence(true); }
inline void __threadfence_block() { emulator::detail::fence(false); }

#define EMULATOR_ATOMIC(name, Type, ...)                                                   \
  inline Type name(Type* p, Type value) {                                                  \
    return emulator::detail::atomic(p, [value](Type old) -> Type { return __VA_ARGS__; }); \
  }

// sums of int wrap around
EMULATOR_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicExch, int, ((void)old, value))
EMULATOR_ATOMIC(atomicExch, unsigned, ((void)old, value))
EMULATOR_ATOMIC(atomicExch, unsigned long long, ((void)old, value))
EMULATOR_ATOMIC(atomicExch, float, ((void)old, value))
EMULATOR_ATOMIC(atomicMin, int, std::min(old, value))
EMULATOR_ATOMIC(atomicMin, unsigned, std::min(old, value))
EMULATOR_ATOMIC(atomicMin, long long, std::min(old, value))
EMULATOR_ATOMIC(atomicMin, unsigned long long, std::min(old, value))
EMULATOR_ATOMIC(atomicMax, int, std::max(old, value))
EMULATOR_ATOMIC(atomicMax, unsigned, std::max(old, value))
EMULATOR_ATOMIC(atomicMax, long long, std::max(old, value))
EMULATOR_ATOMIC(atomicMax, unsigned long long, std::max(old, value))
#undef EMULATOR_ATOMIC

#define EMULATOR_ATOMIC_CAS(Type)                                                                        \
  inline Type atomicCAS(Type* p, Type expected, Type value) {                                            \
    return emulator::detail::atomic(p, [=](Type old) -> Type { return old == expected ? value : old; }); \
  }
EMULATOR_ATOMIC_CAS(int)
EMULATOR_ATOMIC_CAS(unsigned)
EMULATOR_ATOMIC_CAS(unsigned long long)
#undef EMULATOR_ATOMIC_CAS

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

namespace emulator {
namespace detail {

template <class To, class From>
To cast_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

}  // namespace detail
}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::detail::cast_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::detail::cast_bits<float>(x); }
inline int __float_as_int(float x) { return emulator::detail::cast_bits<int>(x); }
inline float __int_as_float(int x) { return emulator::detail::cast_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::detail::cast_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::detail::cast_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline float __fdividef(float x, float y) { return x / y; }
