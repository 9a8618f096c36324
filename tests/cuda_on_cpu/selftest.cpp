// Tests emulator.h: correct kernels give the results of a GPU, and bugs in kernels are found.
//
// Usage: selftest NAME [SCHEDULE [RESIDENT]]
// NAME is `correct`, which runs correct kernels, or the name of a bug, which runs one kernel with this bug.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "emulator.h"

namespace {

// Exit statuses. AddressSanitizer and UndefinedBehaviorSanitizer exit with 1, ThreadSanitizer with 66.
enum Status {
  kPassed = 0,
  kWrongResult = 2,
  kException = 3,
  kUnknownName = 4,
};

enum Bug {
  kNone,
  kNoBarrier,
  kNoBarrierHidden,
  kNoBarrierBeforeReuse,
  kNoSyncwarp,
  kReadPastEnd,
  kWritePastSharedEnd,
  kUnwrittenShared,
  kUnwrittenBool,
  kExitBeforeShuffle,
  kExitBeforeBarrier,
  kDivergentBarrier,
  kTwoBarriers,
  kBarrierAndShuffle,
  kTwoCollectives,
  kLaneNotInMask,
  kNotInOwnMask,
  kNoFence,
  kFenceTooEarly,
  kBlockScopeFence,
  kNoFenceAfter,
  kWaitForever,
};

#if defined(EMULATOR_TSAN)
constexpr unsigned kMaxLaunchThreads = 256;  // ThreadSanitizer needs a millisecond to create each thread
#else
constexpr unsigned kMaxLaunchThreads = ~0u;
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Returns the sum of `value` over the block to every thread. The block size must be a multiple of the warp size.
template <Bug bug>
__device__ float block_sum(float value, float* warp_sums) {
  value = warp_sum(value);
  if (threadIdx.x % warpSize == 0) warp_sums[threadIdx.x / warpSize] = value;
  if (bug != kNoBarrier) __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / warpSize; ++w) sum += warp_sums[w];
  return sum;
}

// out[0] = sum of x, out[1] = sum of 2 x
template <Bug bug>
__global__ void two_sums(const float* x, float* out, int n) {
  using Sums = float[32];
  SGL_SHARED(Sums, warp_sums);
  float mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n + (bug == kReadPastEnd); i += static_cast<int>(blockDim.x))
    mine += x[i];
  const float first = block_sum<bug>(mine, warp_sums);
  if (bug != kNoBarrierBeforeReuse) __syncthreads();
  const float second = block_sum<bug>(2 * mine, warp_sums);
  if (threadIdx.x == blockDim.x / 2) {
    out[0] = first;
    out[1] = second;
  }
}

struct GridShared {
  float warp_sums[32];
  bool is_last;
};

// out = sum of x. The last block that finishes adds the sums of all blocks. The counter `done` is then 0 again.
template <Bug bug>
__global__ void grid_sum(const float* x, float* block_sums, float* out, unsigned* done, int n) {
  SGL_SHARED(GridShared, shared);
  float mine = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(n); i += gridDim.x * blockDim.x)
    mine += x[i];
  mine = block_sum<kNone>(mine, shared.warp_sums);
  if (threadIdx.x == 0) {
    if (bug == kFenceTooEarly) __threadfence();
    block_sums[blockIdx.x] = mine;
    if (bug == kBlockScopeFence) __threadfence_block();
    if (bug != kNoFence && bug != kFenceTooEarly && bug != kBlockScopeFence) __threadfence();
    shared.is_last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
  if (bug != kNoFenceAfter) __threadfence();
  mine = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) mine += block_sums[b];
  mine = block_sum<kNone>(mine, shared.warp_sums);
  if (threadIdx.x == 0) *out = mine;
}

// The same, but every thread writes a value and executes a fence. After a barrier, one thread increments the counter.
__global__ void grid_sum_of_threads(const float* x, float* thread_values, float* out, unsigned* done) {
  SGL_SHARED(GridShared, shared);
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  thread_values[at] = x[at];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) shared.is_last = atomicAdd(done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  float mine = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) mine += thread_values[b * blockDim.x + (threadIdx.x + 1) % blockDim.x];
  mine = block_sum<kNone>(mine, shared.warp_sums);
  if (threadIdx.x == 0) *out = mine;
}

constexpr int kBins = 17;

// out = number of values in each bin, for blocks of any size
template <Bug bug>
__global__ void histogram(const int* values, unsigned* out, int n) {
  using Bins = unsigned[kBins];
  SGL_SHARED(Bins, shared);
  // A pointer hides the size of the array, so that only AddressSanitizer can find an index past the end.
  unsigned* const bins = &shared[0];
  if (bug != kUnwrittenShared) {
    for (unsigned b = threadIdx.x; b < kBins + (bug == kWritePastSharedEnd); b += blockDim.x) bins[b] = 0;
  }
  __syncthreads();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(n); i += gridDim.x * blockDim.x)
    atomicAdd(&bins[values[i]], 1u);
  __syncthreads();
  for (unsigned b = threadIdx.x; b < kBins; b += blockDim.x) atomicAdd(&out[b], bins[b]);
}

// The first thread passes the number of threads to the last one, which writes it to `out`. If the first thread runs
// before the last one, the result is right even without the barrier.
template <Bug bug>
__global__ void last_thread(int* out) {
  SGL_SHARED(int, number);
  SGL_SHARED(bool, is_set);
  if (threadIdx.x == 0) {
    number = static_cast<int>(blockDim.x);
    if (bug != kUnwrittenBool) is_set = true;
  }
  if (bug != kNoBarrierHidden) __syncthreads();
  if (threadIdx.x == blockDim.x - 1) *out = is_set ? number : -1;
}

// out[i] = in[i ^ 1], exchanged through shared memory within the warp
template <Bug bug>
__global__ void neighbors(const int* in, int* out) {
  using Values = int[1024];
  SGL_SHARED(Values, values);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = in[threadIdx.x] + round;
    __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1] - round;
    if (bug != kNoSyncwarp) __syncwarp();
  }
}

// Threads take different branches around barriers and collectives. CUDA does not allow what the bugs do.
template <Bug bug>
__global__ void divergent(int* out) {
  const bool is_odd = threadIdx.x % 2 != 0;
  int value = static_cast<int>(threadIdx.x);
  if (bug == kExitBeforeShuffle) {
    if (threadIdx.x == 5) return;
    value = __shfl_xor_sync(kAllLanes, value, 1);
  }
  if (bug == kExitBeforeBarrier) {
    if (threadIdx.x == 0) return;
    __syncthreads();
  }
  if (bug == kDivergentBarrier && is_odd) __syncthreads();
  if (bug == kTwoBarriers) {
    if (is_odd) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (bug == kBarrierAndShuffle) {
    if (is_odd) {
      __syncthreads();
    } else {
      value = __shfl_sync(kAllLanes, value, 0);
    }
  }
  if (bug == kTwoCollectives) value = is_odd ? __shfl_xor_sync(kAllLanes, value, 2) : __ballot_sync(kAllLanes, 1);
  if (bug == kLaneNotInMask && is_odd) value = __shfl_down_sync(0xaaaaaaaau, value, 1);
  if (bug == kNotInOwnMask) value = __shfl_xor_sync(0x55555555u, value, 2);
  out[threadIdx.x] = value;
}

// A barrier of the whole grid: all blocks must be resident at the same time.
__global__ void grid_barrier(unsigned* arrived, unsigned* out, unsigned expected) {
  if (threadIdx.x == 0) {
    out[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < expected) {
    }
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 1) out[gridDim.x + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}

__global__ void write_order(unsigned* next, unsigned* order) {
  order[atomicAdd(next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// Compares each operation with its definition, in every lane of a full warp. Counts the results that differ.
__global__ void operations(unsigned* differ) {
  const unsigned lane = threadIdx.x;
  const int value = static_cast<int>(lane * lane) - 100;
  const auto at = [](unsigned l) { return static_cast<int>(l * l) - 100; };
  unsigned wrong = 0;
  for (int width : {2, 8, 32}) {
    const unsigned w = static_cast<unsigned>(width), first = lane / w * w, last = first + w - 1;
    for (unsigned d : {0u, 1u, 3u, 9u}) {
      wrong += __shfl_sync(kAllLanes, value, static_cast<int>(d), width) != at(first + d % w);
      wrong += __shfl_up_sync(kAllLanes, value, d, width) != at(lane >= first + d ? lane - d : lane);
      wrong += __shfl_down_sync(kAllLanes, value, d, width) != at(lane + d <= last ? lane + d : lane);
      const unsigned other = lane ^ d;
      wrong += __shfl_xor_sync(kAllLanes, value, static_cast<int>(d), width) != at(other <= last ? other : lane);
    }
  }
  wrong += __shfl_xor_sync(kAllLanes, value + 0.25, 1) != at(lane ^ 1) + 0.25;
  wrong += __shfl_sync(kAllLanes, uint64_t{lane} << 40, 3) != uint64_t{3} << 40;
  wrong += __ballot_sync(kAllLanes, lane % 3 == 0) != 0x49249249u;
  wrong += __any_sync(kAllLanes, lane == 7) != 1 || __any_sync(kAllLanes, 0) != 0;
  wrong += __all_sync(kAllLanes, lane != 7) != 0 || __all_sync(kAllLanes, 2) != 1;
  wrong += __reduce_min_sync(kAllLanes, value) != -100 || __reduce_max_sync(kAllLanes, value) != 861;
  wrong += __reduce_add_sync(kAllLanes, value) != 10416 - 3200;
  const unsigned wide = lane + 0xffffff00u;
  wrong += __reduce_min_sync(kAllLanes, wide) != 0xffffff00u || __reduce_max_sync(kAllLanes, wide) != 0xffffff1fu;
  wrong += __reduce_add_sync(kAllLanes, wide) != 496u - 32 * 256;
  // The halves of the warp diverge.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    wrong += __shfl_xor_sync(half, value, 1) != at(lane ^ 1);
    __syncwarp(half);
  } else {
    wrong += __reduce_add_sync(half, 1) != 16;
  }
  __syncwarp();
  wrong += __syncthreads_count(lane < 5) != 5;
  wrong += __syncthreads_or(lane == 31) != 1 || __syncthreads_or(0) != 0;
  wrong += __syncthreads_and(lane != 31) != 0 || __syncthreads_and(4) != 1;
  wrong += __popc(0xf0fu) != 8 || __popcll(~0ull) != 64 || __ffs(8) != 4 || __ffs(0) != 0 || __clz(1) != 31;
  wrong += __clz(0) != 32 || __float_as_int(1.0f) != 0x3f800000 || __uint_as_float(0x3f800000u) != 1.0f;
  wrong += __longlong_as_double(__double_as_longlong(0.1)) != 0.1;
  atomicAdd(differ, wrong);
  // A collective does not wait for lanes that have exited.
  if (lane % 2 != 0) return;
  if (__ballot_sync(kAllLanes, 1) != 0x55555555u) atomicAdd(differ, 1u);
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d) {
  const int number = static_cast<int>(threadIdx.x);
  atomicAdd(&i[0], -number);
  atomicMax(&i[1], number);
  atomicMin(&i[2], -number);
  if (atomicCAS(&i[3], 0, 7) == 0) atomicAdd(&i[4], 1);
  atomicInc(&u[0], 9);
  if (atomicExch(&u[1], 1u) == 0) atomicAdd(&u[2], 1u);
  atomicAdd(&l[0], 1ull << 33);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches: each returns whether the results are right

bool expect(bool right, const char* what, unsigned grid, unsigned block) {
  if (!right) std::fprintf(stderr, "%s, %u blocks of %u threads: wrong result\n", what, grid, block);
  return right;
}

// Small integers: their sums are exact in any order.
std::vector<float> numbers(int n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i * 37 % 101 - 50);
  return x;
}

template <Bug bug>
bool two_sums_are_right(int n, unsigned block) {
  const std::vector<float> x = numbers(n);
  const float sum = std::accumulate(x.begin(), x.end(), 0.0f);
  float out[2] = {};
  emulator::launch(two_sums<bug>, 1, block, x.data(), &out[0], n);
  return expect(out[0] == sum && out[1] == 2 * sum, "two_sums", 1, block);
}

template <Bug bug>
bool grid_sum_is_right(int n, unsigned grid, unsigned block) {
  const std::vector<float> x = numbers(n);
  const float sum = std::accumulate(x.begin(), x.end(), 0.0f);
  std::vector<float> block_sums(grid);
  unsigned done = 0;
  bool right = true;
  for (int launches = 0; launches < 2; ++launches) {
    float out = 0;
    emulator::launch(grid_sum<bug>, grid, block, x.data(), block_sums.data(), &out, &done, n);
    right = right && out == sum && done == 0;
  }
  return expect(right, "grid_sum", grid, block);
}

bool grid_sum_of_threads_is_right(unsigned grid, unsigned block) {
  const std::vector<float> x = numbers(static_cast<int>(grid * block));
  std::vector<float> thread_values(x.size());
  float out = 0;
  unsigned done = 0;
  emulator::launch(grid_sum_of_threads, grid, block, x.data(), thread_values.data(), &out, &done);
  return expect(out == std::accumulate(x.begin(), x.end(), 0.0f), "grid_sum_of_threads", grid, block);
}

template <Bug bug>
bool histogram_is_right(int n, unsigned grid, unsigned block) {
  std::vector<int> values(static_cast<size_t>(n));
  std::vector<unsigned> expected(kBins), out(kBins);
  for (int i = 0; i < n; ++i) ++expected[static_cast<size_t>(values[static_cast<size_t>(i)] = i * 7919 % 97 % kBins)];
  emulator::launch(histogram<bug>, grid, block, values.data(), out.data(), n);
  return expect(out == expected, "histogram", grid, block);
}

template <Bug bug>
bool last_thread_is_right(unsigned block) {
  int out = 0;
  emulator::launch(last_thread<bug>, 1, block, &out);
  return expect(out == static_cast<int>(block), "last_thread", 1, block);
}

template <Bug bug>
bool neighbors_are_right(unsigned block) {
  std::vector<int> in(block), out(block), expected(block);
  for (unsigned i = 0; i < block; ++i) in[i] = expected[i ^ 1] = static_cast<int>(i) * 5;
  emulator::launch(neighbors<bug>, 1, block, in.data(), out.data());
  return expect(out == expected, "neighbors", 1, block);
}

template <Bug bug>
bool divergent_is_right() {
  std::vector<int> out(64), expected(64);
  std::iota(expected.begin(), expected.end(), 0);
  emulator::launch(divergent<bug>, 1, 64, out.data());
  return expect(out == expected, "divergent", 1, 64);
}

bool grid_barrier_is_right(unsigned grid, unsigned expected) {
  unsigned arrived = 0;
  std::vector<unsigned> out(2 * grid);
  emulator::launch(grid_barrier, grid, 64, &arrived, out.data(), expected);
  bool right = true;
  for (unsigned b = 0; b < grid; ++b) right = right && out[grid + b] == (b + 1) % grid + 1;
  return expect(right, "grid_barrier", grid, 64);
}

bool order_is_right(unsigned schedule, unsigned grid, unsigned block) {
  unsigned next = 0;
  std::vector<unsigned> order(grid * block), sorted(grid * block);
  emulator::launch(write_order, grid, block, &next, order.data());
  std::iota(sorted.begin(), sorted.end(), 0u);
  std::vector<unsigned> found = order, down(sorted.rbegin(), sorted.rend());
  std::sort(found.begin(), found.end());
  const bool right = schedule == 0 ? order == sorted : schedule == 1 ? order == down : order != sorted && order != down;
  return expect(found == sorted && right, "write_order", grid, block);
}

bool operations_are_right() {
  unsigned differ = 0;
  emulator::launch(operations, 3, 32, &differ);
  return expect(differ == 0, "operations", 3, 32);
}

bool atomics_are_right() {
  std::vector<int> i(5);
  std::vector<unsigned> u(3);
  std::vector<unsigned long long> l(1);
  float f = 0;
  double d = 0;
  emulator::launch(atomics, 2, 48, i.data(), u.data(), l.data(), &f, &d);
  const bool right = i == std::vector<int>{-2256, 47, -47, 7, 1} && u == std::vector<unsigned>{6, 1, 1} &&
                     l[0] == 96ull << 33 && f == 48 && d == 24;
  return expect(right, "atomics", 2, 48);
}

bool indices_are_right() {
  std::vector<unsigned> times(2 * 3 * 2 * 4 * 2 * 3);
  const auto kernel = [](unsigned* out) {
    const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    ++out[b * blockDim.x * blockDim.y * blockDim.z + t];
  };
  emulator::launch(kernel, dim3(2, 3, 2), dim3(4, 2, 3), times.data());
  return expect(times == std::vector<unsigned>(times.size(), 1), "indices", 12, 24);
}

bool throws(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

bool impossible_launches_throw() {
  const auto nothing = [] {};
  bool right = true;
  for (const dim3 block : {dim3(0), dim3(1025), dim3(32, 33), dim3(1, 1, 65)})
    right = right && throws([&] { emulator::launch(nothing, 1, block); });
  right = right && throws([&] { emulator::launch(nothing, 0, 32); });
  right = right && throws([&] { emulator::launch([&] { emulator::launch(nothing, 1, 1); }, 1, 1); });
  return expect(right, "impossible launches", 1, 1);
}

// A launch rethrows what its kernel throws, and the next launch works.
bool exceptions_are_rethrown() {
  const auto kernel = [] {
    __syncthreads();
    if (threadIdx.x == 40) throw std::runtime_error("thrown by a kernel");
    __syncthreads();
  };
  const bool threw = throws([&] { emulator::launch(kernel, 2, 96); });
  return expect(threw, "exceptions", 2, 96) && grid_sum_is_right<kNone>(1000, 2, 96);
}

bool all_is_right(unsigned schedule, unsigned resident) {
  bool right = indices_are_right() && operations_are_right() && atomics_are_right() && impossible_launches_throw();
  right = right && exceptions_are_rethrown();
  if (resident == 1) right = right && order_is_right(schedule, 1, 100) && order_is_right(schedule, 3, 64);
  if (resident > 1) right = right && grid_barrier_is_right(resident, resident);
  for (unsigned block : {32u, 96u, 256u, 1024u}) {
    if (block > kMaxLaunchThreads) continue;
    right = right && two_sums_are_right<kNone>(1000, block);
    right = right && neighbors_are_right<kNone>(block);
    for (unsigned grid : {1u, 2u, 7u}) {
      if (grid * block <= kMaxLaunchThreads) right = right && grid_sum_is_right<kNone>(2500, grid, block);
    }
  }
  for (unsigned block : {1u, 100u, 256u}) {
    right = right && histogram_is_right<kNone>(1000, block == 100 ? 2 : 1, block);
    right = right && last_thread_is_right<kNone>(block);
  }
  return right && grid_sum_of_threads_is_right(4, 64) && divergent_is_right<kNone>();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "correct";
  const unsigned schedule = count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 0;
  const unsigned resident = count > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 1;
  const std::map<std::string, std::function<bool()>> tests = {
      {"correct", [&] { return all_is_right(schedule, resident); }},
      {"no_barrier", [] { return two_sums_are_right<kNoBarrier>(1000, 96); }},
      {"no_barrier_hidden", [] { return last_thread_is_right<kNoBarrierHidden>(64); }},
      {"no_barrier_before_reuse", [] { return two_sums_are_right<kNoBarrierBeforeReuse>(1000, 96); }},
      {"no_syncwarp", [] { return neighbors_are_right<kNoSyncwarp>(64); }},
      {"read_past_end", [] { return two_sums_are_right<kReadPastEnd>(1000, 96); }},
      {"write_past_shared_end", [] { return histogram_is_right<kWritePastSharedEnd>(1000, 2, 64); }},
      {"unwritten_shared", [] { return histogram_is_right<kUnwrittenShared>(1000, 2, 64); }},
      {"unwritten_bool", [] { return last_thread_is_right<kUnwrittenBool>(64); }},
      {"exit_before_shuffle", [] { return divergent_is_right<kExitBeforeShuffle>(); }},
      {"exit_before_barrier", [] { return divergent_is_right<kExitBeforeBarrier>(); }},
      {"divergent_barrier", [] { return divergent_is_right<kDivergentBarrier>(); }},
      {"two_barriers", [] { return divergent_is_right<kTwoBarriers>(); }},
      {"barrier_and_shuffle", [] { return divergent_is_right<kBarrierAndShuffle>(); }},
      {"two_collectives", [] { return divergent_is_right<kTwoCollectives>(); }},
      {"lane_not_in_mask", [] { return divergent_is_right<kLaneNotInMask>(); }},
      {"not_in_own_mask", [] { return divergent_is_right<kNotInOwnMask>(); }},
      {"no_fence", [] { return grid_sum_is_right<kNoFence>(1000, 4, 64); }},
      {"fence_too_early", [] { return grid_sum_is_right<kFenceTooEarly>(1000, 4, 64); }},
      {"block_scope_fence", [] { return grid_sum_is_right<kBlockScopeFence>(1000, 4, 64); }},
      {"no_fence_after", [] { return grid_sum_is_right<kNoFenceAfter>(1000, 4, 64); }},
      {"wait_forever", [] { return grid_barrier_is_right(2, 3); }},
  };
  const auto test = tests.find(name);
  if (test == tests.end()) return kUnknownName;
  emulator::set_schedule(schedule);
  emulator::set_resident(resident);
  try {
    return test->second() ? kPassed : kWrongResult;
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kException;
  }
}
