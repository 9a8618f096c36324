// Replaces libcudart for the host code that nvcc generates from csrc/cuda/launch.cu: a launch runs in an interpreter.
// The operators of csrc/cuda/ops.cpp are registered as torch.ops.sgl_ops_emulated.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <fstream>
#include <sstream>

#include "common.h"
#include "schema.h"

namespace sgl {}

STABLE_TORCH_LIBRARY(sgl_ops_emulated, m) { sgl::define_operators(m); }

namespace {

// functions() and variables() use local statics, because the host code registers its kernels and variables before the
// constructors of this file run.

// The names of the kernels, by the address of their host stubs.
std::map<const void*, std::string>& functions() {
  static std::map<const void*, std::string> all;
  return all;
}
// The memory and size of each __device__ variable, by the address of its host shadow.
std::map<const void*, std::pair<void*, size_t>>& variables() {
  static std::map<const void*, std::pair<void*, size_t>> all;
  return all;
}
std::map<std::string, std::unique_ptr<device_code::Device>> devices;
std::map<std::string, std::vector<device_code::Parameter>> parameters;
device_code::Device* device = nullptr;
std::string error_text = "no error";
int pending = 0;
int multiprocessors = 3, capturing = 0;
dim3 grid_, block_;
size_t shared_;
cudaStream_t stream_;
int seed = 0;

std::string read_file(const char* path) {
  std::ifstream file(path);
  std::stringstream all;
  all << file.rdbuf();
  return all.str();
}

}  // namespace

namespace device_code {
extern thread_local bool allocations_changed;
}

extern "C" {
#define API __attribute__((visibility("default")))

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  functions()[host] = name;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t size, int, int) {
  void* memory = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(memory, 0, size);
  variables()[host] = {memory, size};
  device_code::symbols()[name] = {reinterpret_cast<uint64_t>(memory), size};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  grid_ = grid;
  block_ = block;
  shared_ = shared;
  stream_ = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = grid_;
  *block = block_;
  *shared = shared_;
  *static_cast<cudaStream_t*>(stream) = stream_;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  try {
    const std::string& name = functions().at(kernel);
    if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || shared != 0)
      device_code::fail("a launch with more than one dimension or dynamic shared memory is not supported");
    if (grid.x == 0 || block.x == 0 || block.x > 1024)
      device_code::fail("invalid launch configuration: %u blocks of %u threads", grid.x, block.x);
    device_code::Launch launch{grid.x, block.x, {}};
    const auto& all = parameters.at(name);
    launch.parameters.assign(static_cast<size_t>(all.back().offset + all.back().size + 15) / 16 * 16, 0xee);
    for (size_t k = 0; k < all.size(); ++k)
      memcpy(launch.parameters.data() + all[k].offset, arguments[k], static_cast<size_t>(all[k].size));
    device_code::allocations_changed = true;
    device_code::generator.seed(device_code::options.seed * 7919u + static_cast<unsigned>(seed++));
    if (device == nullptr) device_code::fail("no device code is loaded");
    const device_code::Counts before = device_code::counts;
    device_code::longest_warp = 0;
    device->run(name, launch);
    const device_code::Counts& after = device_code::counts;
    device_code::LaunchCounts count = {
        grid.x,
        uint64_t(grid.x) * ((block.x + 31) / 32),
        after.warp_instructions - before.warp_instructions,
        device_code::longest_warp,
        {}};
    for (int k = 0; k < device_code::kClasses; ++k) count.by_class[k] = after.by_class[k] - before.by_class[k];
    device_code::launches.push_back(count);
  } catch (const std::exception& e) {
    error_text = e.what();
    pending = 999;
    return static_cast<cudaError_t>(999);
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const int e = pending;
  pending = 0;
  return static_cast<cudaError_t>(e);
}
const char* cudaGetErrorString(cudaError_t) { return error_text.c_str(); }
cudaError_t cudaGetSymbolAddress(void** address, const void* host) {
  *address = variables().at(host).first;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 1;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// ---- called by interpreter.py
API const char* device_code_load(const char* name, const char* ptx, const char* code, int is_sass) {
  try {
    if (!devices.count(name)) {
      parameters = device_code::parameters_of(read_file(ptx));
      devices[name] = is_sass ? device_code::load_sass(read_file(code)) : device_code::load_ptx(read_file(code));
    }
    device = devices[name].get();
    return "";
  } catch (const std::exception& e) {
    error_text = e.what();
    return error_text.c_str();
  }
}
API void device_code_multiprocessors(int n) {
  multiprocessors = n;  // has no effect after the first launch, because launch.cu caches the number
}
API void device_code_options(int policy, int resident, int seed_, int races, int ulp) {
  device_code::options.policy = policy;
  device_code::options.resident = resident;
  device_code::options.seed = static_cast<unsigned>(seed_);
  device_code::options.races = races != 0;
  device_code::options.ulp = ulp;
  seed = 0;
}
API void device_code_range(uint64_t low, uint64_t bytes, int tag) {
  if (bytes == 0) {
    device_code::ranges.clear();
  } else {
    device_code::ranges.push_back({low, low + bytes, tag});
  }
}
API void device_code_reset_counts() {
  device_code::counts = device_code::Counts();
  device_code::launches.clear();
}
// For each launch since the last reset, at most `most`: blocks, warps, instructions of its warps, those of the longest warp;
// instructions by class. Returns the number of launches. The longest warp is known for machine code only.
API int device_code_launches(uint64_t* out, int most) {
  int n = 0;
  for (const device_code::LaunchCounts& c : device_code::launches) {
    if (n == most) break;
    ++n;
    for (uint64_t v : {c.blocks, c.warps, c.instructions, c.longest}) *out++ = v;
    for (uint64_t v : c.by_class) *out++ = v;
  }
  return n;
}
// Writes the counts in this order: warp and lane instructions, blocks, threads, branches, divergent branches, shared
// requests, wavefronts, ideal wavefronts; warp instructions by class; lane instructions by class; then for each tag,
// loads before stores: requests, bytes, sectors, ideal sectors. Returns the number of values.
API int device_code_counts(uint64_t* out) {
  int n = 0;
  const device_code::Counts& c = device_code::counts;
  for (uint64_t v :
       {c.warp_instructions, c.lane_instructions, c.blocks, c.threads, c.branches, c.divergent, c.shared_requests,
        c.shared_wavefronts, c.shared_ideal})
    out[n++] = v;
  for (uint64_t v : c.by_class) out[n++] = v;
  for (uint64_t v : c.lanes_by_class) out[n++] = v;
  for (const auto& t : c.memory)
    for (const auto& m : t)
      for (uint64_t v : {m.requests, m.bytes, m.sectors, m.ideal_sectors}) out[n++] = v;
  return n;
}
API void device_code_profile(const char* path) {
  if (device != nullptr) device->profile(path);
}
API const char* device_code_class(int k) { return device_code::class_names[k]; }
}
