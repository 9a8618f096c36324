// Emulates CUDA kernels on the CPU with one fiber per CUDA thread. This tests the kernels without a GPU.
//
// All fibers of a launch run on one thread of the operating system. A fiber runs until it waits at a barrier or in a
// warp collective. Then the first thread that can run continues, in the order of set_schedule(). So early threads run
// as far ahead of late ones as the barriers allow. This exposes code that relies on an unenforced order.
//
// Deadlocks and undefined uses of barriers and collectives throw std::runtime_error. The message names the block and
// the thread.
//
// AddressSanitizer (ASan) sees each shared variable as a separate allocation. ThreadSanitizer (TSan) sees each CUDA
// thread as a thread. It sees only the happens-before edges that CUDA guarantees, so it reports a missing barrier or
// fence as a data race under any schedule.
//
// Not supported: dynamic shared memory, textures, cooperative groups, __activemask(), spinning on a plain load.
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

#if defined(__SANITIZE_ADDRESS__)  // gcc
#define EMULATOR_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
#elif defined(__has_feature)  // clang
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

// For functions of the emulator that access its own state. TSan must check the accesses of the kernel only.
#define EMULATOR_NO_TSAN __attribute__((no_sanitize("thread")))

#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll

// ---------------------------------------------------------------------------------------------------------------------
// CUDA keywords and types

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // empty, because system headers write __attribute__((__noinline__))
#define __launch_bounds__(...)

// Declares `Type& name`, a variable that the threads of a block share. For nvcc, define it as `__shared__ Type name`.
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

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // static shared memory of a block; every GPU has this much
// Stack frames are large without optimization. Unused pages cost no memory.
constexpr size_t kStackBytes = 256 * 1024;
// With TSan only: each stack has a TSan fiber, which needs almost 1 MB and takes 1 ms to create.
constexpr size_t kMaxPooledStacks = 1024;
// If no thread makes progress during so many atomics, a thread is assumed to spin forever.
constexpr unsigned kMaxAtomicsWithoutProgress = 1u << 22;

struct Block;
struct Launch;
struct Thread;

// A position in the source of the kernel.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

// A scope in which TSan ignores memory accesses, because they are the emulator's own. A CUDA thread must not switch to
// another fiber inside the scope: it may never resume, and TSan reports a scope that does not end.
struct IgnoreAccesses {
#if defined(EMULATOR_TSAN)
  IgnoreAccesses() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreAccesses() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  IgnoreAccesses() {}
  ~IgnoreAccesses() {}
#endif
  IgnoreAccesses(const IgnoreAccesses&) = delete;
  IgnoreAccesses& operator=(const IgnoreAccesses&) = delete;
};

// The stack of a CUDA thread, with a guard page below it that catches overflows, and the thread's TSan fiber.
class Stack {
 public:
  void* tsan_fiber = nullptr;

  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory =
        mmap(nullptr, guard_ + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, guard_, PROT_NONE);
#if defined(EMULATOR_TSAN)
    tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  ~Stack() {
#if defined(EMULATOR_TSAN)
    __tsan_destroy_fiber(tsan_fiber);
#endif
    munmap(memory_, guard_ + kStackBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + guard_; }

 private:
  size_t guard_;
  char* memory_;
};

using Stacks = std::vector<std::unique_ptr<Stack>>;

// Stacks that no thread uses. Later launches reuse them.
inline thread_local Stacks spare_stacks;

inline std::unique_ptr<Stack> take_stack() {
  if (spare_stacks.empty()) return std::make_unique<Stack>();
  std::unique_ptr<Stack> stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

// An execution context with its own stack that can be suspended anywhere: a CUDA thread, or the host that launches.
struct Fiber {
  const void* stack_bottom = nullptr;  // lowest address
  size_t stack_size = 0;
#if defined(EMULATOR_X86_64)
  void* stack_pointer = nullptr;  // while suspended
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // of ASan
  void* tsan_fiber = nullptr;
};

#if defined(EMULATOR_X86_64)

// Pushes the callee-saved registers, stores the stack pointer in *from, and resumes the fiber whose stack pointer is
// `to`. This is about ten times as fast as swapcontext, which makes a system call for the signal mask. noipa: a
// compiler that analyzes the body would conclude that it preserves other registers, too.
__attribute__((naked, noinline, noipa)) EMULATOR_NO_TSAN inline void switch_stacks(void** /*from*/, void* /*to*/) {
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

inline void switch_stacks(Fiber& from, Fiber& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }

// Prepares a fiber to start in `entry`, which does not return. `skew` lowers the top of the stack by a number of bytes.
// Tops of stacks at equal distances would compete for the same cache lines.
inline void init_fiber(Fiber& fiber, void (*entry)(), size_t skew) {
  char* highest = static_cast<char*>(const_cast<void*>(fiber.stack_bottom)) + fiber.stack_size - skew;
  void** top = reinterpret_cast<void**>(highest);
  *--top = nullptr;  // no return address: unwinders stop here
  *--top = reinterpret_cast<void*>(entry);  // for `ret`
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  fiber.stack_pointer = top;
}

#else

EMULATOR_NO_TSAN inline void switch_stacks(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void init_fiber(Fiber& fiber, void (*entry)(), size_t skew) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack_bottom);
  fiber.context.uc_stack.ss_size = fiber.stack_size - skew;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

inline thread_local Thread* running = nullptr;  // null: no kernel runs
inline thread_local Fiber* previous_fiber = nullptr;  // the fiber that ran before this one; for ASan only

// Must be called first when a fiber starts or resumes.
EMULATOR_NO_TSAN inline void finish_switch(Fiber& fiber) {
#if defined(EMULATOR_ASAN)
  // ASan returns the bounds of the previous fiber's stack. Only the host's bounds were unknown until then.
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &previous_fiber->stack_bottom, &previous_fiber->stack_size);
#else
  (void)fiber;
#endif
}

// Suspends `from` and resumes `to`. `exiting`: `from` never resumes.
EMULATOR_NO_TSAN inline void switch_fibers(Fiber& from, Fiber& to, bool exiting) {
  (void)exiting;
#if defined(EMULATOR_ASAN)
  previous_fiber = &from;
  __sanitizer_start_switch_fiber(exiting ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(from, to);
  finish_switch(from);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fences, for TSan
//
// CUDA atomics alone order nothing. Two fences and two atomics at the same address make a happens-before edge:
//   thread 1: operations, fence, atomic
//   thread 2: later atomic, fence, operations
// The operations of thread 1 then happen before those of thread 2. As on a GPU, each fence and its atomic may belong to
// different threads if a barrier is between them.

struct Fence {
  const Block* block;
  uint64_t block_number;  // distinguishes the blocks of the grid that use the same Block object
  bool device_scope;  // __threadfence(), else __threadfence_block()
  char token;  // TSan synchronizes on its address: released at the fence
};

// A set of fences, sorted by address. The pointer is shared, because all threads have the same set after a barrier.
using Fences = std::shared_ptr<const std::vector<Fence*>>;

inline Fences union_of(const Fences& a, const Fences& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  std::vector<Fence*> all;
  std::set_union(a->begin(), a->end(), b->begin(), b->end(), std::back_inserter(all), std::less<Fence*>());
  return std::make_shared<const std::vector<Fence*>>(std::move(all));
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads, warps, blocks

enum class State : uint8_t {
  kReady,  // can run, or runs
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
  unsigned rank;  // position in the schedule

  State state;
  // The barrier or warp collective at which the thread arrived last.
  Collective collective;
  Barrier barrier;
  unsigned mask;
  unsigned source;  // the lane from which a shuffle reads
  uint64_t value, result;
  Site site;

  Fences release_fences;  // each later atomic publishes them at its address
  Fences pending_fences;  // found by atomics; the next fence acquires those that its scope allows
};

struct Warp {
  Thread* lanes;
  unsigned alive_lanes;  // mask of the lanes that exist and have not exited
  unsigned waiting_lanes;  // mask of the lanes that wait in a collective
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
  unsigned size, live_threads;
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};
  Warp warps[kMaxThreads / kWarpSize];
  Stacks stacks;  // one for each thread
  std::vector<SharedVariable> shared;

  uint64_t ready[kMaxThreads / 64];  // a bit for each rank: the thread can run
  unsigned ready_words;  // a bit for each word of `ready`: the word is not 0

  unsigned at_barrier;  // number of threads that wait at the barrier
  Thread* first_at_barrier;
  unsigned true_predicates;  // at the current barrier, so far
  unsigned barrier_result;  // the number of true predicates at the last completed barrier
  const Thread* first_exited;  // null if no thread has exited

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

  // Null if no thread can run.
  Thread* first_ready() const;

  void free_shared() {
    for (const SharedVariable& v : shared) ::operator delete(v.memory, std::align_val_t(v.alignment));
    shared.clear();
  }
};

struct Launch {
  dim3 grid, block;
  void (*call)(void*);  // calls `kernel`, a BoundKernel, with its arguments
  void* kernel;

  Fiber host;  // the fiber that launched the kernel
  std::vector<unsigned> thread_order;  // rank in the schedule to index in Block::threads
  std::vector<std::unique_ptr<Block>> resident;
  size_t active = 0;  // index in `resident` of the block that runs
  int direction = 1;  // step to the next active block; 0: random
  std::minstd_rand random;
  unsigned atomics_without_progress = 0;  // progress: a completed barrier or collective, or the exit of a thread

  std::exception_ptr error;
  // The rest is for TSan. Threads acquire start_token when they start, and release end_token when they end.
  std::unique_ptr<char> start_token{new char}, end_token{new char};
  Stacks retired_stacks;  // of blocks that have ended; later launches reuse them
  std::deque<Fence> fences;
  std::map<const void*, Fences> published_fences;  // by the address of the atomic

  // Makes the next resident block active.
  void next_block() {
    const size_t n = resident.size();
    if (n > 1) active = direction == 0 ? random() % n : (active + (direction > 0 ? 1 : n - 1)) % n;
  }
};

inline Thread* Block::first_ready() const {
  if (ready_words == 0) return nullptr;
  const unsigned word = static_cast<unsigned>(__builtin_ctz(ready_words));
  return &threads[launch->thread_order[64 * word + static_cast<unsigned>(__builtin_ctzll(ready[word]))]];
}

EMULATOR_NO_TSAN inline Thread& current() { return *running; }

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

inline std::string wait_text(const Thread& thread) {
  if (thread.state == State::kAtBarrier) return std::string(name_of(thread.barrier)) + " at " + text_of(thread.site);
  char mask[16];
  snprintf(mask, sizeof(mask), "0x%08x", thread.mask);
  return std::string(name_of(thread.collective)) + " with mask " + mask + " at " + text_of(thread.site);
}

// The message for a block in which no thread can continue: how many threads wait, grouped by where they wait.
inline std::string deadlock_text(const Block& block) {
  std::map<std::string, std::pair<unsigned, const Thread*>> places;
  for (unsigned i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::kDone) continue;
    auto& place = places.emplace(wait_text(thread), std::make_pair(0u, &thread)).first->second;
    ++place.first;
  }
  std::string text = "emulator: block " + text_of(block.index) + ": deadlock: no thread can continue;";
  for (const auto& place : places) {
    text += " " + std::to_string(place.second.first) + " threads, the first " + text_of(place.second.second->index) +
            ", wait in " + place.first + ";";
  }
  return text + " " + std::to_string(block.size - block.live_threads) + " have exited";
}

// ---------------------------------------------------------------------------------------------------------------------
// Synchronization and scheduling

// Adds happens-before edges for TSan: everything that any of these threads did happens before what each of them does
// next. For a warp, `threads` are its lanes and `mask` selects some. For a block, `mask` selects all.
EMULATOR_NO_TSAN inline void synchronize(Thread* threads, unsigned count, unsigned mask) {
#if defined(EMULATOR_TSAN)
  // A new token, so that no other edge results. The other threads have been suspended since they arrived, so this
  // thread can release and acquire in their place.
  Thread& me = current();
  char* token = new char;
  Fences release_fences, pending_fences;
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarpSize & 1u)) continue;
    release_fences = union_of(release_fences, threads[i].release_fences);
    pending_fences = union_of(pending_fences, threads[i].pending_fences);
  }
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarpSize & 1u)) continue;
    __tsan_switch_to_fiber(threads[i].fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_release(token);
  }
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarpSize & 1u)) continue;
    __tsan_switch_to_fiber(threads[i].fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(token);
  }
  __tsan_switch_to_fiber(me.fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i % kWarpSize & 1u)) continue;
    threads[i].release_fences = release_fences;
    threads[i].pending_fences = pending_fences;
  }
  delete token;
#else
  (void)threads, (void)count, (void)mask;
#endif
}

// Switches to the first ready thread of the active block. Switches to the host if there is none or after an error.
EMULATOR_NO_TSAN inline void switch_to_next(Thread& me, bool exiting) {
  Launch& launch = *me.block->launch;
  Thread* next;
  {
    IgnoreAccesses ignore;
    next = launch.error == nullptr ? launch.resident[launch.active]->first_ready() : nullptr;
  }
  if (next == &me) return;
  running = next;
  switch_fibers(me.fiber, next == nullptr ? launch.host : next->fiber, exiting);
}

inline void finish_barrier(Block& block) {
  synchronize(block.threads.get(), block.size, ~0u);
  block.barrier_result = block.true_predicates;
  block.true_predicates = block.at_barrier = 0;
  for (unsigned i = 0; i < block.size; ++i) block.set_ready(block.threads[i]);
  block.launch->atomics_without_progress = 0;
  block.launch->next_block();
}

inline void arrive_at_barrier(Thread& me, Barrier barrier, bool predicate, const Site& site) {
  Block& block = *me.block;
  me.barrier = barrier;
  me.site = site;
  block.set_waiting(me, State::kAtBarrier);
  if (block.first_exited != nullptr)
    fail(me, "waits in " + wait_text(me) + ", but thread " + text_of(block.first_exited->index) + " has exited");
  if (block.at_barrier == 0) {
    block.first_at_barrier = &me;
  } else {
    const Thread& first = *block.first_at_barrier;
    if (first.barrier != barrier || !(first.site == site))
      fail(me, "waits in " + wait_text(me) + ", but thread " + text_of(first.index) + " waits in " + wait_text(first));
  }
  if (predicate) ++block.true_predicates;
  if (++block.at_barrier == block.size) finish_barrier(block);
}

// Waits at a barrier of the block. Returns the number of threads whose predicate is true.
EMULATOR_NO_TSAN inline unsigned barrier(Barrier kind, bool predicate, const Site& site) {
  Thread& me = current();
  {
    IgnoreAccesses ignore;
    arrive_at_barrier(me, kind, predicate, site);
  }
  switch_to_next(me, false);
  return me.block->barrier_result;  // still of this barrier: the next one cannot complete without this thread
}

// Combines the values of the lanes. Every lane gets the result.
template <class Combine>
void reduce_to_all_lanes(Warp& warp, unsigned lanes, const Combine& combine) {
  uint64_t result = warp.lanes[__builtin_ctz(lanes)].value;
  for (unsigned rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1)
    result = combine(result, warp.lanes[__builtin_ctz(rest)].value);
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) warp.lanes[__builtin_ctz(rest)].result = result;
}

// Writes the results of all lanes at once. When the last lane resumes, another one may have overwritten its value in
// the next collective.
inline void finish_collective(Warp& warp, unsigned mask) {
  const unsigned lanes = mask & warp.alive_lanes;
  const Thread& any = warp.lanes[__builtin_ctz(lanes)];
  synchronize(warp.lanes, kWarpSize, lanes);
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
                          (in_mask ? ", which has exited or does not exist" : ", which is not in the mask") + ", in " +
                          wait_text(thread));
        }
        thread.result = warp.lanes[thread.source].value;
      }
      break;
    case Collective::kBallot:
    case Collective::kAny:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) { return a | b; });
      break;
    case Collective::kAll:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) { return a & b; });
      break;
    case Collective::kAdd:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) { return a + b; });
      break;
    case Collective::kMin:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) {
        return static_cast<int64_t>(a) < static_cast<int64_t>(b) ? a : b;
      });
      break;
    case Collective::kMax:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) {
        return static_cast<int64_t>(a) > static_cast<int64_t>(b) ? a : b;
      });
      break;
    case Collective::kMinUnsigned:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) { return std::min(a, b); });
      break;
    case Collective::kMaxUnsigned:
      reduce_to_all_lanes(warp, lanes, [](uint64_t a, uint64_t b) { return std::max(a, b); });
      break;
  }
  warp.waiting_lanes &= ~lanes;
  Block& block = *any.block;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) block.set_ready(warp.lanes[__builtin_ctz(rest)]);
  block.launch->atomics_without_progress = 0;
}

// Whether all lanes of the mask wait in this collective. As on a GPU, lanes that have exited do not count.
inline bool all_arrived(const Warp& warp, Collective collective, unsigned mask) {
  const unsigned lanes = mask & warp.alive_lanes;
  if ((warp.waiting_lanes & lanes) != lanes) return false;
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
  if (!(mask >> me.lane & 1u))
    fail(me, "is " + lane_text(me.lane) + ", which is not in its own mask: " + wait_text(me));
  // Another lane of this mask may wait in a collective that does not include this lane: no error. It is enough to check
  // one waiting lane. A mismatch that is not found here ends in a deadlock, which is reported.
  if (const unsigned others = warp.waiting_lanes & mask) {
    const Thread& other = warp.lanes[__builtin_ctz(others)];
    const bool same = other.collective == collective && other.mask == mask;
    if (!same && (other.mask >> me.lane & 1u)) {
      fail(
          me, "is in " + wait_text(me) + ", but thread " + text_of(other.index) + " of the same warp is in " +
                  wait_text(other));
    }
  }
  warp.waiting_lanes |= 1u << me.lane;
  if (all_arrived(warp, collective, mask)) finish_collective(warp, mask);
}

EMULATOR_NO_TSAN inline uint64_t collective(
    Collective kind, unsigned mask, uint64_t value, unsigned source, const Site& site) {
  Thread& me = current();
  {
    IgnoreAccesses ignore;
    arrive_in_collective(me, kind, mask, value, source, site);
  }
  switch_to_next(me, false);
  return me.result;
}

inline void exit_thread(Thread& me) {
  Block& block = *me.block;
  Warp& warp = *me.warp;
  block.set_waiting(me, State::kDone);
  --block.live_threads;
  block.launch->atomics_without_progress = 0;
  if (block.first_exited == nullptr) block.first_exited = &me;
  warp.alive_lanes &= ~(1u << me.lane);
  if (block.at_barrier > 0) {
    const Thread& first = *block.first_at_barrier;
    fail(me, "has exited, but thread " + text_of(first.index) + " waits in " + wait_text(first));
  }
  for (unsigned rest = warp.waiting_lanes; rest != 0; rest &= rest - 1) {
    const Thread& other = warp.lanes[__builtin_ctz(rest)];
    if (other.state == State::kInCollective && all_arrived(warp, other.collective, other.mask))
      finish_collective(warp, other.mask);
  }
}

// The entry point of a CUDA thread's fiber.
EMULATOR_NO_TSAN inline void run_thread() {
  Thread& me = current();
  finish_switch(me.fiber);
  Launch& launch = *me.block->launch;
  // A separate function: the catch block must end, and with it the exception, before another fiber resumes.
  const auto run = [&me, &launch] {
    try {
      launch.call(launch.kernel);
      IgnoreAccesses ignore;
      exit_thread(me);
    } catch (...) {
      IgnoreAccesses ignore;
      if (launch.error == nullptr) launch.error = std::current_exception();
    }
  };
  run();
  switch_to_next(me, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// The memory of a shared variable of the current block. The first thread that gets there allocates it.
inline void* shared_memory(const void* site, size_t bytes, size_t alignment) {
  IgnoreAccesses ignore;
  Thread& me = current();
  Block& block = *me.block;
  for (const SharedVariable& v : block.shared) {
    if (v.site == site) return v.memory;
  }
  size_t total = bytes;
  for (const SharedVariable& v : block.shared) total += v.bytes;
  if (total > kSharedBytes) {
    fail(
        me, "the block needs " + std::to_string(total) + " bytes of shared memory, the limit is " +
                std::to_string(kSharedBytes));
  }
  void* memory = ::operator new(bytes, std::align_val_t(alignment));
  // NaN, -1, or an invalid bool: makes reads of uninitialized memory visible
  std::memset(memory, 0xff, bytes);
  block.shared.push_back({site, bytes, alignment, memory});
  return memory;
}

template <class Type>
Type& shared(const void* site) {
  static_assert(
      std::is_trivially_default_constructible<Type>::value && std::is_trivially_destructible<Type>::value,
      "nvcc allows no initializer for shared memory");
  return *static_cast<Type*>(shared_memory(site, sizeof(Type), alignof(Type)));
}

// Switches to another resident block, if there is one. Called at fences and atomics.
EMULATOR_NO_TSAN inline void let_other_blocks_run() {
  Thread& me = current();
  Launch& launch = *me.block->launch;
  {
    IgnoreAccesses ignore;
    if (launch.resident.size() == 1) return;
    launch.next_block();
  }
  switch_to_next(me, false);
}

inline void fence(bool device_scope) {
#if defined(EMULATOR_TSAN)
  {
    IgnoreAccesses ignore;
    Thread& me = current();
    Block& block = *me.block;
    if (me.pending_fences != nullptr) {
      std::vector<Fence*> others;
      for (Fence* f : *me.pending_fences) {
        const bool same_block = f->block == &block && f->block_number == block.number;
        if (same_block || (f->device_scope && device_scope)) {
          __tsan_acquire(&f->token);
        } else {
          others.push_back(f);
        }
      }
      me.pending_fences = others.empty() ? nullptr : std::make_shared<const std::vector<Fence*>>(std::move(others));
    }
    block.launch->fences.push_back({&block, block.number, device_scope, 0});
    Fence* mine = &block.launch->fences.back();
    __tsan_release(&mine->token);
    const auto only_mine = std::make_shared<const std::vector<Fence*>>(1, mine);
    // A fence also covers what precedes earlier fences. So a device-scope fence replaces them. A block-scope fence does
    // not, because their scope may be wider.
    me.release_fences = device_scope ? only_mine : union_of(me.release_fences, only_mine);
  }
#else
  (void)device_scope;
#endif
  let_other_blocks_run();
}

// Must be called before each atomic at `address`. Counts it, and exchanges fences with other atomics at the address.
inline void before_atomic(const void* address) {
  IgnoreAccesses ignore;
  Thread& me = current();
  Launch& launch = *me.block->launch;
  if (++launch.atomics_without_progress > kMaxAtomicsWithoutProgress) {
    fail(
        me, "spins forever: " + std::to_string(kMaxAtomicsWithoutProgress) +
                " atomics since a barrier or warp collective completed or a thread exited");
  }
#if defined(EMULATOR_TSAN)
  if (launch.fences.empty()) return;
  Fences& here = launch.published_fences[address];
  here = union_of(here, me.release_fences);
  me.pending_fences = union_of(me.pending_fences, here);
#else
  (void)address;
#endif
}

// Replaces *p by change(*p) and returns the old value. No other fiber runs between load and store. Both are relaxed
// atomics, so that TSan reports no race between atomics and adds no happens-before edge.
template <class T, class Change>
T atomic(T* p, const Change& change) {
  before_atomic(p);
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
inline unsigned max_resident_blocks = 1;
inline thread_local std::vector<std::unique_ptr<Block>> spare_blocks;

// The numbers 0 .. n - 1 in the order of set_schedule(). Random orders are seeded with the schedule.
inline std::vector<unsigned> scheduled_order(size_t n) {
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
// Acquires or releases the token in each thread of the block. Acquire: operations before earlier releases of the token
// happen before those of the threads. Release: operations of the threads happen before those after a later acquire.
EMULATOR_NO_TSAN inline void synchronize_with_token(
    Block& block, Launch& launch, const std::unique_ptr<char>& token, bool acquire) {
  Thread* threads = block.threads.get();
  char* address = token.get();
  for (unsigned i = 0; i < block.size; ++i) {
    __tsan_switch_to_fiber(threads[i].fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    if (acquire) {
      __tsan_acquire(address);
    } else {
      __tsan_release(address);
    }
  }
  __tsan_switch_to_fiber(launch.host.tsan_fiber, __tsan_switch_to_fiber_no_sync);
}
#endif

inline void start_block(Launch& launch, Block& block, uint64_t number) {
  const dim3 grid = launch.grid, dim = launch.block;
  block.launch = &launch;
  block.number = number;
  block.index = {
      static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
      static_cast<unsigned>(number / grid.x / grid.y)};
  block.size = block.live_threads = dim.x * dim.y * dim.z;
  block.at_barrier = block.true_predicates = block.barrier_result = 0;
  block.first_at_barrier = nullptr;
  block.first_exited = nullptr;
  while (block.stacks.size() < block.size) block.stacks.push_back(take_stack());
  for (unsigned w = 0; w * kWarpSize < block.size; ++w) {
    const unsigned lanes = std::min(kWarpSize, block.size - w * kWarpSize);
    block.warps[w] = {&block.threads[w * kWarpSize], lanes == kWarpSize ? ~0u : (1u << lanes) - 1, 0};
  }
  std::memset(block.ready, 0, sizeof(block.ready));
  block.ready_words = 0;
  for (unsigned rank = 0; rank < block.size; ++rank) {
    const unsigned i = launch.thread_order[rank];
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpSize];
    thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    thread.lane = i % kWarpSize;
    thread.rank = rank;
    block.set_ready(thread);
    thread.release_fences = thread.pending_fences = nullptr;
    thread.fiber.stack_bottom = block.stacks[i]->bottom();
    thread.fiber.stack_size = kStackBytes;
    thread.fiber.tsan_fiber = block.stacks[i]->tsan_fiber;
    thread.fiber.fake_stack = nullptr;
#if defined(EMULATOR_ASAN)
    // An earlier thread on this stack may never have returned, which leaves its frames poisoned.
    __asan_unpoison_memory_region(thread.fiber.stack_bottom, kStackBytes);
#endif
    init_fiber(thread.fiber, run_thread, i % 64 * 192);
  }
#if defined(EMULATOR_TSAN)
  synchronize_with_token(block, launch, launch.start_token, true);
#endif
}

// Releases stacks and shared memory of a block. After an error, some of its threads may not have exited.
inline void end_block(Launch& launch, Block& block) {
#if defined(EMULATOR_TSAN)
  synchronize_with_token(block, launch, launch.end_token, false);
  // Stacks and their TSan fibers are reused by later launches only, because threads of one launch are not ordered. If a
  // thread reused the stack of another, TSan would report a race. If it reused the fiber, TSan would order them.
  for (auto& stack : block.stacks) {
    if (launch.retired_stacks.size() < kMaxPooledStacks) launch.retired_stacks.push_back(std::move(stack));
  }
#else
  std::move(block.stacks.begin(), block.stacks.end(), std::back_inserter(spare_stacks));
#endif
  block.stacks.clear();
  for (const SharedVariable& v : block.shared) {
    const char* memory = static_cast<const char*>(v.memory);
    launch.published_fences.erase(
        launch.published_fences.lower_bound(memory), launch.published_fences.lower_bound(memory + v.bytes));
  }
  block.free_shared();
}

// Runs threads, from `first` on, until one of them switches back to the host.
EMULATOR_NO_TSAN inline void run_until_host(Launch& launch, Thread& first) {
  running = &first;
  switch_fibers(launch.host, first.fiber, false);
}

inline void run(Launch& launch) {
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  launch.thread_order = scheduled_order(threads);
  launch.direction = schedule == 0 ? 1 : schedule == 1 ? -1 : 0;
  launch.random.seed(schedule);
  const std::vector<unsigned> block_order = scheduled_order(blocks);
#if defined(EMULATOR_TSAN)
  launch.host.tsan_fiber = __tsan_get_current_fiber();
  __tsan_release(launch.start_token.get());
#endif
  uint64_t started = 0;
  while (started < blocks && launch.resident.size() < max_resident_blocks) {
    if (spare_blocks.empty()) spare_blocks.push_back(std::make_unique<Block>());
    launch.resident.push_back(std::move(spare_blocks.back()));
    spare_blocks.pop_back();
    start_block(launch, *launch.resident.back(), block_order[started++]);
  }
  while (!launch.resident.empty()) {
    Block& block = *launch.resident[launch.active];
    Thread* first = block.first_ready();
    if (first != nullptr) run_until_host(launch, *first);
    Block& stopped_in = *launch.resident[launch.active];
    if (launch.error == nullptr && stopped_in.live_threads > 0)
      launch.error = std::make_exception_ptr(std::runtime_error(deadlock_text(stopped_in)));
    if (launch.error != nullptr) break;
    end_block(launch, stopped_in);
    if (started < blocks) {
      start_block(launch, stopped_in, block_order[started++]);
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
  __tsan_acquire(launch.end_token.get());
  if (launch.retired_stacks.size() + spare_stacks.size() > kMaxPooledStacks) spare_stacks.clear();
  std::move(launch.retired_stacks.begin(), launch.retired_stacks.end(), std::back_inserter(spare_stacks));
#endif
}

// A kernel with its arguments.
template <class Kernel, class... Arguments>
struct BoundKernel {
  Kernel kernel;
  std::tuple<Arguments...> arguments;

  static void call(void* bound) {
    const BoundKernel& self = *static_cast<const BoundKernel*>(bound);
    std::apply(self.kernel, self.arguments);
  }
};

}  // namespace detail

// Sets the order of threads and of blocks. 0: first to last. 1: last to first. Others: a random order with seed k.
inline void set_schedule(unsigned k) { detail::schedule = k; }

// Sets the number of blocks that run concurrently. They take turns at barriers, fences and atomics.
inline void set_resident(unsigned n) { detail::max_resident_blocks = std::max(n, 1u); }

// Runs kernel<<<grid, block>>>(arguments...) to its end. Rethrows what the kernel throws.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  if (detail::running != nullptr) throw std::runtime_error("emulator: a kernel cannot launch another one");
  const auto text = [](const dim3& d) { return detail::text_of(uint3{d.x, d.y, d.z}); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > detail::kMaxThreads)
    throw std::runtime_error("emulator: CUDA does not allow blocks of " + text(block) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulator: CUDA does not allow grids of " + text(grid) + " blocks");

  using BoundKernel = detail::BoundKernel<Kernel, Arguments...>;
  BoundKernel bound{kernel, {arguments...}};
  detail::Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.call = BoundKernel::call;
  launch.kernel = &bound;
  {
    detail::IgnoreAccesses ignore;
    detail::run(launch);
  }
  detail::running = nullptr;
  if (launch.error != nullptr) std::rethrow_exception(launch.error);
}

namespace detail {

EMULATOR_NO_TSAN inline uint3 thread_index() { return current().index; }
EMULATOR_NO_TSAN inline uint3 block_index() { return current().block->index; }
EMULATOR_NO_TSAN inline dim3 block_dimensions() { return current().block->launch->block; }
EMULATOR_NO_TSAN inline dim3 grid_dimensions() { return current().block->launch->grid; }
EMULATOR_NO_TSAN inline unsigned lane() { return current().lane; }

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

// The first lane of this lane's segment, for shuffles with a width.
inline unsigned segment_start(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(current(), "shuffles with width " + std::to_string(width) + ", which is not a power of two up to 32");
  return lane() & ~(static_cast<unsigned>(width) - 1);
}

}  // namespace detail
}  // namespace emulator

#define threadIdx (::emulator::detail::thread_index())
#define blockIdx (::emulator::detail::block_index())
#define blockDim (::emulator::detail::block_dimensions())
#define gridDim (::emulator::detail::grid_dimensions())

// The last parameters of barriers and collectives: the position of the call.
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
// Warp collectives

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_SITE) {
  const unsigned from = emulator::detail::segment_start(width) + (static_cast<unsigned>(source) & (width - 1u));
  return emulator::detail::shuffle(emulator::detail::Collective::kShuffle, mask, value, from, {file, line});
}
// As in CUDA, a lane can read from an earlier segment. Instead of a lane of a later segment it reads itself.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane(), from = lane ^ static_cast<unsigned>(lanes);
  const unsigned end = emulator::detail::segment_start(width) + static_cast<unsigned>(width);
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleXor, mask, value, from < end ? from : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane(), first = emulator::detail::segment_start(width);
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleUp, mask, value, lane - first >= delta ? lane - delta : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const unsigned lane = emulator::detail::lane();
  // number of lanes from this one to the end of the segment
  const unsigned remaining = emulator::detail::segment_start(width) + static_cast<unsigned>(width) - lane;
  return emulator::detail::shuffle(
      emulator::detail::Collective::kShuffleDown, mask, value, delta < remaining ? lane + delta : lane, {file, line});
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

// Signed values are sign-extended to 64 bits, which keeps their order.
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

// As on a GPU, a sum of int wraps around: signed overflow would be undefined here.
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
// Bits and arithmetic

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
