// The signatures of the operators that every device implements.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sgl {

// Returns (total, (bag, instance, mask), rows of the pairs for sgl_backward). ``loss`` is a LossCode of batch.h.
constexpr const char* kForwardSchema =
    "sgl_forward(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
    "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
    "bool per_bag, bool rescale, bool weighted, int loss) -> (Tensor total, Tensor parts, Tensor saved)";
// Also returns the sums over the batch (10,): 4 int64 reinterpreted as float64, then 6 float64. The processes of a
// group add up their sums. From the result, sgl_finalize computes the loss of the whole batch and the denominators in
// `saved`. Backward then returns ``times`` the gradient of the loss.
constexpr const char* kForwardSumsSchema =
    "sgl_forward_sums(Tensor logits, Tensor targets, Tensor? mask, Tensor? offsets, Tensor? class_weight, "
    "Tensor? pos_weight, float delta_l, float lam, float mask_weight, int pooling, float pooling_param, "
    "bool per_bag, bool rescale, bool weighted, int loss) -> (Tensor total, Tensor parts, Tensor saved, Tensor sums)";
constexpr const char* kFinalizeSchema =
    "sgl_finalize(Tensor sums, Tensor(a!) saved, float lam, float mask_weight, bool per_bag, float times) "
    "-> (Tensor total, Tensor parts)";
constexpr const char* kBackwardSchema =
    "sgl_backward(Tensor grad_output, Tensor logits, Tensor? mask, Tensor? offsets, Tensor? pos_weight, "
    "Tensor saved, float delta_l, int pooling, float pooling_param, bool rescale) -> Tensor grad";
// A pooling without a loss: the bag logits (N, C), and the gradient of the logits from that of the bag logits.
constexpr const char* kPoolForwardSchema =
    "pool_forward(Tensor logits, Tensor? mask, Tensor? offsets, int pooling, float pooling_param) "
    "-> (Tensor bag_logits, Tensor saved)";
constexpr const char* kPoolBackwardSchema =
    "pool_backward(Tensor grad_output, Tensor logits, Tensor? mask, Tensor? offsets, Tensor saved, int pooling, "
    "float pooling_param) -> Tensor grad";

// Defines these operators in a library of torch.
template <class Library>
void define_operators(Library& m) {
  m.def(kForwardSchema);
  m.def(kForwardSumsSchema);
  m.def(kFinalizeSchema);
  m.def(kBackwardSchema);
  m.def(kPoolForwardSchema);
  m.def(kPoolBackwardSchema);
}

}  // namespace sgl
