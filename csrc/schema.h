// The signatures of the operators that every device implements.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sgl {

// (total, (bag, instance, mask), what sgl_backward needs to know of each bag-class)
constexpr const char* kForwardSchema =
    "sgl_forward(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
    "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
    "bool per_bag, bool rescale, bool weighted) -> (Tensor total, Tensor parts, Tensor saved)";
// The same, and the sums over the batch that the loss is made of: (10,), 4 int64 in the guise of float64, then 6 float64.
// Added up over the processes of a group they are what sgl_conclude makes the loss of all of them from, and the
// denominators in saved; the gradient will be ``times`` that of the loss.
constexpr const char* kForwardSumsSchema =
    "sgl_forward_sums(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
    "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
    "bool per_bag, bool rescale, bool weighted) -> (Tensor total, Tensor parts, Tensor saved, Tensor sums)";
constexpr const char* kConcludeSchema =
    "sgl_conclude(Tensor sums, Tensor(a!) saved, float lam, float mask_weight, bool per_bag, float times) "
    "-> (Tensor total, Tensor parts)";
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
