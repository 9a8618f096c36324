// Launches the kernels: the choice of the kernel, the number of threads, and the counter by which a block knows that it is
// the last one.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace sgl {
namespace cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int64_t kMaxItems = (int64_t{1} << 31) - 1;  // work items of backward

// A failed runtime call leaves its error set. Without a reset, the check after the next launch would report it again.
cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// While this object exists, this thread may load a module during a capture. The first launch of a kernel loads one.
class RelaxedCapture {
 public:
  RelaxedCapture() { cleared(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cleared(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A kernel counts its finished blocks in a counter that is 0 before and after the launch. Launches that may run at the
// same time must not share one:
// - The launches of a stream run one after the other, so each stream has a counter. Its key is the stream's id, which
//   is unique in the process; a handle may be used again while old work still runs.
// - A captured launch has a counter of its own, since its graph may be replayed beside any other launch. Graphs that
//   are instantiated twice from one capture share it, as they share all memory of the capture: running both at the same
//   time is an error of the caller.
// - When no counter is left, a launch takes one in its own workspace, which costs a memset.
constexpr uint32_t kCounters = 1 << 16;
__device__ uint32_t counters[kCounters];
std::atomic<uint32_t> counters_taken{0};

// The index of a free counter, or kCounters if none is left.
uint32_t take_counter() {
  const uint32_t taken = counters_taken.fetch_add(1);
  if (taken < kCounters) return taken;
  counters_taken.store(kCounters);  // so that it never overflows to 0
  return kCounters;
}

uint32_t counter_of_stream(int device, unsigned long long id) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, uint32_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, id});
  if (found != known.end()) return found->second;
  const uint32_t index = take_counter();
  if (index < kCounters) known[{device, id}] = index;
  return index;
}

cudaError_t counter_for(const Forward& forward, int device, cudaStream_t stream, uint32_t** counter) {
  static std::atomic<uint32_t*> base[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (base[device].load() == nullptr) {
    void* address = nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&address, counters);
    if (error != cudaSuccess) return error;
    base[device].store(static_cast<uint32_t*>(address));
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return error;
  uint32_t index;
  if (status == cudaStreamCaptureStatusNone) {
    unsigned long long id = 0;
    error = cudaStreamGetId(stream, &id);
    if (error != cudaSuccess) return error;
    index = counter_of_stream(device, id);
  } else {
    index = take_counter();
  }
  if (index < kCounters) {
    *counter = base[device].load() + index;
    return cudaSuccess;
  }
  *counter = static_cast<uint32_t*>(forward.workspace);
  return cudaMemsetAsync(*counter, 0, sizeof(uint32_t), stream);
}

int bits_of_block(int threads) {
  int bits = kWarpBits;
  while (1 << bits < threads) ++bits;
  return bits;
}

// Groups of 2^part_bits pairs.
uint32_t groups_of(const Call& call, int part_bits) { return (call.rows.units + (1u << part_bits) - 1) >> part_bits; }

// Positions of a bag; for packed bags only the mean is known here.
int64_t mean_length(const Rows& rows) {
  return rows.offsets == nullptr ? rows.positions : rows.positions / std::max<int64_t>(rows.bags, 1);
}

// SGL_TWO_TYPES: only the kernels for float and bfloat16, which tests/device_code compiles in half the time.
template <class T, class In>
cudaError_t forward_as(const Call& call, const Forward& forward, const Plan& plan, cudaStream_t stream) {
  const auto work_of = [&](Stage stage, int threads, int group_bits, int part_bits) {
    return Work{
        stage,
        group_bits,
        part_bits,
        plan.piece_bits,
        bits_of_block(threads) - group_bits + part_bits,
        divisor_of(call.rows.classes),
        needs_of(call.settings)};
  };
  if (plan.piece_bits > 0) {
    const int threads = plan.first_threads, part_bits = plan.first_part_bits;
    SGL_LAUNCH(
        (forward_kernel<T, In>), groups_of(call, part_bits) << plan.piece_bits, threads, stream, call, forward,
        work_of(Stage::kFirstPass, threads, bits_of_block(threads), part_bits));
  }
  SGL_LAUNCH(
      (forward_kernel<T, In>), plan.forward_blocks, plan.threads, stream, call, forward,
      work_of(plan.piece_bits > 0 ? Stage::kOthers : Stage::kAll, plan.threads, plan.forward_bits, plan.part_bits));
  return cudaGetLastError();
}

// Whether numbers at these addresses lie alike on 16 bytes, in every row.
template <class In>
bool lie_alike(const Rows& rows, const void* a, const void* b, int64_t bag_difference, int64_t class_difference) {
  constexpr int64_t kSize = 16 / sizeof(In);
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 == 0 &&
         (rows.bags == 1 || bag_difference % kSize == 0) && (rows.classes == 1 || class_difference % kSize == 0);
}

template <class In>
Tiling tiling_of(const Call& call, const Backward& backward, const Plan& plan) {
  const Rows& rows = call.rows;
  const Dimension& dim = rows.dimension[0];
  const uint32_t size = 1u << plan.backward_bits, pieces = plan.pieces, across = classes_across(rows, size);
  const uint32_t strips = (rows.classes + across - 1) / across;
  Tiling t = {};
  t.across = divisor_of(across);
  t.strips = divisor_of(strips);
  t.pieces = divisor_of(pieces);
  t.lengthwise = size / across;
  t.items = static_cast<uint32_t>(rows.bags) * strips * pieces;
  t.group_bits = plan.backward_bits;
  t.groups = plan.threads >> plan.backward_bits;
  t.item_step = plan.backward_blocks * t.groups;
  const auto is_small = [](int64_t stride) { return stride >= 0 && stride < (int64_t{1} << 31) / int64_t{sizeof(In)}; };
  t.is_simple = call.is_simple;
  for (const int64_t stride :
       {rows.logits_bag, rows.logits_class, rows.grad_bag, rows.grad_class, dim.logits, dim.grad})
    t.is_simple = t.is_simple && is_small(stride);
  if (!t.is_simple) return t;
  t.own_pooling = has_own_loop(call.settings.pooling) ? 1u << call.settings.pooling : 0;
  constexpr int kSize = 16 / sizeof(In);
  const bool adjacent = call.is_adjacent && dim.grad == 1;
  const bool alike = lie_alike<In>(
      rows, call.logits, backward.grad, rows.logits_bag - rows.grad_bag, rows.logits_class - rows.grad_class);
  // Packs of a short row that begins anywhere would leave many threads without work.
  t.in_packs =
      adjacent && alike &&
      (mean_length(rows) > kShort ||
       (rows.offsets == nullptr && lie_alike<In>(rows, call.logits, nullptr, rows.logits_bag, rows.logits_class)));
  t.skew_mask = t.in_packs ? kSize - 1 : adjacent && alike ? 2 * kSize - 1 : 0;
  const int threads = static_cast<int>(pieces * t.lengthwise);
  t.first_step = t.in_packs ? kSize : 1;
  t.each = t.in_packs ? 1 : threads;
  t.step = threads * kSize;
  t.logits_bag = static_cast<uint32_t>(rows.logits_bag);
  t.logits_class = static_cast<uint32_t>(rows.logits_class);
  t.grad_bag = static_cast<uint32_t>(rows.grad_bag);
  t.grad_class = static_cast<uint32_t>(rows.grad_class);
  t.logits_stride = static_cast<int>(dim.logits * sizeof(In));
  t.grad_stride = static_cast<int>(dim.grad * sizeof(In));
  t.logits_each = int64_t{t.each} * t.logits_stride;
  t.grad_each = int64_t{t.each} * t.grad_stride;
  t.logits_step = int64_t{t.step} * t.logits_stride;
  t.grad_step = int64_t{t.step} * t.grad_stride;
  return t;
}

template <class T, class In>
cudaError_t backward_as(const Call& call, const Backward& backward, const Plan& plan, cudaStream_t stream) {
  const Tiling tiling = tiling_of<In>(call, backward, plan);
  SGL_LAUNCH((backward_kernel<T, In>), plan.backward_blocks, plan.threads, stream, call, backward, tiling);
  return cudaGetLastError();
}

}  // namespace

// The counter if no other one is left, a Batch for each block, and a PartialResult for each piece.
int64_t workspace_bytes(const Call& call, const Plan& plan) {
  const int64_t pairs =
      plan.piece_bits == 0 ? 0 : int64_t{groups_of(call, plan.first_part_bits)} << plan.first_part_bits;
  return sizeof(Batch) + plan.forward_blocks * sizeof(Batch) + (pairs << plan.piece_bits) * sizeof(PartialResult);
}

Plan plan_of(const Call& call, int multiprocessors) {
  const Rows& rows = call.rows;
  const int64_t units = rows.units;
  const int64_t length = mean_length(rows);
  const int64_t positions = rows.offsets == nullptr ? length : 2 * length;
  const auto at_most = [](int64_t n, int64_t most) {
    return static_cast<int>(std::max<int64_t>(1, std::min(n, most)));
  };
  Plan plan = {};
  // A block reads classes that lie side by side together, up to 64 bytes by neighbouring threads.
  int part_bits = 0;
  if (classes_across(rows, kWarp) > 1)
    while (part_bits < (call.type == Type::kDouble ? 3 : 4) && 1u << part_bits < rows.classes) ++part_bits;
  const int64_t all_groups = groups_of(call, part_bits);
  const bool is_long = positions > 16 * kWarp;
  // If there are fewer groups than multiprocessors, blocks divide their pairs, as long as a thread gets 32 instances.
  plan.first_part_bits = part_bits;
  plan.first_threads = 128;
  if (is_long && call.is_simple) {
    const int64_t instances = 32 * (plan.first_threads >> part_bits);
    while (plan.piece_bits < 6 && all_groups << plan.piece_bits < multiprocessors &&
           length >= instances << (plan.piece_bits + 1))
      ++plan.piece_bits;
  }
  const bool side_by_side = is_long && part_bits > 0 && plan.piece_bits == 0 && all_groups >= multiprocessors;
  if (side_by_side) plan.part_bits = part_bits;
  // A warp reduces faster than a block. With many pairs, warps keep the GPU busy at any length.
  const bool in_warps =
      !side_by_side && (!is_long || (positions <= 128 * kWarp && units >= int64_t{64} * multiprocessors));
  // Parts of a warp issue less: 2^lane_bits lanes process a pair. There have to be enough pairs to hide latency: four warps on
  // each multiprocessor, or eight if a lane gets more than 16 instances.
  const auto has_enough_pairs = [&](int lane_bits) {
    const int64_t warps = positions <= int64_t{16} << lane_bits ? 4 : 8;
    return units << lane_bits >= warps * kWarp * multiprocessors;
  };
  int lane_bits = kWarpBits;
  for (const int bits : {kPartBits, kFewLanesBits})
    if (in_warps && positions <= 64 << bits && has_enough_pairs(bits)) lane_bits = bits;
  int groups = 1;
  if (in_warps) {
    plan.forward_bits = kWarpBits;
    if (first_pass_suffices(call.settings, false)) plan.part_bits = kWarpBits - lane_bits;
    // As many pairs per block as possible while every multiprocessor gets a block, because a block finalizes its pairs together.
    // A multiprocessor runs four warps as fast as one.
    groups = std::min(kMaxThreads >> kWarpBits, static_cast<int>(kSlots) >> plan.part_bits);
    while (groups > 4 && units < static_cast<int64_t>(groups << plan.part_bits) * multiprocessors) groups /= 2;
    plan.threads = groups << kWarpBits;
  } else {
    // Fewer threads for each pair issue less. More of them finish a pair earlier, unless its block has to wait for another
    // one: a multiprocessor has room for two blocks of 256 threads, or for four or five of 128.
    const int64_t all = positions << plan.part_bits, blocks = groups_of(call, plan.part_bits);
    plan.threads = 128;
    while (plan.threads < kMaxThreads &&
           (all > 64 * plan.threads || (all > 16 * plan.threads && blocks <= int64_t{2} * multiprocessors)))
      plan.threads *= 2;
    plan.forward_bits = bits_of_block(plan.threads);
  }
  // a thread may use kRegisters of the 65536 registers of a multiprocessor
  const int registers = call.type == Type::kDouble ? kRegisters<double> : kRegisters<float>;
  const int resident = multiprocessors * std::min(65536 / (registers * plan.threads), 32);
  const int64_t pairs = int64_t{groups} << plan.part_bits;
  plan.forward_blocks = at_most((units + pairs - 1) / pairs, resident);
  // Backward: a thread has up to 64 instances, which share the cost of the numbers of the pair, and fewer if there would
  // be too few blocks. Work items are counted in 32 bits.
  // Backward has no reductions. Classes that lie side by side get as many neighbouring threads as a warp has.
  plan.backward_bits = in_warps && classes_across(rows, kWarp) == 1 ? lane_bits : plan.forward_bits;
  groups = plan.threads >> plan.backward_bits;
  const uint32_t size = 1u << plan.backward_bits, across = classes_across(rows, size);
  const int64_t strips = rows.bags * ((rows.classes + across - 1) / across);
  // the mean for packed bags: a thread has more instances in a longer bag
  const auto pieces_of = [&](int64_t instances) {
    const int64_t tile = instances * (size / across);
    return at_most(std::min<int64_t>((length + tile - 1) / tile, kMaxItems / std::max<int64_t>(strips, 1)), 1024);
  };
  int64_t instances = 64;
  while (instances > 16 && strips * pieces_of(instances) < static_cast<int64_t>(resident) * groups) instances /= 2;
  plan.pieces = pieces_of(instances);
  plan.backward_blocks = at_most((strips * plan.pieces + groups - 1) / groups, 1 << 20);
  return plan;
}

int launch_forward(const Call& call, Forward forward, const Plan& plan, int device, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const RelaxedCapture relaxed;
  const cudaError_t error = counter_for(forward, device, stream, &forward.blocks_done);
  if (error != cudaSuccess) return cleared(error);
  forward.of_block = static_cast<Batch*>(forward.workspace) + 1;
  forward.partial = reinterpret_cast<PartialResult*>(forward.of_block + plan.forward_blocks);
  switch (call.type) {
    case Type::kFloat:
      return forward_as<float, float>(call, forward, plan, stream);
#if !defined(SGL_TWO_TYPES)
    case Type::kDouble:
      return forward_as<double, double>(call, forward, plan, stream);
    case Type::kHalf:
      return forward_as<float, Half>(call, forward, plan, stream);
#endif
    default:
      return forward_as<float, BFloat16>(call, forward, plan, stream);
  }
}

int launch_backward(const Call& call, const Backward& backward, const Plan& plan, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const RelaxedCapture relaxed;
  switch (call.type) {
    case Type::kFloat:
      return backward_as<float, float>(call, backward, plan, stream);
#if !defined(SGL_TWO_TYPES)
    case Type::kDouble:
      return backward_as<double, double>(call, backward, plan, stream);
    case Type::kHalf:
      return backward_as<float, Half>(call, backward, plan, stream);
#endif
    default:
      return backward_as<float, BFloat16>(call, backward, plan, stream);
  }
}

int launch_finalize(
    const Batch* sums, const Settings& settings, double times, bool is_double, void* total, void* parts,
    void* denominators, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const RelaxedCapture relaxed;
  if (is_double) {
    SGL_LAUNCH(
        finalize_kernel<double>, 1, 1, stream, sums, settings, times, static_cast<double*>(total),
        static_cast<double*>(parts), static_cast<double*>(denominators));
  } else {
    SGL_LAUNCH(
        finalize_kernel<float>, 1, 1, stream, sums, settings, times, static_cast<float*>(total),
        static_cast<float*>(parts), static_cast<float*>(denominators));
  }
  return cudaGetLastError();
}

int multiprocessors_of(int device, int* count) {
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  *count = known[device].load();
  if (*count != 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) known[device].store(*count);
  return cleared(error);
}

#if defined(SGL_EMULATE)
// For tests: marks this many counters as taken.
uint32_t exchange_counters_taken(uint32_t count) { return counters_taken.exchange(count); }
#endif

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace sgl
