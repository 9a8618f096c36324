// The operators on the CPU. They read the tensors, distribute the pairs (bag, class) to threads, and sum over the
// batch.
//
// Python validates arguments and reports errors; these checks only prevent invalid memory access.
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

// The layout of packed bags, with their starts from the offsets.
Layout packed_layout(const Tensor& logits, const Tensor& offsets, const Tensor* grad) {
  Layout layout = rows_layout(logits, offsets, grad);
  // Clamped and made monotonic: unchecked offsets may be out of bounds.
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
  const int64_t pairs = layout.bags * layout.classes;
  check_targets(targets, layout);
  std::vector<Label> labels(pairs);
  for_numbers(targets, "targets", [&](int64_t i, double y) {
    labels[i] = y != y ? Label::kUnknown : y == 0 ? Label::kNegative : Label::kPositive;
  });
  return labels;
}

// Not torch::stable::new_empty, which goes through the dispatcher: on small bags that is a measurable part of a step.
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
// Distributing the pairs to threads

void parallel_for(int64_t tasks, void (*task)(const void* what, int64_t i), const void* what) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) task(what, i);
  });
}

// Divides the pairs into chunks of about kPiece instances. Threads take chunks dynamically, because the cost of a pair
// depends on its label and its bag. The chunks are the same for any number of threads.
template <class T>
class Chunks {
 public:
  Chunks(const Layout& layout, int64_t numel)
      : pairs_(layout.bags * layout.classes),
        size_(std::max<int64_t>(1, pairs_ * kPiece / std::max<int64_t>(1, numel))),
        scratch_size_(scratch_size(layout)) {
    const int64_t threads = torch::stable::get_num_threads();
    count = (pairs_ + size_ - 1) / size_;
    // With long bags, a single thread might work on the last pair while the others wait. Then all threads share each
    // pair instead. The condition compares the longest time of both ways, measured in instances.
    const int64_t at_once = std::min(threads, layout.longest / kPiece);
    together_ = at_once > 1 && numel / at_once < numel / threads + layout.longest - layout.longest / threads;
    // starting a thread costs as much as about ten thousand instances
    tasks_ = together_ ? 1 : std::max<int64_t>(1, std::min({threads, count, numel / kPiece + 1}));
    scratch_.reset(new T[tasks_ * scratch_size_]);  // uninitialized; allocated here because threads must not throw
  }

  int64_t count;

  // f(chunk, begin, end, scratch, parallel_for)
  template <class F>
  void each(const F& f) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task)
        for (int64_t chunk = next++; chunk < count; chunk = next++)
          f(chunk, chunk * size_, std::min(pairs_, (chunk + 1) * size_), scratch_.get() + task * scratch_size_,
            together_ ? &parallel_for : nullptr);
    });
  }

 private:
  int64_t pairs_, size_, scratch_size_, tasks_;
  bool together_;
  std::unique_ptr<T[]> scratch_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Returns (total, parts) and writes the last row of `saved`.
template <class T>
std::tuple<Tensor, Tensor> finalized(const Batch& batch, const Settings& settings, double times, T* denominators) {
  const ScalarType type = scalar_type<T>();
  Tensor total = empty<0>(type, {}), parts = empty<1>(type, {3});
  finalize_batch(
      batch, settings, times, static_cast<T*>(total.mutable_data_ptr()), static_cast<T*>(parts.mutable_data_ptr()),
      denominators);
  return {total, parts};
}

// The sums over the batch. `labels` is null for bag logits.
template <class T>
Batch batch_of(const Tensor& logits, const Problem<T>& problem, const Label* labels, const Forward<T>& out) {
  const Kernels<T>& kernel = kernels<T>();
  const Chunks<T> chunks(*problem.layout, logits.numel());
  std::vector<Batch> sums(chunks.count);
  chunks.each([&](int64_t chunk, int64_t begin, int64_t end, T* scratch, ParallelFor how) {
    sums[chunk] = kernel.forward(problem, labels, out, begin, end, scratch, how);
  });
  Batch batch = {};
  for (const Batch& some : sums) merge(batch, some);
  return batch;
}

// Writes the sums over the batch to `batch_out` if it is not null.
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(
    const Tensor& logits, const Tensor& targets, const Problem<T>& problem, Batch* batch_out) {
  const int64_t pairs = problem.layout->bags * problem.layout->classes;
  const std::vector<Label> labels = labels_of(targets, *problem.layout);
  Tensor saved = empty<2>(scalar_type<T>(), {pairs + 1, kColumns});
  T* rows = static_cast<T*>(saved.mutable_data_ptr());
  const Batch batch = batch_of(logits, problem, labels.data(), {rows, nullptr});
  if (batch_out != nullptr) *batch_out = batch;
  const auto [total, parts] = finalized(batch, problem.settings, 1, rows + pairs * kColumns);
  return {total, parts, saved};
}

template <class T>
std::tuple<Tensor, Tensor> bag_logits_as(const Tensor& logits, const Problem<T>& problem) {
  const int64_t pairs = problem.layout->bags * problem.layout->classes;
  Tensor z = empty<2>(scalar_type<T>(), {problem.layout->bags, problem.layout->classes});
  Tensor saved = empty<2>(scalar_type<T>(), {pairs + 1, kColumns});
  T* rows = static_cast<T*>(saved.mutable_data_ptr());
  const Batch batch = batch_of(logits, problem, nullptr, {rows, static_cast<T*>(z.mutable_data_ptr())});
  save_denominators(batch, problem.settings, 1, rows + pairs * kColumns);
  return {z, saved};
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
  check_settings(settings);
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  if (type_of(logits) == Type::kDouble)
    return forward_as(
        logits, targets, problem_of<double>(logits, mask, class_weight, pos_weight, layout, settings), batch);
  return forward_as(
      logits, targets, problem_of<float>(logits, mask, class_weight, pos_weight, layout, settings), batch);
}

std::tuple<Tensor, Tensor, Tensor> sgl_forward(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> class_weight, std::optional<Tensor> pos_weight, double delta_l, double lam,
    double mask_weight, int64_t pooling, double pooling_parameter, bool per_bag, bool rescale, bool weighted,
    int64_t loss) {
  return forward(
      logits, targets, mask, offsets, class_weight, pos_weight,
      {delta_l, lam, mask_weight, pooling, pooling_parameter, per_bag, rescale, weighted, loss}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sgl_forward_sums(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> class_weight, std::optional<Tensor> pos_weight, double delta_l, double lam,
    double mask_weight, int64_t pooling, double pooling_parameter, bool per_bag, bool rescale, bool weighted,
    int64_t loss) {
  Tensor sums = empty<1>(ScalarType::Double, {kBatchNumbers});
  const auto [total, parts, saved] = forward(
      logits, targets, mask, offsets, class_weight, pos_weight,
      {delta_l, lam, mask_weight, pooling, pooling_parameter, per_bag, rescale, weighted, loss},
      static_cast<Batch*>(sums.mutable_data_ptr()));
  return {total, parts, saved, sums};
}

std::tuple<Tensor, Tensor> sgl_finalize(
    const Tensor& sums, Tensor saved, double lam, double mask_weight, bool per_bag, double times) {
  check_sums(sums, saved);
  const Batch batch = *static_cast<const Batch*>(sums.const_data_ptr());
  const Settings settings = settings_of_batch(lam, mask_weight, per_bag);
  const int64_t last = (saved.size(0) - 1) * kColumns;
  if (saved.scalar_type() == ScalarType::Double)
    return finalized(batch, settings, times, static_cast<double*>(saved.mutable_data_ptr()) + last);
  return finalized(batch, settings, times, static_cast<float*>(saved.mutable_data_ptr()) + last);
}

// Returns (bag logits (N, C), rows of the pairs for pool_backward).
std::tuple<Tensor, Tensor> pool_forward(
    const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets, int64_t pooling,
    double pooling_parameter) {
  const Settings settings = settings_of_bag_logits(pooling, pooling_parameter);
  check_settings(settings);
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  if (type_of(logits) == Type::kDouble)
    return bag_logits_as(logits, problem_of<double>(logits, mask, std::nullopt, std::nullopt, layout, settings));
  return bag_logits_as(logits, problem_of<float>(logits, mask, std::nullopt, std::nullopt, layout, settings));
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <class T>
void backward_as(const Tensor& logits, const Problem<T>& problem, const Backward<T>& saved, const Tensor& grad) {
  void* out = grad.mutable_data_ptr();
  const Kernels<T>& kernel = kernels<T>();
  Chunks<T>(*problem.layout, logits.numel())
      .each([&](int64_t, int64_t begin, int64_t end, T* scratch, ParallelFor how) {
        kernel.backward(problem, saved, out, begin, end, scratch, how);
      });
}

// `grad_output` holds one number, or one number per pair if `per_pair` is true.
Tensor backward(
    const Tensor& grad_output, bool per_pair, const Tensor& logits, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& pos_weight, const Tensor& saved,
    const Settings& settings) {
  check_settings(settings);
  Tensor grad = empty_as(logits);
  const Layout layout = layout_of(logits, mask, offsets, &grad);
  check_saved(saved, logits, layout);
  if (layout.packed() && (layout.starts.front() != 0 || layout.starts.back() != logits.size(0)))
    torch::stable::zero_(grad);  // some rows belong to no bag
  std::vector<double> numbers(per_pair ? layout.bags * layout.classes : 1);
  STD_TORCH_CHECK(
      grad_output.numel() == static_cast<int64_t>(numbers.size()) && grad_output.dim() <= 2, "grad_output: expected ",
      numbers.size(), " numbers, got ", grad_output.numel());
  if (per_pair) {
    for_numbers(grad_output, "grad_output", [&](int64_t i, double g) { numbers[i] = g; });
  } else {
    with_numbers(grad_output, "grad_output", [&](const auto* data) { numbers[0] = number(data[0]); });
  }
  if (type_of(logits) == Type::kDouble) {
    const Backward<double> given{static_cast<const double*>(saved.const_data_ptr()), numbers.data(), per_pair};
    backward_as(logits, problem_of<double>(logits, mask, std::nullopt, pos_weight, layout, settings), given, grad);
  } else {
    const std::vector<float> narrow(numbers.begin(), numbers.end());
    const Backward<float> given{static_cast<const float*>(saved.const_data_ptr()), narrow.data(), per_pair};
    backward_as(logits, problem_of<float>(logits, mask, std::nullopt, pos_weight, layout, settings), given, grad);
  }
  return grad;
}

Tensor sgl_backward(
    const Tensor& grad_output, const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    std::optional<Tensor> pos_weight, const Tensor& saved, double delta_l, int64_t pooling, double pooling_parameter,
    bool rescale) {
  return backward(
      grad_output, false, logits, mask, offsets, pos_weight, saved,
      settings_of_backward(delta_l, pooling, pooling_parameter, rescale));
}

Tensor pool_backward(
    const Tensor& grad_output, const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets,
    const Tensor& saved, int64_t pooling, double pooling_parameter) {
  return backward(
      grad_output, true, logits, mask, offsets, std::nullopt, saved,
      settings_of_bag_logits(pooling, pooling_parameter));
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
  // in the order of the numbers of Kernels::math
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
  m.impl("sgl_finalize", TORCH_BOX(&sgl_finalize));
  m.impl("sgl_backward", TORCH_BOX(&sgl_backward));
  m.impl("pool_forward", TORCH_BOX(&pool_forward));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
  m.impl("check_values", TORCH_BOX(&check_values));
  m.impl("_math", TORCH_BOX(&math));
}

// It has no tensor argument from which the dispatcher could get a device.
STABLE_TORCH_LIBRARY_IMPL(sgl_ops, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&level_name)); }

}  // namespace
}  // namespace sgl
