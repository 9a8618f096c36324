// The kernels for the compiler's default instruction set: SSE2 on x86-64, NEON on arm64.

#define SGL_LEVEL baseline
#define SGL_WIDTH 4
#include "all_kernels.h"
#include "levels.h"

namespace sgl {

Kernels<float> baseline_kernels(float) { return baseline::all_kernels<float>(); }
Kernels<double> baseline_kernels(double) { return baseline::all_kernels<double>(); }

}  // namespace sgl
