// What the kernels load from the logits and store into the gradient, in sizes of the logits: every access counts, also one
// that a GPU's caches would answer; what lies in shared memory does not.
//
//   traffic BAGS CLASSES POSITIONS POSITIVES MULTIPROCESSORS
//
// prints loads of logits, loads and stores of the gradient of the shipped forward and backward, and of exchange.cuh. The
// POSITIVES among the bag-classes are spread evenly. The kernels are compiled as for ThreadSanitizer, and what that calls
// at every access is here.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "emulated_runtime.h"

namespace {

struct Counted {
  const char *begin, *end;
  size_t loaded, stored;
};
Counted logits_counted, grad_counted;

void count(const void* at, size_t bytes, size_t Counted::* what) {
  for (Counted* c : {&logits_counted, &grad_counted})
    if (at >= c->begin && at < c->end) c->*what += bytes;
}

}  // namespace

extern "C" {
#define TRAFFIC_ACCESS(n)                                                     \
  void __tsan_read##n(void* at) { count(at, n, &Counted::loaded); }           \
  void __tsan_write##n(void* at) { count(at, n, &Counted::stored); }          \
  void __tsan_unaligned_read##n(void* at) { count(at, n, &Counted::loaded); } \
  void __tsan_unaligned_write##n(void* at) { count(at, n, &Counted::stored); }
TRAFFIC_ACCESS(1)
TRAFFIC_ACCESS(2)
TRAFFIC_ACCESS(4)
TRAFFIC_ACCESS(8)
TRAFFIC_ACCESS(16)
void __tsan_read_range(void* at, size_t n) { count(at, n, &Counted::loaded); }
void __tsan_write_range(void* at, size_t n) { count(at, n, &Counted::stored); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
// there is one thread
#define TRAFFIC_ATOMIC(n, Type)                                                      \
  Type __tsan_atomic##n##_load(const volatile Type* at, int) { return *at; }         \
  void __tsan_atomic##n##_store(volatile Type* at, Type value, int) { *at = value; } \
  Type __tsan_atomic##n##_fetch_add(volatile Type* at, Type value, int) {            \
    const Type before = *at;                                                         \
    *at = static_cast<Type>(before + value);                                         \
    return before;                                                                   \
  }
TRAFFIC_ATOMIC(8, uint8_t)
TRAFFIC_ATOMIC(32, uint32_t)
TRAFFIC_ATOMIC(64, uint64_t)
}

int main(int argc, char** argv) {
  using namespace sgl;
  using namespace sgl::cuda;
  if (argc != 6) return 2;
  const int64_t bags = std::atoi(argv[1]), classes = std::atoi(argv[2]), positions = std::atoi(argv[3]);
  const int64_t units = bags * classes, numel = units * positions, positives = std::atoi(argv[4]);
  const int multiprocessors = std::atoi(argv[5]);

  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> logits(numel), grad(numel), targets(units), saved((units + 1) * kColumns);
  for (float& x : logits) x = normal(generator);
  for (int64_t unit = 0; unit < units; ++unit)
    targets[unit] = (unit + 1) * positives / units - unit * positives / units == 1;
  logits_counted.begin = reinterpret_cast<const char*>(logits.data());
  logits_counted.end = logits_counted.begin + numel * sizeof(float);
  grad_counted.begin = reinterpret_cast<const char*>(grad.data());
  grad_counted.end = grad_counted.begin + numel * sizeof(float);

  Call call = {};
  call.type = Type::kFloat;
  call.logits = logits.data();
  Rows& rows = call.rows;
  rows.bags = bags;
  rows.classes = static_cast<uint32_t>(classes);
  rows.units = static_cast<uint32_t>(units);
  rows.positions = rows.logits_class = rows.grad_class = positions;
  rows.logits_bag = rows.grad_bag = positions * classes;
  rows.dimensions = 1;
  rows.dimension[0] = {positions, 1, 0, 1};
  call.settings = {0.3, 1, 0, MaxPooling::kCode, 1, false, true, true, 0};
  float total, parts[3];
  const float grad_output = 1;
  const Plan plan = plan_of(call, multiprocessors);
  Plan exchange_plan;
  exchange_plan_of(call, multiprocessors, &exchange_plan);
  std::vector<Batch> of_block(plan.forward_blocks + 1);
  Forward forward = {};
  forward.targets = {targets.data(), classes, 1, 4, true, false};
  forward.total = &total;
  forward.parts = parts;
  forward.saved = saved.data();
  forward.of_block = of_block.data();

  const auto report = [&](const char* name) {
    const double bytes = static_cast<double>(numel * sizeof(float));
    std::printf(
        "%s %.4f %.4f %.4f\n", name, logits_counted.loaded / bytes, grad_counted.loaded / bytes,
        grad_counted.stored / bytes);
    for (Counted* c : {&logits_counted, &grad_counted}) c->loaded = c->stored = 0;
  };
  launch_forward(call, forward, plan, 0, nullptr);
  report("forward");
  launch_backward(call, {&grad_output, saved.data(), grad.data()}, plan, nullptr);
  report("backward");
  launch_exchange(call, forward, grad.data(), exchange_plan, 0, nullptr);
  report("exchange");
  launch_scale(grad.data(), numel, &grad_output, multiprocessors, nullptr);
  report("scale_by_1");
  const float other = 2;
  launch_scale(grad.data(), numel, &other, multiprocessors, nullptr);
  report("scale");
}
