// The operators on the CPU: tensors are taken apart here, and what the bag-classes have in common is put together.
//
// Python has validated the arguments and words its errors for people; the checks here only keep memory safe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
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

int64_t offset_at(const Tensor& offsets, int64_t i) {
  const int64_t at = i * offsets.stride(0);
  return offsets.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(offsets.const_data_ptr())[at]
                                                  : static_cast<const int64_t*>(offsets.const_data_ptr())[at];
}

// Packed bags: where their rows lie is in the offsets.
Layout packed_layout(const Tensor& logits, const Tensor& offsets, const Tensor* grad) {
  Layout layout = rows_layout(logits, offsets, grad);
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

Layout layout_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& offsets, const Tensor* grad) {
  STD_TORCH_CHECK(!(mask && offsets), "mask: packed bags have no padding");
  return offsets ? packed_layout(logits, *offsets, grad) : dense_layout(logits, mask, grad);
}

std::vector<Label> labels_of(const Tensor& targets, const Layout& layout) {
  const int64_t units = layout.bags * layout.classes;
  check_targets(targets, layout);
  std::vector<Label> labels(units);
  for_numbers(targets, "targets", [&](int64_t i, double y) {
    labels[i] = y != y ? Label::kUnknown : y == 0 ? Label::kNegative : Label::kPositive;
  });
  return labels;
}

// Not torch::stable::new_empty, which goes by the dispatcher: of small bags that is felt.
Tensor empty(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t type) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <size_t dimensions>
Tensor empty(ScalarType type, const std::array<int64_t, dimensions>& sizes) {
  std::array<int64_t, dimensions> strides;
  int64_t step = 1;
  for (size_t d = dimensions; d-- > 0; step *= sizes[d]) strides[d] = step;
  const int32_t code = type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  return empty(dimensions, sizes.data(), strides.data(), code);
}

Tensor empty_as(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  int32_t code = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  return empty(t.dim(), sizes, strides, code);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sharing out the work

void spread(int64_t tasks, void (*task)(const void* what, int64_t i), const void* what) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) task(what, i);
  });
}

// The bag-classes in chunks of about a piece's instances, which threads take one after the other: what each costs depends
// on its label and its bag. The chunks are the same for any number of threads.
template <class T>
class Chunks {
 public:
  Chunks(const Layout& layout, int64_t numel)
      : units_(layout.bags * layout.classes),
        size_(std::max<int64_t>(1, units_ * kPiece / std::max<int64_t>(1, numel))),
        scratch_size_(scratch_size(layout)) {
    const int64_t threads = torch::stable::get_num_threads();
    count = (units_ + size_ - 1) / size_;
    // One bag-class after the other, each by all threads: where bags are so long that a thread would be left with one while
    // the others have nothing to do. In instances, how long either way takes at most.
    const int64_t at_once = std::min(threads, layout.longest / kPiece);
    together_ = at_once > 1 && numel / at_once < numel / threads + layout.longest - layout.longest / threads;
    // a thread's start costs as much as some ten thousand instances
    tasks_ = together_ ? 1 : std::max<int64_t>(1, std::min({threads, count, numel / kPiece + 1}));
    scratch_.reset(new T[tasks_ * scratch_size_]);  // uninitialized; here, as nothing may throw in the threads
  }

  int64_t count;

  // f(chunk, begin, end, scratch, spread)
  template <class F>
  void each(const F& f) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task)
        for (int64_t chunk = next++; chunk < count; chunk = next++)
          f(chunk, chunk * size_, std::min(units_, (chunk + 1) * size_), scratch_.get() + task * scratch_size_,
            together_ ? &spread : nullptr);
    });
  }

 private:
  int64_t units_, size_, scratch_size_, tasks_;
  bool together_;
  std::unique_ptr<T[]> scratch_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// (total, parts), and the last row of saved
template <class T>
std::tuple<Tensor, Tensor> concluded(const Batch& batch, const Settings& settings, double times, T* shares) {
  const ScalarType type = scalar_type<T>();
  Tensor total = empty<0>(type, {}), parts = empty<1>(type, {3});
  conclude(
      batch, settings, times, static_cast<T*>(total.mutable_data_ptr()), static_cast<T*>(parts.mutable_data_ptr()),
      shares);
  return {total, parts};
}

// ``batch_out``, where it is not null, gets what the loss is made of.
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(
    const Tensor& logits, const Tensor& targets, const Layout& layout, const Problem<T>& problem, Batch* batch_out) {
  const int64_t units = layout.bags * layout.classes;
  const std::vector<Label> labels = labels_of(targets, layout);
  Tensor saved = empty<2>(scalar_type<T>(), {units + 1, kColumns});
  T* rows = static_cast<T*>(saved.mutable_data_ptr());
  const Kernels<T>& kernel = kernels<T>();
  const Chunks<T> chunks(layout, logits.numel());
  std::vector<Batch> sums(chunks.count);
  chunks.each([&](int64_t chunk, int64_t begin, int64_t end, T* scratch, Spread how) {
    sums[chunk] = kernel.forward(problem, labels.data(), rows, begin, end, scratch, how);
  });
  Batch batch = {};
  for (const Batch& some : sums) merge(batch, some);
  if (batch_out != nullptr) *batch_out = batch;
  const auto [total, parts] = concluded(batch, problem.settings, 1, rows + units * kColumns);
  return {total, parts, saved};
}

template <class T>
Problem<T> problem_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const Layout& layout, const Settings& settings) {
  return {
      logits.const_data_ptr(),
      type_of(logits),
      mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
      class_vector<T>(class_weight, "class_weight", layout.classes),
      class_vector<T>(pos_weight, "pos_weight", layout.classes),
      &layout,
      settings};
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const Settings& settings, Batch* batch) {
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  if (type_of(logits) == Type::kDouble)
    return forward_as(
        logits, targets, layout, problem_of<double>(logits, mask, class_weight, pos_weight, layout, settings), batch);
  return forward_as(
      logits, targets, layout, problem_of<float>(logits, mask, class_weight, pos_weight, layout, settings), batch);
}

std::tuple<Tensor, Tensor, Tensor> sgl_forward(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> class_weight, std::optional<Tensor> pos_weight, double delta_l, double lam,
    double mask_weight, int64_t pooling, double pooling_parameter, bool per_bag, bool rescale, bool weighted) {
  return forward(
      logits, targets, mask, offsets, class_weight, pos_weight,
      {delta_l, lam, mask_weight, pooling, pooling_parameter, per_bag, rescale, weighted}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sgl_forward_sums(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> class_weight, std::optional<Tensor> pos_weight, double delta_l, double lam,
    double mask_weight, int64_t pooling, double pooling_parameter, bool per_bag, bool rescale, bool weighted) {
  Tensor sums = empty<1>(ScalarType::Double, {kBatchNumbers});
  const auto [total, parts, saved] = forward(
      logits, targets, mask, offsets, class_weight, pos_weight,
      {delta_l, lam, mask_weight, pooling, pooling_parameter, per_bag, rescale, weighted},
      static_cast<Batch*>(sums.mutable_data_ptr()));
  return {total, parts, saved, sums};
}

std::tuple<Tensor, Tensor> sgl_conclude(
    const Tensor& sums, Tensor saved, double lam, double mask_weight, bool per_bag, double times) {
  check_sums(sums, saved);
  const Batch batch = *static_cast<const Batch*>(sums.const_data_ptr());
  const Settings settings{0, lam, mask_weight, 0, 0, per_bag, false, false};
  const int64_t last = (saved.size(0) - 1) * kColumns;
  if (saved.scalar_type() == ScalarType::Double)
    return concluded(batch, settings, times, static_cast<double*>(saved.mutable_data_ptr()) + last);
  return concluded(batch, settings, times, static_cast<float*>(saved.mutable_data_ptr()) + last);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <class T>
void backward_as(
    const Tensor& logits, const Layout& layout, const Tensor& saved, double grad_output, const Tensor& grad,
    const Problem<T>& problem) {
  STD_TORCH_CHECK(
      saved.scalar_type() == scalar_type<T>() && saved.is_contiguous() && saved.dim() == 2 &&
          saved.size(0) == layout.bags * layout.classes + 1 && saved.size(1) == kColumns,
      "saved: not what sgl_forward gave for these logits");
  const T* rows = static_cast<const T*>(saved.const_data_ptr());
  void* out = grad.mutable_data_ptr();
  const Kernels<T>& kernel = kernels<T>();
  Chunks<T>(layout, logits.numel()).each([&](int64_t, int64_t begin, int64_t end, T* scratch, Spread how) {
    kernel.backward(problem, rows, static_cast<T>(grad_output), out, begin, end, scratch, how);
  });
}

Tensor sgl_backward(
    const Tensor& grad_output, const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> pos_weight, const Tensor& saved, double delta_l, int64_t pooling, double pooling_parameter,
    bool rescale) {
  STD_TORCH_CHECK(grad_output.numel() == 1, "grad_output: expected a scalar");
  double scale = 0;
  with_numbers(grad_output, "grad_output", [&](const auto* data) { scale = number(data[0]); });
  Tensor grad = empty_as(logits);
  const Layout layout = layout_of(logits, mask, offsets, &grad);
  if (layout.packed() && (layout.starts.front() != 0 || layout.starts.back() != logits.size(0)))
    torch::stable::zero_(grad);  // rows of no bag
  // what forward alone looks at is 0
  const Settings settings{delta_l, 0, 0, pooling, pooling_parameter, false, rescale, false};
  if (type_of(logits) == Type::kDouble) {
    backward_as(
        logits, layout, saved, scale, grad,
        problem_of<double>(logits, mask, std::nullopt, pos_weight, layout, settings));
  } else {
    backward_as(
        logits, layout, saved, scale, grad,
        problem_of<float>(logits, mask, std::nullopt, pos_weight, layout, settings));
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
  // as Kernels::math numbers them
  constexpr const char* names[] = {"exp", "log1p_unit", "expm1", "log1p", "reciprocal"};
  int number = 0;
  while (number < 5 && function != names[number]) ++number;
  STD_TORCH_CHECK(number < 5, "function: expected exp, log1p_unit, expm1, log1p or reciprocal");
  Tensor y = torch::stable::empty_like(x);
  kernels<float>().math(
      number, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CPU, m) {
  m.impl("sgl_forward", TORCH_BOX(&sgl_forward));
  m.impl("sgl_forward_sums", TORCH_BOX(&sgl_forward_sums));
  m.impl("sgl_conclude", TORCH_BOX(&sgl_conclude));
  m.impl("sgl_backward", TORCH_BOX(&sgl_backward));
  m.impl("check_values", TORCH_BOX(&check_values));
  m.impl("_math", TORCH_BOX(&math));
}

// no tensor tells it the device
STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&level_name)); }

}  // namespace
}  // namespace sgl
