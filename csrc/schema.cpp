// The operators' signatures, the same for every device. csrc/cpu and csrc/cuda implement them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sgl_ops, m) {
  // (total, (bag, instance, mask), what sgl_backward needs to know of each bag-class)
  m.def(
      "sgl_forward(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
      "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
      "bool per_bag, bool rescale, bool weighted) -> (Tensor total, Tensor parts, Tensor saved)");
  m.def(
      "sgl_backward(Tensor grad_output, Tensor logits, Tensor? mask, Tensor? offsets, Tensor? pos_weight, "
      "Tensor saved, float delta_l, int pooling, float pooling_param, bool rescale) -> Tensor grad");
  // 0: fine; bit 0: a target is neither 0, 1 nor NaN; bit 1: offsets do not start at 0, fall, or do not end at total
  m.def("check_values(Tensor targets, Tensor? offsets, int total) -> int");
  // the instruction set the CPU kernels use: baseline, avx2 or avx512
  m.def("cpu_level() -> str");
  // exp, log1p or expm1 as the kernels compute it, so that their accuracy can be tested
  m.def("_math(Tensor x, str function) -> Tensor");
}
