// The operators' signatures, the same for every device. csrc/cpu and csrc/cuda implement them.
#include "schema.h"

#include <string>

STABLE_TORCH_LIBRARY(sgl_ops, m) {
  m.def(sgl::kForwardSchema);
  m.def(sgl::kForwardSumsSchema);
  m.def(sgl::kConcludeSchema);
  m.def(sgl::kBackwardSchema);
#if defined(SGL_WITH_EXCHANGE)
  m.def(sgl::kExchangeSchema);
  m.def(sgl::kScaleSchema);
#endif
  // 0: fine; bit 0: a target is neither 0, 1 nor NaN; bit 1: offsets do not start at 0, fall, or do not end at total
  m.def("check_values(Tensor targets, Tensor? offsets, int total) -> int");
  // whether the library holds kernels for CUDA
  m.def("has_cuda() -> bool");
  // what the kernels for CUDA were compiled for, as in "7.5 8.0 9.0+PTX"; empty without them
  m.def("cuda_architectures() -> str");
  // the instruction set the CPU kernels use: baseline, avx2 or avx512
  m.def("cpu_level() -> str");
  // exp, log1p_unit, log1p or expm1 as the kernels compute it, so that their accuracy can be tested
  m.def("_math(Tensor x, str function) -> Tensor");
}

namespace {

bool has_cuda() {
#if defined(SGL_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

std::string cuda_architectures() {
#if defined(SGL_CUDA_ARCHITECTURES)
  return SGL_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace

// no tensor tells them the device
STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
