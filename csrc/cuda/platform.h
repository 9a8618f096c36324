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

#define SGL_DEVICE __device__ __forceinline__
