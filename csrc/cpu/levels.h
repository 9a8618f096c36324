// The kernels of each instruction set (level_*.cpp). The argument only selects float or double.
#pragma once

#include "kernels.h"

namespace sgl {

Kernels<float> baseline_kernels(float);
Kernels<double> baseline_kernels(double);
#if defined(__x86_64__)
Kernels<float> avx2_kernels(float);
Kernels<double> avx2_kernels(double);
Kernels<float> avx512_kernels(float);
Kernels<double> avx512_kernels(double);
#endif

}  // namespace sgl
