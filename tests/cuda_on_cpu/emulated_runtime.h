// Replaces the part of the CUDA runtime that csrc/cuda uses, for kernels that the emulator runs.
#pragma once

#include <utility>

#include "emulator.h"

#define __grid_constant__
#define __maxnreg__(n)
#define SGL_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(kernel, dim3(blocks), dim3(threads), __VA_ARGS__))

namespace emulated {

inline int multiprocessors = 3;  // few, so that each block processes several pairs (bag, class)
inline bool capturing = false;
inline unsigned long long stream_id = 1;
inline cudaError_t next_error = cudaSuccess;  // the next call of cudaStreamIsCapturing() returns it, once
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t take_next_error() {
  const cudaError_t error = std::exchange(next_error, cudaSuccess);
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace emulated

constexpr cudaError_t cudaErrorInvalidDevice = static_cast<cudaError_t>(101);
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeRelaxed
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount
};

inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return emulated::take_next_error();
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = emulated::stream_id;
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
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
