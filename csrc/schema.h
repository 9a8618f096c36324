// The signatures of the two operators that every device implements.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sgl {

// (total, (bag, instance, mask), what sgl_backward needs to know of each bag-class)
constexpr const char* kForwardSchema =
    "sgl_forward(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
    "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
    "bool per_bag, bool rescale, bool weighted) -> (Tensor total, Tensor parts, Tensor saved)";
constexpr const char* kBackwardSchema =
    "sgl_backward(Tensor grad_output, Tensor logits, Tensor? mask, Tensor? offsets, Tensor? pos_weight, "
    "Tensor saved, float delta_l, int pooling, float pooling_param, bool rescale) -> Tensor grad";

// Another way, which only benchmarks take (csrc/cuda/exchange.cuh): a forward that gives the gradient for grad_output = 1,
// and what multiplies it.
constexpr const char* kExchangeSchema =
    "sgl_exchange(Tensor logits, Tensor targets, Tensor? mask, Tensor? class_weight, Tensor? pos_weight, float "
    "delta_l, "
    "float lam, float mask_weight, int pooling, float pooling_param, bool per_bag, bool rescale, bool weighted) "
    "-> (Tensor total, Tensor parts, Tensor grad)";
constexpr const char* kScaleSchema = "sgl_scale(Tensor grad_output, Tensor(a!) grad) -> ()";

}  // namespace sgl
