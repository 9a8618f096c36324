// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
// Include the standard library before the pragma: the linker may share its functions with code for the baseline.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SGL_LEVEL avx2
#define SGL_WIDTH 8
#include "all_kernels.h"
#include "levels.h"

namespace sgl {

Kernels<float> avx2_kernels(float) { return avx2::all_kernels<float>(); }
Kernels<double> avx2_kernels(double) { return avx2::all_kernels<double>(); }

}  // namespace sgl
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
