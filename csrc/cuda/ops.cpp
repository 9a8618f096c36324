// The operators on CUDA: reads tensors and starts the kernels (launch.cu). Nothing waits for the device.
//
// One library serves every torch, also those built without CUDA: what it needs of libtorch_cuda is looked up at run
// time.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <tuple>

#include "../tensors.h"
#include "launch.h"

#if !defined(SGL_EMULATE)
#include <dlfcn.h>
#define SGL_LIBRARY sgl_ops
#define SGL_DISPATCH_KEY CUDA
#else
// the kernels run on the CPU, under another name beside the real ones
#define SGL_LIBRARY sgl_ops_emulated
#define SGL_DISPATCH_KEY CPU
#endif

namespace sgl {
namespace cuda {
namespace {

void* current_stream(int device) {
#if defined(SGL_EMULATE)
  return nullptr;
#else
  using Getter = int32_t (*)(int32_t, void**);
  static std::atomic<Getter> known{nullptr};
  Getter getter = known.load();
  if (getter == nullptr) {
    // RTLD_DEFAULT: torch may be linked statically, or its library may have another name
    const char* const name = "aoti_torch_get_current_cuda_stream";
    void* address = dlsym(RTLD_DEFAULT, name);
    void* const library = address == nullptr ? dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD) : nullptr;
    if (library != nullptr) address = dlsym(library, name);
    getter = reinterpret_cast<Getter>(address);
    known.store(getter);
  }
  STD_TORCH_CHECK(getter != nullptr, "sgl_ops: this build of torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "sgl_ops: torch gave no current stream of device ", device);
  return stream;
#endif
}

int device_of(const Tensor& t) {
#if defined(SGL_EMULATE)
  return 0;
#else
  return t.get_device_index();
#endif
}

void check(int error) { STD_TORCH_CHECK(error == 0, "sgl_ops: CUDA error: ", error_text(error)); }

// The current device while it lives. torch's guard restores the previous device only where that one has a context: to
// make a context takes hundreds of megabytes of its memory.
#if defined(SGL_EMULATE)
struct SelectedDevice {
  explicit SelectedDevice(int) {}
};
#else
using SelectedDevice = torch::stable::accelerator::DeviceGuard;
#endif

Targets targets_of(const Tensor& targets, const Layout& layout) {
  check_targets(targets, layout);
  Targets t = {};
  t.data = targets.const_data_ptr();
  t.bag_step = targets.stride(0);
  t.class_step = targets.dim() == 2 ? targets.stride(1) : 0;
  t.bytes = static_cast<int>(targets.element_size());
  const ScalarType type = targets.scalar_type();
  const uint64_t infinity = type == ScalarType::BFloat16 ? 0x7f80
                            : type == ScalarType::Half   ? 0x7c00
                            : type == ScalarType::Float  ? 0x7f800000
                            : type == ScalarType::Double ? 0x7ff0000000000000
                                                         : 0;
  set_label_bits(t, infinity);
  return t;
}

Rows rows_of(const Layout& layout, const Tensor& logits, const std::optional<Tensor>& offsets) {
  Rows rows = {};
  STD_TORCH_CHECK(layout.bags * layout.classes < int64_t{1} << 31, "logits: at most 2^31 - 1 bags times classes");
  rows.bags = layout.bags;
  rows.classes = static_cast<uint32_t>(layout.classes);
  rows.units = static_cast<uint32_t>(layout.bags * layout.classes);
  rows.positions = offsets ? logits.size(0) : layout.longest;
  rows.logits_bag = layout.logits_bag;
  rows.logits_class = layout.logits_class;
  rows.mask_bag = layout.mask_bag;
  rows.grad_bag = layout.grad_bag;
  rows.grad_class = layout.grad_class;
  STD_TORCH_CHECK(rows.positions < int64_t{1} << 30, "logits: at most 2^30 - 1 instances of a bag, or packed rows");
  STD_TORCH_CHECK(
      layout.dimensions.size() <= kMaxDimensions, "logits: at most ", kMaxDimensions,
      " dimensions of instances that are not contiguous");
  rows.dimensions = static_cast<int>(layout.dimensions.size());
  for (int d = 0; d < rows.dimensions; ++d) rows.dimension[d] = layout.dimensions[d];
  if (offsets) {
    rows.offsets = offsets->const_data_ptr();
    rows.offsets_step = offsets->stride(0);
    rows.offsets_are_64_bit = offsets->scalar_type() == ScalarType::Long;
  }
  return rows;
}

Layout layout_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& offsets, const Tensor* grad) {
  STD_TORCH_CHECK(!(mask && offsets), "mask: packed bags have no padding");
  return offsets ? rows_layout(logits, *offsets, grad) : dense_layout(logits, mask, grad);
}

ScalarType loss_type(const Tensor& logits) {
  return type_of(logits) == Type::kDouble ? ScalarType::Double : ScalarType::Float;
}

const void* class_vector(const std::optional<Tensor>& v, const char* name, const Tensor& logits, const Layout& layout) {
  if (loss_type(logits) == ScalarType::Double) return sgl::class_vector<double>(v, name, layout.classes);
  return sgl::class_vector<float>(v, name, layout.classes);
}

Call call_of(
    const Tensor& logits, const std::optional<Tensor>& mask, const std::optional<Tensor>& offsets,
    const std::optional<Tensor>& pos_weight, const Layout& layout, const Settings& settings) {
  Call call = {
      type_of(logits),
      logits.const_data_ptr(),
      mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
      class_vector(pos_weight, "pos_weight", logits, layout),
      rows_of(layout, logits, offsets),
      settings,
      false,
      false};
  set_form(call);
  return call;
}

int multiprocessors_of(int device) {
  int multiprocessors = 0;
  check(cuda::multiprocessors_of(device, &multiprocessors));
  return multiprocessors;
}

// What forward writes.
struct Outputs {
  Tensor total, parts, saved, workspace;
  Forward forward = {};

  Outputs(
      const Tensor& logits, const std::optional<Tensor>& class_weight, const Layout& layout, const Call& call,
      const Plan& plan)
      : total(torch::stable::new_empty(logits, {}, loss_type(logits))),
        parts(torch::stable::new_empty(logits, {3}, loss_type(logits))),
        saved(torch::stable::new_empty(logits, {layout.bags * layout.classes + 1, kColumns}, loss_type(logits))),
        workspace(
            torch::stable::new_empty(
                logits, {workspace_bytes(call, plan) / static_cast<int64_t>(sizeof(double))}, ScalarType::Double)) {
    forward.class_weight = class_vector(class_weight, "class_weight", logits, layout);
    forward.total = total.mutable_data_ptr();
    forward.parts = parts.mutable_data_ptr();
    forward.saved = saved.mutable_data_ptr();
    forward.workspace = workspace.mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const Settings& settings, Batch* sums) {
  check_settings(settings);
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  const Call call = call_of(logits, mask, offsets, pos_weight, layout, settings);
  const int device = device_of(logits);
  const SelectedDevice selected(device);
  const Plan plan = plan_of(call, multiprocessors_of(device));

  Outputs out(logits, class_weight, layout, call, plan);
  out.forward.targets = targets_of(targets, layout);
  out.forward.sums = sums;
  check(launch_forward(call, out.forward, plan, device, current_stream(device)));
  return {out.total, out.parts, out.saved};
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
  Tensor sums = torch::stable::new_empty(logits, {kBatchNumbers}, ScalarType::Double);
  const auto [total, parts, saved] = forward(
      logits, targets, mask, offsets, class_weight, pos_weight,
      {delta_l, lam, mask_weight, pooling, pooling_parameter, per_bag, rescale, weighted, loss},
      static_cast<Batch*>(sums.mutable_data_ptr()));
  return {total, parts, saved, sums};
}

std::tuple<Tensor, Tensor> sgl_finalize(
    const Tensor& sums, Tensor saved, double lam, double mask_weight, bool per_bag, double times) {
  check_sums(sums, saved);
  const int device = device_of(saved);
  STD_TORCH_CHECK(device_of(sums) == device, "sums, saved: expected on one device");
  const SelectedDevice selected(device);
  Tensor total = torch::stable::new_empty(saved, {}), parts = torch::stable::new_empty(saved, {3});
  const bool is_double = saved.scalar_type() == ScalarType::Double;
  const int64_t last = (saved.size(0) - 1) * kColumns * saved.element_size();
  check(launch_finalize(
      static_cast<const Batch*>(sums.const_data_ptr()), settings_of_batch(lam, mask_weight, per_bag), times, is_double,
      total.mutable_data_ptr(), parts.mutable_data_ptr(), static_cast<char*>(saved.mutable_data_ptr()) + last,
      current_stream(device)));
  return {total, parts};
}

// (bag logits (N, C), what pool_backward needs)
std::tuple<Tensor, Tensor> pool_forward(
    const Tensor& logits, std::optional<Tensor> mask, std::optional<Tensor> offsets, int64_t pooling,
    double pooling_parameter) {
  const Settings settings = settings_of_bag_logits(pooling, pooling_parameter);
  check_settings(settings);
  const Layout layout = layout_of(logits, mask, offsets, nullptr);
  const Call call = call_of(logits, mask, offsets, std::nullopt, layout, settings);
  const int device = device_of(logits);
  const SelectedDevice selected(device);
  const Plan plan = plan_of(call, multiprocessors_of(device));
  Outputs out(logits, std::nullopt, layout, call, plan);
  Tensor bag_logits = torch::stable::new_empty(logits, {layout.bags, layout.classes}, loss_type(logits));
  out.forward.bag_logits = bag_logits.mutable_data_ptr();
  check(launch_forward(call, out.forward, plan, device, current_stream(device)));
  return {bag_logits, out.saved};
}

// ``grad_output``: one number, or (``per_pair``) one for each pair.
Tensor backward(
    const Tensor& grad_output, bool per_pair, const Tensor& logits, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& pos_weight, const Tensor& saved,
    const Settings& settings) {
  check_settings(settings);
  Tensor grad = torch::stable::empty_like(logits);
  const Layout layout = layout_of(logits, mask, offsets, &grad);
  check_saved(saved, logits, layout);
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(saved.const_data_ptr()) % 16 == 0, "saved: expected at a multiple of 16 bytes");
  STD_TORCH_CHECK(
      grad_output.numel() == (per_pair ? layout.bags * layout.classes : 1) && grad_output.is_contiguous() &&
          grad_output.scalar_type() == loss_type(logits) && device_of(grad_output) == device_of(logits),
      "grad_output: expected contiguous, of the loss's dtype, on the logits' device");
  const Call call = call_of(logits, mask, offsets, pos_weight, layout, settings);
  const int device = device_of(logits);
  const SelectedDevice selected(device);
  const Backward backward{
      grad_output.const_data_ptr(), saved.const_data_ptr(), grad.mutable_data_ptr(), per_pair ? 1u : 0u};
  check(launch_backward(call, backward, plan_of(call, multiprocessors_of(device)), current_stream(device)));
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

// one more level of macros, so that the names above are names when they arrive
#define SGL_REGISTER(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
SGL_REGISTER(SGL_LIBRARY, SGL_DISPATCH_KEY, m) {
  m.impl("sgl_forward", TORCH_BOX(&sgl_forward));
  m.impl("sgl_forward_sums", TORCH_BOX(&sgl_forward_sums));
  m.impl("sgl_finalize", TORCH_BOX(&sgl_finalize));
  m.impl("sgl_backward", TORCH_BOX(&sgl_backward));
  m.impl("pool_forward", TORCH_BOX(&pool_forward));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
}

}  // namespace
}  // namespace cuda
}  // namespace sgl
