// What csrc/cuda asks of the CUDA runtime, for kernels that run on the CPU.
#pragma once

#include "emulator.h"

#define __grid_constant__
#define __maxnreg__(n)
#define SGL_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(kernel, dim3(blocks), dim3(threads), __VA_ARGS__))

namespace emulated {

inline int multiprocessors = 3;  // few, so that a block has several bag-classes
inline bool capturing = false;

}  // namespace emulated

constexpr cudaError_t cudaErrorInvalidDevice = static_cast<cudaError_t>(101);
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount
};

template <class... A>
cudaError_t launch_together(void (*kernel)(A...), int blocks, int threads, cudaStream_t, A... arguments) {
  struct Residents {
    unsigned before = emulator::detail::residents;
    ~Residents() { emulator::set_resident(before); }
  } restored;
  emulator::set_resident(static_cast<unsigned>(blocks));
  emulator::launch(kernel, dim3(blocks), dim3(threads), arguments...);
  return cudaSuccess;
}
// As one with 64 Ki registers has it, 96 for a thread, and room for four times the shared memory that needs no opting in.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t) {
  *blocks = std::min(4, 65536 / 96 / threads);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
