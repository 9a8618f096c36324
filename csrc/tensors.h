// Reads the arguments of the operators on every device: the memory layout of the instances, and bounds checks.
//
// Python validates arguments and reports errors; these checks only prevent invalid memory access.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "batch.h"
#include "half.h"
#include "layout.h"

namespace sgl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, float64, float16 or bfloat16");
  }
}

// A packed layout without the starts of its bags: the offsets, which hold them, may be on another device.
inline Layout rows_layout(const Tensor& logits, const Tensor& offsets, const Tensor* grad) {
  STD_TORCH_CHECK(logits.dim() == 1 || logits.dim() == 2, "logits: expected (T, C) or (T,) with offsets");
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Int || offsets.scalar_type() == ScalarType::Long,
      "offsets: expected int32 or int64");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 2, "offsets: expected shape (N + 1,)");
  Layout layout;
  layout.bags = offsets.size(0) - 1;
  layout.logits_bag = logits.stride(0);
  layout.grad_bag = grad == nullptr ? 0 : grad->stride(0);
  if (logits.dim() == 2) {
    layout.classes = logits.size(1);
    layout.logits_class = logits.stride(1);
    layout.grad_class = grad == nullptr ? 0 : grad->stride(1);
  } else {
    layout.classes = 1;
  }
  layout.dimensions = {{0, layout.logits_bag, 0, layout.grad_bag}};
  return layout;
}

inline Layout dense_layout(const Tensor& logits, const std::optional<Tensor>& mask, const Tensor* grad) {
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims >= 2 && dims <= 64, "logits: expected at least two dimensions without offsets");
  const int64_t first = dims == 2 ? 1 : 2;  // dimension of instances
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected torch.bool");
    STD_TORCH_CHECK(mask->dim() == dims - first + 1 && mask->size(0) == logits.size(0), "mask: wrong shape");
    for (int64_t d = first; d < dims; ++d)
      STD_TORCH_CHECK(mask->size(d - first + 1) == logits.size(d), "mask: wrong shape");
  }
  Layout layout;
  layout.bags = logits.size(0);
  layout.logits_bag = logits.stride(0);
  layout.mask_bag = mask ? mask->stride(0) : 0;
  layout.grad_bag = grad == nullptr ? 0 : grad->stride(0);
  if (first == 2) {
    layout.classes = logits.size(1);
    layout.logits_class = logits.stride(1);
    layout.grad_class = grad == nullptr ? 0 : grad->stride(1);
  } else {
    layout.classes = 1;
  }
  std::vector<Dimension> all;
  layout.longest = 1;
  for (int64_t d = first; d < dims; ++d) {
    layout.longest *= logits.size(d);
    const int64_t logits_step = logits.stride(d);
    // Without a mask or a gradient, use the stride of the logits: it lets collapse() merge the dimensions.
    all.push_back(
        {logits.size(d), logits_step, mask ? mask->stride(d - first + 1) : logits_step,
         grad == nullptr ? logits_step : grad->stride(d)});
  }
  layout.dimensions = collapse(all);
  return layout;
}

template <class T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

template <class T>
const T* class_vector(const std::optional<Tensor>& v, const char* name, int64_t classes) {
  if (!v) return nullptr;
  STD_TORCH_CHECK(
      v->scalar_type() == scalar_type<T>() && v->dim() == 1 && v->size(0) == classes && v->is_contiguous(), name,
      ": expected contiguous (C,) of the loss's dtype");
  return static_cast<const T*>(v->const_data_ptr());
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings of the operators

// Every operator with a pooling argument calls this, because kernels cannot report an unknown code.
inline void check_settings(const Settings& settings) {
  STD_TORCH_CHECK(is_pooling(settings.pooling), "pooling: expected the code of a pooling, got ", settings.pooling);
  STD_TORCH_CHECK(
      settings.loss >= kSelfGuidingLoss && settings.loss <= kBagLogits, "loss: expected the code of a loss, got ",
      settings.loss);
  STD_TORCH_CHECK(
      settings.loss == kSelfGuidingLoss || settings.loss == kBagLogits || settings.pooling != NoPooling::kCode,
      "pooling: a loss of bags needs one");
  STD_TORCH_CHECK(
      settings.loss != kMinMeanMaxLoss || settings.pooling == MeanPooling::kCode, "pooling: this loss has the mean");
  STD_TORCH_CHECK(
      (settings.loss != kBagInstanceLoss && settings.loss != kMinMeanMaxLoss) || settings.per_bag,
      "per_bag: this loss averages over each bag");
}

inline Settings settings_of_batch(double lam, double mask_weight, bool per_bag) {
  Settings settings = {};
  settings.lam = lam;
  settings.mask_weight = mask_weight;
  settings.per_bag = per_bag;
  return settings;
}

// Forward saved the weights of the terms in the rows of the pairs, so backward does not need them here.
inline Settings settings_of_backward(double delta_l, int64_t pooling, double pooling_parameter, bool rescale) {
  Settings settings = {};
  settings.delta_l = delta_l;
  settings.pooling = pooling;
  settings.pooling_parameter = pooling_parameter;
  settings.rescale = rescale;
  return settings;
}

inline Settings settings_of_bag_logits(int64_t pooling, double pooling_parameter) {
  Settings settings = settings_of_backward(0, pooling, pooling_parameter, false);
  settings.loss = kBagLogits;
  return settings;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that one operator returns and another one takes

inline void check_saved(const Tensor& saved, const Tensor& logits, const Layout& layout) {
  const ScalarType type = type_of(logits) == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      saved.scalar_type() == type && saved.is_contiguous() && saved.dim() == 2 &&
          saved.size(0) == layout.bags * layout.classes + 1 && saved.size(1) == kColumns,
      "saved: not what the forward operator gave for these logits");
}

inline void check_sums(const Tensor& sums, const Tensor& saved) {
  STD_TORCH_CHECK(
      sums.scalar_type() == ScalarType::Double && sums.dim() == 1 && sums.size(0) == kBatchNumbers &&
          sums.is_contiguous(),
      "sums: not what sgl_forward_sums gave");
  STD_TORCH_CHECK(
      (saved.scalar_type() == ScalarType::Float || saved.scalar_type() == ScalarType::Double) && saved.dim() == 2 &&
          saved.size(0) >= 1 && saved.size(1) == kColumns && saved.is_contiguous(),
      "saved: not what sgl_forward_sums gave");
}

inline void check_targets(const Tensor& targets, const Layout& layout) {
  STD_TORCH_CHECK(
      (targets.dim() == 2 && targets.size(0) == layout.bags && targets.size(1) == layout.classes) ||
          (targets.dim() == 1 && layout.classes == 1 && targets.size(0) == layout.bags),
      "targets: wrong shape");
}

}  // namespace sgl
