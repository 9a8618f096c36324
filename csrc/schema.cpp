// Registers the signatures of the operators, which all devices share. csrc/cpu and csrc/cuda implement them.
#include "schema.h"

#include <string>

#include "batch.h"

STABLE_TORCH_LIBRARY(sgl_ops, m) {
  sgl::define_operators(m);
  // 0: valid; bit 0: a target is not 0, 1 or NaN; bit 1: offsets do not start at 0, decrease, or do not end at total
  m.def("check_values(Tensor targets, Tensor? offsets, int total) -> int");
  // whether the library contains CUDA kernels
  m.def("has_cuda() -> bool");
  // the architectures of the CUDA kernels, for example "7.5 8.0 9.0+PTX"; empty without CUDA kernels
  m.def("cuda_architectures() -> str");
  // the instruction set the CPU kernels use: baseline, avx2 or avx512
  m.def("cpu_level() -> str");
  // one line "name code has_parameter" for each pooling of the operators
  m.def("poolings() -> str");
  // one line "name number" for each constant that Python needs to read the returned tensors
  m.def("constants() -> str");
  // exp, log1p_unit, log1p, expm1 or reciprocal of the CPU kernels, so that tests can measure their accuracy
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

std::string poolings() {
  std::string list;
#define SGL_LINE(P) \
  list += std::string(sgl::P::kName) + " " + std::to_string(sgl::P::kCode) + (sgl::P::kParameter ? " 1\n" : " 0\n");
  SGL_POOLINGS(SGL_LINE)
#undef SGL_LINE
  return list;
}

std::string constants() {
  const struct {
    const char* name;
    int64_t value;
  } all[] = {
      {"saved_columns", sgl::kColumns},
      {"first_weight_column", sgl::kColumnNegative},  // then ambiguous, positive, mask, pooling
      {"batch_numbers", sgl::kBatchNumbers},
      {"batch_integers", sgl::kBatchIntegers},
      {"self_guiding_loss", sgl::kSelfGuidingLoss},
      {"bag_loss", sgl::kBagLoss},
      {"bag_instance_loss", sgl::kBagInstanceLoss},
      {"min_mean_max_loss", sgl::kMinMeanMaxLoss},
  };
  std::string list;
  for (const auto& constant : all) list += std::string(constant.name) + " " + std::to_string(constant.value) + "\n";
  return list;
}

}  // namespace

// These operators have no tensor argument from which the dispatcher could get a device.
STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("poolings", TORCH_BOX(&poolings));
  m.impl("constants", TORCH_BOX(&constants));
}
