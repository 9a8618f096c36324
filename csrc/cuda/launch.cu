// Launching the kernels: which of them, with how many threads, and the counter by which blocks find out who is last.
#include <algorithm>
#include <atomic>

#include "backward.cuh"
#include "forward.cuh"
#if defined(SGL_WITH_EXCHANGE)
#include "exchange.cuh"
#endif
#include "launch.h"

namespace sgl {
namespace cuda {
namespace {

constexpr int kMaxDevices = 64;

// Counters of finished blocks, which kernels leave as they find them, at 0. Launches that run at once must not share
// one. A launch takes the next of a ring: that counter's turn comes again thousands of launches later, more than a GPU
// queues at a time. A captured launch keeps its counter for good, since its graph may be replayed beside anything.
#if defined(SGL_EMULATE)
constexpr uint32_t kRing = 1;  // where launches wait for each other the next one sees what this one leaves
#else
constexpr uint32_t kRing = 1 << 13;
#endif
constexpr uint32_t kCaptured = 1 << 16;
__device__ uint32_t counters[kRing + kCaptured];
std::atomic<uint32_t> next_in_ring{0}, next_captured{0};

cudaError_t counter_for(const Forward& forward, const Plan& plan, int device, cudaStream_t stream, uint32_t** counter) {
  static std::atomic<uint32_t*> base[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (base[device].load() == nullptr) {
    void* address = nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&address, counters);
    if (error != cudaSuccess) return error;
    base[device].store(static_cast<uint32_t*>(address));
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return error;
  if (status == cudaStreamCaptureStatusNone) {
    *counter = base[device].load() + next_in_ring.fetch_add(1) % kRing;
    return cudaSuccess;
  }
  const uint32_t taken = next_captured.fetch_add(1);
  if (taken < kCaptured) {
    *counter = base[device].load() + kRing + taken;
    return cudaSuccess;
  }
  next_captured.store(kCaptured);  // stays there, and does not start again from 0 some day
  *counter = reinterpret_cast<uint32_t*>(forward.of_block + plan.forward_blocks);
  return cudaMemsetAsync(*counter, 0, sizeof(uint32_t), stream);
}

template <class T, class In>
cudaError_t forward_as(const Call& call, const Forward& forward, const Plan& plan, cudaStream_t stream) {
  SGL_LAUNCH(
      (forward_kernel<T, In>), plan.forward_blocks, plan.threads, stream, call, forward, plan.warp_per_bag_class);
  return cudaGetLastError();
}

template <class T, class In>
cudaError_t backward_as(const Call& call, const Backward& backward, const Plan& plan, cudaStream_t stream) {
  SGL_LAUNCH(
      (backward_kernel<T, In>), plan.backward_blocks, plan.threads, stream, call, backward, plan.warp_per_bag_class,
      plan.pieces);
  return cudaGetLastError();
}

}  // namespace

Plan plan_of(const Call& call, int multiprocessors) {
  const Rows& rows = call.rows;
  const int64_t units = rows.units;
  // of packed bags only the mean is known here
  const int64_t positions = rows.offsets == nullptr ? rows.positions : 2 * (rows.positions / rows.bags);
  const auto at_most = [](int64_t n, int64_t most) {
    return static_cast<int>(std::max<int64_t>(1, std::min(n, most)));
  };
  Plan plan;
  plan.warp_per_bag_class = positions <= 16 * kWarp;
  int groups = 1;
  if (plan.warp_per_bag_class) {
    // as many warps to a block as leave every multiprocessor a block
    groups = kMaxGroups;
    while (groups > 1 && units < static_cast<int64_t>(groups) * multiprocessors) groups /= 2;
    plan.threads = groups * kWarp;
  } else {
    // few threads for a bag-class agree faster, many hide the latency of memory where there are few bag-classes
    plan.threads = 128;
    while (plan.threads < kMaxThreads &&
           (positions > 64 * plan.threads ||
            (positions > 16 * plan.threads && units * plan.threads < int64_t{1024} * multiprocessors)))
      plan.threads *= 2;
  }
  const int resident = multiprocessors * std::min(2048 / plan.threads, 32);
  plan.forward_blocks = at_most((units + groups - 1) / groups, resident);
  const int64_t tile = int64_t{16} * (plan.warp_per_bag_class ? kWarp : plan.threads);
  plan.pieces = at_most((positions + tile - 1) / tile, 1024);
  plan.backward_blocks = at_most((units * plan.pieces + groups - 1) / groups, 1 << 20);
  return plan;
}

int launch_forward(const Call& call, Forward forward, const Plan& plan, int device, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const cudaError_t error = counter_for(forward, plan, device, stream, &forward.blocks_done);
  if (error != cudaSuccess) return error;
  switch (call.type) {
    case Type::kFloat:
      return forward_as<float, float>(call, forward, plan, stream);
    case Type::kDouble:
      return forward_as<double, double>(call, forward, plan, stream);
    case Type::kHalf:
      return forward_as<float, Half>(call, forward, plan, stream);
    default:
      return forward_as<float, BFloat16>(call, forward, plan, stream);
  }
}

int launch_backward(const Call& call, const Backward& backward, const Plan& plan, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  switch (call.type) {
    case Type::kFloat:
      return backward_as<float, float>(call, backward, plan, stream);
    case Type::kDouble:
      return backward_as<double, double>(call, backward, plan, stream);
    case Type::kHalf:
      return backward_as<float, Half>(call, backward, plan, stream);
    default:
      return backward_as<float, BFloat16>(call, backward, plan, stream);
  }
}

int launch_finalize(
    const Batch* sums, const Settings& settings, double times, bool is_double, void* total, void* parts,
    void* denominators, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
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

#if defined(SGL_WITH_EXCHANGE)
int exchange_plan_of(const Call& call, int multiprocessors, Plan* plan) {
  *plan = plan_of(call, multiprocessors);
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, exchange_kernel, plan->threads, 0);
  plan->forward_blocks = std::min(plan->forward_blocks, std::max(1, resident * multiprocessors));
  return error;
}

int launch_exchange(const Call& call, Forward forward, float* grad, const Plan& plan, int device, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const cudaError_t error = counter_for(forward, plan, device, stream, &forward.blocks_done);
  if (error != cudaSuccess) return error;
  return launch_together(
      exchange_kernel, plan.forward_blocks, plan.threads, stream, call, forward, grad, plan.warp_per_bag_class);
}

int launch_scale(float* grad, int64_t n, const float* grad_output, int multiprocessors, void* stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t wanted = (n + 16 * kMaxThreads - 1) / (16 * kMaxThreads), most = int64_t{8} * multiprocessors;
  SGL_LAUNCH(
      scale_kernel, static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, most))), kMaxThreads, stream, grad, n,
      grad_output);
  return cudaGetLastError();
}
#endif

int multiprocessors_of(int device, int* count) {
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  *count = known[device].load();
  if (*count != 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) known[device].store(*count);
  return error;
}

int select_device(int device, int* before) {
  const cudaError_t error = cudaGetDevice(before);
  if (error != cudaSuccess || *before == device) return error;
  return cudaSetDevice(device);
}

#if defined(SGL_EMULATE)
// For the test of what happens when there are no more counters.
void set_captured(uint32_t launches) { next_captured.store(launches); }
#endif

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace sgl
