// The kernels for x86-64 with AVX-512 (F, DQ, VL, BW).
#if defined(__x86_64__)
// Include the standard library before the pragma: the linker may share its functions with code for the baseline.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif
#define SGL_LEVEL avx512
#define SGL_WIDTH 16
#include "all_kernels.h"
#include "levels.h"

namespace sgl {

Kernels<float> avx512_kernels(float) { return avx512::all_kernels<float>(); }
Kernels<double> avx512_kernels(double) { return avx512::all_kernels<double>(); }

}  // namespace sgl
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
