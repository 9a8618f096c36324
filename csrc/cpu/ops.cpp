// The operators on the CPU: tensors are taken apart here, and what the bag-classes have in common is put together.
//
// Python has validated the arguments and words its errors for people; the checks here only keep memory safe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace sgl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------------------
// Reading tensors

template <class F>
void with_numbers(const Tensor& t, const char* name, const F& f) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return f(static_cast<const uint8_t*>(data));
    case ScalarType::Char:
      return f(static_cast<const int8_t*>(data));
    case ScalarType::Short:
      return f(static_cast<const int16_t*>(data));
    case ScalarType::Int:
      return f(static_cast<const int32_t*>(data));
    case ScalarType::Long:
      return f(static_cast<const int64_t*>(data));
    case ScalarType::UInt16:
      return f(static_cast<const uint16_t*>(data));
    case ScalarType::UInt32:
      return f(static_cast<const uint32_t*>(data));
    case ScalarType::UInt64:
      return f(static_cast<const uint64_t*>(data));
    case ScalarType::Half:
      return f(static_cast<const Half*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(data));
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::Double:
      return f(static_cast<const double*>(data));
    default:
      STD_TORCH_CHECK(false, name, ": unsupported dtype");
  }
}

template <class V>
double number(V v) {
  return static_cast<double>(v);
}
double number(Half v) { return read_as(0.0f, v); }
double number(BFloat16 v) { return read_as(0.0f, v); }

// Calls f(index, value) for every element of a tensor of one or two dimensions, row after row.
template <class F>
void for_numbers(const Tensor& t, const char* name, const F& f) {
  const bool matrix = t.dim() == 2;
  const int64_t rows = matrix ? t.size(0) : 1, columns = t.size(matrix ? 1 : 0);
  const int64_t row_step = matrix ? t.stride(0) : 0, column_step = t.stride(matrix ? 1 : 0);
  with_numbers(t, name, [&](const auto* data) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) f(i * columns + j, number(data[i * row_step + j * column_step]));
  });
}

Type type_of(const Tensor& logits) {
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

int64_t offset_at(const Tensor& offsets, int64_t i) {
  const int64_t at = i * offsets.stride(0);
  return offsets.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(offsets.const_data_ptr())[at]
                                                  : static_cast<const int64_t*>(offsets.const_data_ptr())[at];
}

Layout packed_layout(const Tensor& logits, const Tensor& offsets, const Tensor* grad) {
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
  // clamped and made monotonous: unchecked offsets may name rows that are not there
  layout.starts.resize(layout.bags + 1);
  int64_t previous = 0;
  for (int64_t i = 0; i <= layout.bags; ++i) {
    const int64_t start = std::min(std::max(offset_at(offsets, i), previous), logits.size(0));
    layout.longest = std::max(layout.longest, i == 0 ? 0 : start - previous);
    layout.starts[i] = previous = start;
  }
  return layout;
}

Layout dense_layout(const Tensor& logits, const std::optional<Tensor>& mask, const Tensor* grad) {
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
    // without a gradient (a mask) whatever lets dimensions collapse
    all.push_back(
        {logits.size(d), logits_step, mask ? mask->stride(d - first + 1) : logits_step,
         grad == nullptr ? logits_step : grad->stride(d)});
  }
  layout.dimensions = collapse(all);
  return layout;
}

Layout layout_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& offsets, const Tensor* grad) {
  STD_TORCH_CHECK(!(mask && offsets), "mask: packed bags have no padding");
  return offsets ? packed_layout(logits, *offsets, grad) : dense_layout(logits, mask, grad);
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

std::vector<Label> labels_of(const Tensor& targets, const Layout& layout) {
  const int64_t units = layout.bags * layout.classes;
  STD_TORCH_CHECK(
      (targets.dim() == 2 && targets.size(0) == layout.bags && targets.size(1) == layout.classes) ||
          (targets.dim() == 1 && layout.classes == 1 && targets.size(0) == layout.bags),
      "targets: wrong shape");
  std::vector<Label> labels(units);
  for_numbers(targets, "targets", [&](int64_t i, double y) {
    labels[i] = y != y ? Label::kUnknown : y == 0 ? Label::kNegative : Label::kPositive;
  });
  return labels;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sharing out the work

// f(begin, end, scratch) over bag-classes. Which thread takes which changes nothing in the result.
template <class T, class F>
void for_bag_classes(const Layout& layout, int64_t numel, const F& f) {
  const int64_t units = layout.bags * layout.classes;
  const int64_t worthwhile = numel / 16384 + 1;  // a thread's start costs as much as some ten thousand instances
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = std::max<int64_t>(1, std::min({threads, units, worthwhile}));
  const int64_t size = scratch_size(layout.longest);
  std::unique_ptr<T[]> scratch(new T[tasks * size]);  // left uninitialized; here, as nothing may throw in the threads
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
      f(units * task / tasks, units * (task + 1) / tasks, scratch.get() + task * size);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The batch (Eq. 8, 9)

struct Batch {
  int64_t participants = 0;
  int64_t count[3] = {};  // instances in each part
  double bag = 0, instance = 0, mask = 0;
};

int64_t at_least_one(int64_t n) { return std::max<int64_t>(n, 1); }

struct Settings {
  double lam, mask_weight;
  bool per_bag;
};

// One after the other and in double, so that the number of threads changes nothing.
template <class T>
Batch reduce(const std::vector<BagClass>& all, const T* class_weight, int64_t classes, const Settings& settings) {
  Batch batch;
  double part[3] = {}, per_bag = 0;
  for (size_t unit = 0; unit < all.size(); ++unit) {
    const BagClass& b = all[unit];
    if (b.kind == Kind::kAbsent) continue;
    const double weight = class_weight == nullptr ? 1.0 : class_weight[unit % classes];
    batch.participants += 1;
    for (int k = 0; k < 3; ++k) {
      batch.count[k] += b.count[k];
      part[k] += weight * b.weight * b.loss[k];
      if (settings.per_bag) per_bag += weight * b.weight * b.loss[k] / at_least_one(b.count[k]);
    }
    batch.bag += weight * b.bag_loss;
    batch.mask += weight * b.mask;
  }
  const double participants = at_least_one(batch.participants);
  batch.bag /= participants;
  batch.mask /= participants;
  if (settings.per_bag) {
    batch.instance = per_bag / participants;
  } else {
    for (int k = 0; k < 3; ++k) batch.instance += part[k] / at_least_one(batch.count[k]);
  }
  return batch;
}

// The row of `saved` of one bag-class.
template <class T>
void save(const BagClass& b, const Batch& batch, double class_weight, const Settings& settings, T* row) {
  std::fill(row, row + kColumns, T(0));
  row[kColumnKind] = static_cast<T>(b.kind);
  if (b.kind == Kind::kAbsent || b.kind == Kind::kBroken) return;
  row[kColumnLow] = static_cast<T>(b.low);
  row[kColumnHigh] = static_cast<T>(b.high);
  row[kColumnNearest] = static_cast<T>(b.nearest);
  const double participants = at_least_one(batch.participants);
  const Column column[] = {kColumnNegative, kColumnAmbiguous, kColumnPositive};
  for (int k = 0; k < 3; ++k) {
    const double denominator =
        settings.per_bag ? participants * at_least_one(b.count[k]) : static_cast<double>(at_least_one(batch.count[k]));
    row[column[k]] = static_cast<T>(settings.lam * class_weight * b.weight / denominator);
  }
  const double share = class_weight / participants;
  row[kColumnMask] = static_cast<T>(settings.mask_weight * share * b.mask_slope);
  row[kColumnPooling] = static_cast<T>(share * b.bag_slope);
  row[kColumnSlope1] = static_cast<T>(b.bag_logit.slope1);
  row[kColumnSlope2] = static_cast<T>(b.bag_logit.slope2);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(
    const Tensor& logits, const Tensor& targets, const Layout& layout, const std::optional<Tensor>& class_weights,
    const Problem<T>& problem, const Settings& settings) {
  const int64_t units = layout.bags * layout.classes;
  const T* class_weight = class_vector<T>(class_weights, "class_weight", layout.classes);
  const std::vector<Label> labels = labels_of(targets, layout);
  std::vector<BagClass> all(units);
  const Kernels<T>& kernel = kernels<T>();
  for_bag_classes<T>(layout, logits.numel(), [&](int64_t begin, int64_t end, T* scratch) {
    kernel.forward(problem, labels.data(), all.data(), begin, end, scratch);
  });
  for (BagClass& b : all) {
    // never silently dropped, whatever the weights of the terms
    if (b.kind == Kind::kBroken) b.bag_loss = b.loss[0] = std::numeric_limits<double>::quiet_NaN();
  }
  const Batch batch = reduce(all, class_weight, layout.classes, settings);

  const ScalarType type = scalar_type<T>();
  Tensor total = torch::stable::new_empty(logits, {}, type);
  Tensor parts = torch::stable::new_empty(logits, {3}, type);
  Tensor saved = torch::stable::new_empty(logits, {units, kColumns}, type);
  *static_cast<T*>(total.mutable_data_ptr()) =
      static_cast<T>(batch.bag + settings.lam * batch.instance + settings.mask_weight * batch.mask);
  T* part = static_cast<T*>(parts.mutable_data_ptr());
  part[0] = static_cast<T>(batch.bag);
  part[1] = static_cast<T>(batch.instance);
  part[2] = static_cast<T>(batch.mask);
  T* rows = static_cast<T*>(saved.mutable_data_ptr());
  for (int64_t unit = 0; unit < units; ++unit)
    save(
        all[unit], batch, class_weight == nullptr ? 1.0 : class_weight[unit % layout.classes], settings,
        rows + unit * kColumns);
  return {total, parts, saved};
}

template <class T>
Problem<T> problem_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& pos_weight,
    const Layout& layout, double delta_l, int64_t pooling, double pooling_parameter, bool rescale, bool weighted) {
  return {
      logits.const_data_ptr(),
      type_of(logits),
      mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
      class_vector<T>(pos_weight, "pos_weight", layout.classes),
      &layout,
      delta_l,
      pooling,
      pooling_parameter,
      rescale,
      weighted};
}

std::tuple<Tensor, Tensor, Tensor> sgl_forward(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> class_weight, std::optional<Tensor> pos_weight, double delta_l, double lam,
    double mask_weight, int64_t pooling, double pooling_parameter, bool per_bag, bool rescale, bool weighted) {
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  const Settings settings{lam, mask_weight, per_bag};
  if (type_of(logits) == Type::kDouble) {
    const Problem<double> problem =
        problem_of<double>(logits, mask, pos_weight, layout, delta_l, pooling, pooling_parameter, rescale, weighted);
    return forward_as(logits, targets, layout, class_weight, problem, settings);
  }
  const Problem<float> problem =
      problem_of<float>(logits, mask, pos_weight, layout, delta_l, pooling, pooling_parameter, rescale, weighted);
  return forward_as(logits, targets, layout, class_weight, problem, settings);
}

template <class T>
void backward_as(
    const Tensor& logits, const Layout& layout, const Tensor& saved, double grad_output, const Tensor& grad,
    const Problem<T>& problem) {
  STD_TORCH_CHECK(
      saved.scalar_type() == scalar_type<T>() && saved.is_contiguous() && saved.dim() == 2 &&
          saved.size(0) == layout.bags * layout.classes && saved.size(1) == kColumns,
      "saved: not what sgl_forward gave for these logits");
  const T* rows = static_cast<const T*>(saved.const_data_ptr());
  void* out = grad.mutable_data_ptr();
  const Kernels<T>& kernel = kernels<T>();
  for_bag_classes<T>(layout, logits.numel(), [&](int64_t begin, int64_t end, T* scratch) {
    kernel.backward(problem, rows, static_cast<T>(grad_output), out, begin, end, scratch);
  });
}

Tensor sgl_backward(
    const Tensor& grad_output, const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> pos_weight, const Tensor& saved, double delta_l, int64_t pooling, double pooling_parameter,
    bool rescale) {
  STD_TORCH_CHECK(grad_output.numel() == 1, "grad_output: expected a scalar");
  double scale = 0;
  with_numbers(grad_output, "grad_output", [&](const auto* data) { scale = number(data[0]); });
  Tensor grad = torch::stable::empty_like(logits);
  const Layout layout = layout_of(logits, mask, offsets, &grad);
  if (layout.packed() && (layout.starts.front() != 0 || layout.starts.back() != logits.size(0)))
    torch::stable::zero_(grad);  // rows of no bag
  if (type_of(logits) == Type::kDouble) {
    backward_as(
        logits, layout, saved, scale, grad,
        problem_of<double>(logits, mask, pos_weight, layout, delta_l, pooling, pooling_parameter, rescale, false));
  } else {
    backward_as(
        logits, layout, saved, scale, grad,
        problem_of<float>(logits, mask, pos_weight, layout, delta_l, pooling, pooling_parameter, rescale, false));
  }
  return grad;
}

// ---------------------------------------------------------------------------------------------------------------------

int64_t check_values(const Tensor& targets, std::optional<Tensor> offsets, int64_t total) {
  int64_t wrong = 0;
  STD_TORCH_CHECK(targets.dim() == 1 || targets.dim() == 2, "targets: expected one or two dimensions");
  for_numbers(targets, "targets", [&](int64_t, double y) { wrong |= !(y == 0 || y == 1 || y != y); });
  if (offsets) {
    STD_TORCH_CHECK(offsets->dim() == 1 && offsets->size(0) >= 1, "offsets: expected shape (N + 1,)");
    int64_t previous = 0;
    for_numbers(*offsets, "offsets", [&](int64_t i, double offset) {
      const int64_t start = static_cast<int64_t>(offset);
      if (i == 0 ? start != 0 : start < previous) wrong |= 2;
      previous = start;
    });
    if (previous != total) wrong |= 2;
  }
  return wrong;
}

std::string level_name() { return cpu_level(); }

Tensor math(const Tensor& x, const std::string& function) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x: expected contiguous float32");
  STD_TORCH_CHECK(
      function == "exp" || function == "log1p" || function == "expm1", "function: expected exp, log1p or expm1");
  Tensor y = torch::stable::empty_like(x);
  const int number = function == "exp" ? 0 : function == "log1p" ? 1 : 2;
  kernels<float>().math(
      number, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CPU, m) {
  m.impl("sgl_forward", TORCH_BOX(&sgl_forward));
  m.impl("sgl_backward", TORCH_BOX(&sgl_backward));
  m.impl("check_values", TORCH_BOX(&check_values));
  m.impl("_math", TORCH_BOX(&math));
}

// no tensor tells it the device
STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&level_name)); }

}  // namespace
}  // namespace sgl
