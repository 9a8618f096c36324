// The CUDA kernels, run on the CPU under whatever sanitizer this was compiled with, against the CPU's kernels: cases drawn
// at random, in every layout, dtype and pooling.
//
//   compare CASES SEED SCHEDULE RESIDENT MULTIPROCESSORS BAGS POSITIONS
//
// BAGS and POSITIONS are drawn where they are 0. Exit status 0: all agree; 1: one does not, or the emulator stopped it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <random>

#include "../../csrc/cuda/launch.h"
#include "case.h"
#include "emulated_runtime.h"

namespace {

using sgl::BFloat16;
using sgl::Half;
using sgl::Type;

std::mt19937 generator;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool one_in(int n) { return between(1, n) == 1; }
double normal() { return std::normal_distribution<double>()(generator); }

int bytes_of(int type) { return type == 1 ? 8 : type == 0 ? 4 : 2; }

double read(int type, const void* data, int64_t at) {
  if (type == 0) return static_cast<const float*>(data)[at];
  if (type == 1) return static_cast<const double*>(data)[at];
  if (type == 2) return sgl::read_as(0.0f, static_cast<const Half*>(data)[at]);
  return sgl::read_as(0.0f, static_cast<const BFloat16*>(data)[at]);
}

void write(int type, void* data, int64_t at, double value) {
  if (type == 0) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (type == 1) static_cast<double*>(data)[at] = value;
  if (type == 2) sgl::write_as(static_cast<Half*>(data) + at, static_cast<float>(value));
  if (type == 3) sgl::write_as(static_cast<BFloat16*>(data) + at, static_cast<float>(value));
}

// Exactly as large as said, so that AddressSanitizer sees a step beyond the end.
struct Buffer {
  std::unique_ptr<char[]> bytes;

  explicit Buffer(int64_t size) : bytes(new char[size]) {}
};

struct Drawn {
  Case c;
  int64_t numel;
  std::vector<Buffer> buffers;

  void* room(int64_t bytes) {
    buffers.emplace_back(bytes);
    return buffers.back().bytes.get();
  }
};

enum Shape {
  kMap,
  kChannelsLast,
  kMasked,
  kSliced,
  kPacked,
  kShapes
};

void* class_vector(Drawn& d, bool may_be_zero) {
  if (!one_in(3)) return nullptr;
  void* v = d.room(d.c.classes * 8);
  for (int64_t k = 0; k < d.c.classes; ++k)
    write(d.c.type == 1 ? 1 : 0, v, k, may_be_zero && one_in(4) ? 0 : std::exp(normal()));
  return v;
}

Drawn draw(int64_t bags, int64_t positions) {
  Drawn d;
  Case& c = d.c;
  c.type = static_cast<int>(between(0, 3));
  const int shape = static_cast<int>(between(0, kShapes - 1));
  c.classes = one_in(3) ? 1 : between(1, 5);
  c.bags = one_in(4) ? between(1, 30) : between(1, 4);
  c.positions = one_in(10) ? between(400, 3000) : between(0, 80);
  if (one_in(3)) c.positions = c.positions / 8 * 8;  // rows that lie on 16 bytes
  if (bags != 0) c.bags = bags;
  if (positions != 0) c.positions = positions;
  c.mask = nullptr;
  c.mask_bag = 0;
  c.dimensions = 1;
  c.size[0] = c.positions;
  c.logits_step[0] = c.mask_step[0] = 1;
  if (shape == kPacked) {
    int64_t rows = 0;
    c.offsets.push_back(0);
    for (int64_t i = 0; i < c.bags; ++i) c.offsets.push_back(rows += one_in(4) ? 0 : between(0, 2 * c.positions));
    c.positions = rows;
    c.size[0] = 0;
    c.logits_bag = c.logits_step[0] = c.classes;
    c.logits_class = 1;
    d.numel = rows * c.classes;
  } else if (shape == kChannelsLast) {
    c.logits_bag = c.positions * c.classes;
    c.logits_class = 1;
    c.logits_step[0] = c.classes;
    d.numel = c.bags * c.logits_bag;
  } else if (shape == kSliced) {  // a window of a map: its rows do not follow one another
    c.dimensions = 2;
    c.size[0] = between(1, 9);
    c.size[1] = c.positions / c.size[0];
    c.positions = c.size[0] * c.size[1];
    c.logits_step[0] = c.size[1] + 3;
    c.logits_step[1] = 1;
    c.mask_step[0] = c.size[1];
    c.mask_step[1] = 1;
    c.logits_class = c.size[0] * c.logits_step[0];
    c.logits_bag = c.logits_class * c.classes;
    d.numel = c.bags * c.logits_bag;
  } else {
    c.logits_class = c.positions;
    c.logits_bag = c.positions * c.classes;
    d.numel = c.bags * c.logits_bag;
  }
  if (shape == kMasked) {
    bool* mask = static_cast<bool*>(d.room(c.bags * c.positions));
    for (int64_t k = 0; k < c.bags * c.positions; ++k) mask[k] = one_in(2);
    c.mask = mask;
    c.mask_bag = c.positions;
  }
  void* logits = d.room(d.numel * bytes_of(c.type));
  const double scale = one_in(4) ? 0.1 : 2, shift = one_in(5) ? 60 * normal() : 0;
  for (int64_t k = 0; k < d.numel; ++k) {
    const double x = scale * normal() + shift;
    write(c.type, logits, k, one_in(50) ? std::round(x) : x);
  }
  if (one_in(8) && d.numel > 0)
    write(c.type, logits, between(0, d.numel - 1), one_in(2) ? NAN : std::numeric_limits<double>::infinity());
  c.logits = logits;
  for (int64_t k = 0; k < c.bags * c.classes; ++k) c.labels.push_back(static_cast<int8_t>(between(0, 2)));
  c.class_weight = class_vector(d, true);
  c.pos_weight = class_vector(d, false);
  c.delta_l = one_in(5) ? 0.5 : 0.3;
  c.lam = one_in(5) ? 0 : 1.5;
  c.mask_weight = one_in(2) ? 0 : 0.7;
  c.pooling = between(0, 7);
  c.pooling_parameter = c.pooling == 6 ? 10 : 1;
  c.per_bag = one_in(2);
  c.rescale = !one_in(5);
  c.weighted = !one_in(5);
  c.grad_output = one_in(2) ? 1 : -3;
  return d;
}

void run_emulated(const Case& c, Result& result) {
  using namespace sgl;
  using namespace sgl::cuda;
  Call call = {};
  call.type = static_cast<Type>(c.type);
  call.logits = c.logits;
  call.mask = c.mask;
  call.pos_weight = c.pos_weight;
  Rows& rows = call.rows;
  rows.bags = c.bags;
  rows.classes = static_cast<uint32_t>(c.classes);
  rows.units = static_cast<uint32_t>(c.bags * c.classes);
  rows.positions = c.positions;
  rows.logits_bag = rows.grad_bag = c.logits_bag;
  rows.logits_class = rows.grad_class = c.logits_class;
  rows.mask_bag = c.mask_bag;
  rows.dimensions = c.dimensions;
  for (int k = 0; k < c.dimensions; ++k)
    rows.dimension[k] = {c.size[k], c.logits_step[k], c.mask_step[k], c.logits_step[k]};
  const bool wide = one_in(2);
  std::vector<int32_t> narrow(c.offsets.begin(), c.offsets.end());
  if (!c.offsets.empty()) {
    rows.offsets = wide ? static_cast<const void*>(c.offsets.data()) : narrow.data();
    rows.offsets_step = 1;
    rows.offsets_are_64_bit = wide;
  }
  call.settings = {c.delta_l, c.lam, c.mask_weight, c.pooling, c.pooling_parameter, c.per_bag, c.rescale, c.weighted};
  std::vector<float> targets;
  for (int8_t label : c.labels) targets.push_back(label == 0 ? NAN : label == 2 ? 1.0f : 0.0f);

  const int working = c.type == 1 ? 8 : 4;
  const Plan plan = plan_of(call, emulated::multiprocessors);
  Buffer total(working), parts(3 * working), saved((c.bags * c.classes + 1) * kColumns * working);
  std::vector<Batch> of_block(plan.forward_blocks + 1);
  Forward forward = {};
  forward.targets = {targets.data(), c.classes, 1, 4, true, false};
  forward.class_weight = c.class_weight;
  forward.total = total.bytes.get();
  forward.parts = parts.bytes.get();
  forward.saved = saved.bytes.get();
  forward.of_block = of_block.data();
  launch_forward(call, forward, plan, 0, nullptr);
  result.loss[0] = read(working == 8 ? 1 : 0, forward.total, 0);
  for (int k = 0; k < 3; ++k) result.loss[k + 1] = read(working == 8 ? 1 : 0, forward.parts, k);

  Buffer grad_output(working);
  write(working == 8 ? 1 : 0, grad_output.bytes.get(), 0, c.grad_output);
  launch_backward(call, {grad_output.bytes.get(), forward.saved, result.grad}, plan, nullptr);
}

// Whether `got` is `wanted` within `bound`; both NaN is equal.
bool agree(double got, double wanted, double bound) {
  if (std::isnan(got) || std::isnan(wanted)) return std::isnan(got) && std::isnan(wanted);
  return std::fabs(got - wanted) <= bound;
}

bool compare(const Drawn& d, int number) {
  const Case& c = d.c;
  const double eps = (c.type == 1 ? 2.3e-16 : 1.2e-7) * 64, rounding = c.type == 2 ? 1e-3 : c.type == 3 ? 8e-3 : 0;
  const int64_t bytes = d.numel * bytes_of(c.type);
  Buffer expected(bytes), got(bytes);
  // what neither touches (the gaps of a window) is the same
  std::memset(expected.bytes.get(), 0, bytes);
  std::memset(got.bytes.get(), 0, bytes);
  Result on_cpu{{}, expected.bytes.get()}, emulated{{}, got.bytes.get()};
  run_on_cpu(c, on_cpu);
  run_emulated(c, emulated);
  bool same = true;
  for (int k = 0; k < 4; ++k) same &= agree(emulated.loss[k], on_cpu.loss[k], eps * std::fabs(on_cpu.loss[k]) + 1e-30);
  double largest = 0;
  for (int64_t k = 0; k < d.numel; ++k) {
    const double g = std::fabs(read(c.type, expected.bytes.get(), k));
    if (g > largest && std::isfinite(g)) largest = g;
  }
  int64_t wrong = -1;
  for (int64_t k = 0; k < d.numel; ++k) {
    const double want = read(c.type, expected.bytes.get(), k), have = read(c.type, got.bytes.get(), k);
    if (!agree(have, want, eps * largest + rounding * std::fabs(want) + (c.type == 2 ? 6e-8 : 1e-37))) wrong = k;
  }
  if (same && wrong < 0) return true;
  std::printf(
      "case %d: type %d, %ld bags, %ld classes, %ld positions%s%s, pooling %ld: loss %.9g, on the CPU %.9g\n", number,
      c.type, static_cast<long>(c.bags), static_cast<long>(c.classes), static_cast<long>(c.positions),
      c.offsets.empty() ? "" : ", packed", c.mask == nullptr ? "" : ", masked", static_cast<long>(c.pooling),
      emulated.loss[0], on_cpu.loss[0]);
  if (wrong >= 0)
    std::printf(
        "gradient %ld: %.9g, on the CPU %.9g; largest %.9g\n", static_cast<long>(wrong),
        read(c.type, got.bytes.get(), wrong), read(c.type, expected.bytes.get(), wrong), largest);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const int cases = std::atoi(argv[1]);
  generator.seed(static_cast<unsigned>(std::atoi(argv[2])));
  emulator::set_schedule(static_cast<unsigned>(std::atoi(argv[3])));
  emulator::set_resident(static_cast<unsigned>(std::atoi(argv[4])));
  emulated::multiprocessors = std::atoi(argv[5]);
  try {
    for (int k = 0; k < cases; ++k)
      if (!compare(draw(std::atoi(argv[6]), std::atoi(argv[7])), k)) return 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d cases agree\n", cases);
  return 0;
}
