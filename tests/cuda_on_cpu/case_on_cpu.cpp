// Runs a case with the CPU kernels. Their namespace is renamed, because the emulated kernels are in the same program
// and compute exp in another way.
#define sgl sgl_on_cpu
#include "../../csrc/cpu/level_baseline.cpp"
#undef sgl

#include "case.h"

namespace {

template <class T>
void run(const Case& c, Result& result) {
  using namespace sgl_on_cpu;
  Layout layout;
  layout.bags = c.bags;
  layout.classes = c.classes;
  layout.logits_bag = layout.grad_bag = c.logits_bag;
  layout.logits_class = layout.grad_class = c.logits_class;
  layout.mask_bag = c.mask_bag;
  for (int d = 0; d < c.dimensions; ++d)
    layout.dimensions.push_back({c.size[d], c.logits_step[d], c.mask_step[d], c.logits_step[d]});
  layout.starts = c.offsets;
  layout.longest = c.positions;
  const Settings settings{c.delta_l, c.lam,     c.mask_weight, c.pooling, c.pooling_parameter,
                          c.per_bag, c.rescale, c.weighted,    c.loss};
  const Problem<T> problem{
      c.logits,
      static_cast<Type>(c.type),
      c.mask,
      static_cast<const T*>(c.class_weight),
      static_cast<const T*>(c.pos_weight),
      &layout,
      settings};
  const int64_t pairs = c.bags * c.classes;
  std::vector<Label> labels(pairs);
  for (int64_t pair = 0; pair < pairs; ++pair) labels[pair] = static_cast<Label>(c.labels[pair]);
  std::vector<T> scratch(scratch_size(layout)), saved((pairs + 1) * kColumns);
  const Kernels<T> kernel = baseline_kernels(T());
  const Batch batch =
      kernel.forward(problem, labels.data(), {saved.data(), nullptr}, 0, pairs, scratch.data(), nullptr);
  save_denominators(batch, settings, 1, saved.data() + pairs * kColumns);
  const Loss loss = loss_of(batch, settings);
  result.loss[0] = loss.total;
  result.loss[1] = loss.bag;
  result.loss[2] = loss.instance;
  result.loss[3] = loss.mask;
  const T grad_output = static_cast<T>(c.grad_output);
  kernel.backward(problem, {saved.data(), &grad_output, false}, result.grad, 0, pairs, scratch.data(), nullptr);
}

}  // namespace

void run_on_cpu(const Case& c, Result& result) {
  if (c.type == 1) {
    run<double>(c, result);
  } else {
    run<float>(c, result);
  }
}
