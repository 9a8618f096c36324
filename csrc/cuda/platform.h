// Where the kernels run: on a GPU, compiled by nvcc, or (SGL_EMULATE) on the CPU, a fiber for every thread, so that
// they can be tested without one (tests/cuda_on_cpu).
#pragma once

#if defined(SGL_EMULATE)
#include "emulated_runtime.h"
#else
#include <cuda_runtime.h>
#define SGL_SHARED(Type, name) __shared__ Type name
#define SGL_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include "../batch.h"
#include "../half.h"
#include "../median.h"

#define SGL_DEVICE __device__ __forceinline__
#define SGL_DEVICE_CALL inline __device__ __noinline__  // one copy per kernel

namespace sgl {
namespace cuda {

// The smaller and the larger of two numbers; -0 is smaller than 0, so that the order of the arguments changes nothing.
// If b is NaN, the result is a.
template <class T>
SGL_DEVICE T smaller(T a, T b) {
  return b != b || order_of(a) <= order_of(b) ? a : b;
}
template <class T>
SGL_DEVICE T larger(T a, T b) {
  return b != b || order_of(a) >= order_of(b) ? a : b;
}
#if defined(__CUDACC__)
// Each is one instruction.
SGL_DEVICE float smaller(float a, float b) { return fminf(a, b); }
SGL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
#endif

// The larger number, or NaN if b is one. Without such an instruction, b * 0 has to be looked at, too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kMaximumOfNaN = true;
#else
constexpr bool kMaximumOfNaN = false;
#endif
template <class T>
SGL_DEVICE T larger_or_nan(T a, T b) {
  return larger(a, b);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
SGL_DEVICE float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

template <class T>
SGL_DEVICE T magnitude_of(T x) {
  return -minus_magnitude(x);
}

// The address of an object in shared memory, as an argument of functions that are not inlined. With a pointer, nvcc would not
// know there that the memory is shared.
template <class T>
class SharedAddress {
 public:
#if defined(__CUDA_ARCH__)
  SGL_DEVICE SharedAddress(const T* object) : address_(static_cast<uint32_t>(__cvta_generic_to_shared(object))) {}
  SGL_DEVICE const T& object() const { return *static_cast<const T*>(__cvta_shared_to_generic(address_)); }

 private:
  uint32_t address_;
#else
  SGL_DEVICE SharedAddress(const T* object) : address_(object) {}
  SGL_DEVICE const T& object() const { return *address_; }

 private:
  const T* address_;
#endif
};

}  // namespace cuda
}  // namespace sgl
