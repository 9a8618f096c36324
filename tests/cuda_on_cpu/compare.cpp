// Compares the CUDA kernels, run by the emulator, with the CPU kernels. The program can be compiled with a sanitizer.
//
// Each input line is a case; cases.py defines the format. The program answers each case with one line: "ok", or the
// differences or the error of the emulator. After an error it exits with status 1, because a wrong kernel may have
// corrupted memory.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "case.h"
#include "emulated_runtime.h"

namespace {

using sgl::BFloat16;
using sgl::Half;
using sgl::Type;

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

// Memory of exactly `size` bytes, so that AddressSanitizer finds an access past the end. It is filled with NaN, so that
// elements that are not written are found.
struct Buffer {
  std::unique_ptr<char[]> bytes;

  explicit Buffer(int64_t size) : bytes(new char[size]) { std::memset(bytes.get(), 0xff, size); }
};

// The words of an input line.
class Line {
 public:
  explicit Line(const std::string& text) : text_(text) {}

  double number() {
    std::string word;
    if (!(text_ >> word)) throw std::runtime_error("the input line has too few numbers");
    return std::strtod(word.c_str(), nullptr);  // unlike >>, it parses nan and inf
  }
  int64_t integer() { return static_cast<int64_t>(number()); }
  bool flag() { return number() != 0; }
  std::vector<double> numbers() {
    std::vector<double> all(integer());
    for (double& x : all) x = number();
    return all;
  }
  bool ends() {
    text_ >> std::ws;
    return text_.eof();
  }

 private:
  std::istringstream text_;
};

enum Shape {
  kMap,
  kChannelsLast,
  kWindow,
  kPacked
};

// A case with its tensors and the settings of its launch.
struct Problem {
  Case c;
  int64_t numel, multiprocessors;
  std::vector<double> plan;
  bool wide_offsets;
  std::vector<Buffer> buffers;

  explicit Problem(Line& line) {
    emulator::set_schedule(static_cast<unsigned>(line.integer()));
    emulator::set_resident(static_cast<unsigned>(line.integer()));
    multiprocessors = line.integer();
    plan = line.numbers();
    c.type = static_cast<int>(line.integer());
    const int64_t shape = line.integer();
    c.classes = line.integer();
    const std::vector<double> sizes = line.numbers();
    set_layout(shape, sizes, line.integer());
    wide_offsets = line.flag();
    set_mask(line.numbers());
    const std::vector<double> labels = line.numbers();
    for (int64_t k = 0; k < c.bags * c.classes; ++k)
      c.labels.push_back(static_cast<int8_t>(labels[static_cast<size_t>(k) % labels.size()]));
    c.class_weight = class_vector(line.numbers());
    c.pos_weight = class_vector(line.numbers());
    set_random_logits(line);
    c.delta_l = line.number();
    c.lam = line.number();
    c.mask_weight = line.number();
    c.pooling = line.integer();
    c.pooling_parameter = line.number();
    c.per_bag = line.flag();
    c.rescale = line.flag();
    c.weighted = line.flag();
    c.loss = line.integer();
    c.grad_output = line.number();
    if (!line.ends()) throw std::runtime_error("the input line has too many numbers");
  }

 private:
  void* allocate(int64_t bytes) {
    buffers.emplace_back(bytes);
    return buffers.back().bytes.get();
  }

  void set_layout(int64_t shape, const std::vector<double>& sizes, int64_t window_rows) {
    c.bags = static_cast<int64_t>(sizes.size());
    c.positions = static_cast<int64_t>(sizes[0]);
    c.dimensions = 1;
    c.size[0] = c.positions;
    c.logits_step[0] = c.mask_step[0] = 1;
    c.logits_class = c.positions;
    c.logits_bag = c.positions * c.classes;
    if (shape == kPacked) {
      int64_t rows = 0;
      c.offsets.push_back(0);
      for (double size : sizes) c.offsets.push_back(rows += static_cast<int64_t>(size));
      c.positions = rows;
      c.size[0] = 0;
      c.logits_bag = c.logits_step[0] = c.classes;
      c.logits_class = 1;
      numel = rows * c.classes;
      return;
    }
    if (shape == kChannelsLast) {
      c.logits_class = 1;
      c.logits_step[0] = c.classes;
    } else if (shape == kWindow) {
      c.dimensions = 2;
      c.size[0] = window_rows;
      c.size[1] = c.positions / window_rows;
      c.logits_step[0] = c.size[1] + 3;
      c.logits_step[1] = 1;
      c.mask_step[0] = c.size[1];
      c.mask_step[1] = 1;
      c.logits_class = c.size[0] * c.logits_step[0];
      c.logits_bag = c.logits_class * c.classes;
    }
    numel = c.bags * c.logits_bag;
  }

  void set_mask(const std::vector<double>& pattern) {
    c.mask = nullptr;
    c.mask_bag = 0;
    if (pattern.empty()) return;
    c.mask_bag = c.positions;
    bool* mask = static_cast<bool*>(allocate(c.bags * c.positions));
    for (int64_t k = 0; k < c.bags * c.positions; ++k) mask[k] = pattern[static_cast<size_t>(k) % pattern.size()] != 0;
    c.mask = mask;
  }

  void* class_vector(const std::vector<double>& pattern) {
    if (pattern.empty()) return nullptr;
    const int type = c.type == 1 ? 1 : 0;
    void* v = allocate(c.classes * bytes_of(type));
    for (int64_t k = 0; k < c.classes; ++k) write(type, v, k, pattern[static_cast<size_t>(k) % pattern.size()]);
    return v;
  }

  void set_random_logits(Line& line) {
    std::mt19937 generator(static_cast<unsigned>(line.integer()));
    std::normal_distribution<double> normal;
    const double scale = line.number(), shift = line.number();
    const int64_t round_every = line.integer();
    void* logits = allocate(numel * bytes_of(c.type));
    for (int64_t k = 0; k < numel; ++k) {
      const double x = scale * normal(generator) + shift;
      write(c.type, logits, k, round_every != 0 && k % round_every == 0 ? std::round(x) : x);
    }
    for (double x : line.numbers())
      if (numel > 0) write(c.type, logits, static_cast<int64_t>(generator() % static_cast<uint64_t>(numel)), x);
    c.logits = logits;
  }
};

// Runs the case on the emulator: forward twice, backward once. Returns whether both forward launches give the same
// bits, which also checks the state that the first launch leaves behind.
bool run_emulated(const Problem& problem, Result& result) {
  const Case& c = problem.c;
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
  std::vector<int32_t> narrow(c.offsets.begin(), c.offsets.end());
  if (!c.offsets.empty()) {
    rows.offsets = problem.wide_offsets ? static_cast<const void*>(c.offsets.data()) : narrow.data();
    rows.offsets_step = 1;
    rows.offsets_are_64_bit = problem.wide_offsets;
  }
  call.settings = {c.delta_l, c.lam,     c.mask_weight, c.pooling, c.pooling_parameter,
                   c.per_bag, c.rescale, c.weighted,    c.loss};
  set_form(call);
  std::vector<float> targets;
  for (int8_t label : c.labels) targets.push_back(label == 0 ? NAN : label == 2 ? 1.0f : 0.0f);

  const int working = c.type == 1 ? 8 : 4;
  Plan plan = plan_of(call, static_cast<int>(problem.multiprocessors));
  if (!problem.plan.empty()) {
    int* const members[] = {&plan.forward_bits,   &plan.part_bits,       &plan.backward_bits,
                            &plan.piece_bits,     &plan.first_part_bits, &plan.threads,
                            &plan.forward_blocks, &plan.backward_blocks, &plan.pieces};
    for (size_t k = 0; k < problem.plan.size(); ++k) *members[k] = static_cast<int>(problem.plan[k]);
    plan.first_threads = 64;
    if (call.mask != nullptr || call.rows.dimensions != 1) plan.piece_bits = 0;  // only simple rows are divided
  }
  const int type = c.type == 1 ? 1 : 0;
  std::vector<double> workspace(workspace_bytes(call, plan) / sizeof(double));
  Forward forward = {};
  forward.targets = {targets.data(), c.classes, 1, 4};
  set_label_bits(forward.targets, 0x7f800000);
  forward.class_weight = c.class_weight;
  forward.workspace = workspace.data();
  const int64_t sizes[] = {working, 3 * working, (c.bags * c.classes + 1) * kColumns * working};
  std::vector<Buffer> out, again;
  for (std::vector<Buffer>* to : {&again, &out}) {
    for (int64_t size : sizes) to->emplace_back(size);
    forward.total = (*to)[0].bytes.get();
    forward.parts = (*to)[1].bytes.get();
    forward.saved = (*to)[2].bytes.get();
    launch_forward(call, forward, plan, 0, nullptr);
  }
  result.loss[0] = read(type, forward.total, 0);
  for (int k = 0; k < 3; ++k) result.loss[k + 1] = read(type, forward.parts, k);

  Buffer grad_output(working);
  write(type, grad_output.bytes.get(), 0, c.grad_output);
  launch_backward(call, {grad_output.bytes.get(), forward.saved, result.grad, false}, plan, nullptr);
  bool same = true;
  for (int k = 0; k < 3; ++k) same &= std::memcmp(out[k].bytes.get(), again[k].bytes.get(), sizes[k]) == 0;
  return same;
}

// Whether the numbers differ by at most `bound`, or both are NaN.
bool agree(double got, double wanted, double bound) {
  if (std::isnan(got) || std::isnan(wanted)) return std::isnan(got) && std::isnan(wanted);
  return std::fabs(got - wanted) <= bound;
}

// The condition number: the relative error of the loss divided by that of the sums from which it is computed. For
// noisy_or, -log P = e^-a, where a is a sum over the instances. The relative error of e^-a is the absolute error of a,
// and a is large for a positive bag with P near 1.
double condition(const Case& c, double bag_loss) {
  const bool positive = std::find(c.labels.begin(), c.labels.end(), 2) != c.labels.end();
  if (c.pooling != sgl::NoisyOrPooling::kCode || !positive || !(bag_loss > 0)) return 1;
  return std::max(1.0, -std::log(bag_loss));
}

// Returns "ok", or a list of differences.
std::string compare(const Problem& problem) {
  const Case& c = problem.c;
  const double rounding = c.type == 2 ? 1e-3 : c.type == 3 ? 8e-3 : 0;
  const int64_t bytes = problem.numel * bytes_of(c.type);
  Buffer expected(bytes);
  Result on_cpu{{}, expected.bytes.get()};
  run_on_cpu(c, on_cpu);
  const double eps = (c.type == 1 ? 2.3e-16 : 1.2e-7) * 64 * condition(c, on_cpu.loss[1]);
  double largest = 0;
  for (int64_t k = 0; k < problem.numel; ++k) {
    const double g = std::fabs(read(c.type, on_cpu.grad, k));
    if (g > largest && std::isfinite(g)) largest = g;
  }

  std::ostringstream wrong;
  wrong.precision(9);
  Buffer got(bytes);
  Result emulated{{}, got.bytes.get()};
  if (!run_emulated(problem, emulated)) wrong << "a second launch of forward gives other bits; ";
  const char* const names[] = {"total", "bag", "instance", "mask"};
  for (int k = 0; k < 4; ++k)
    if (!agree(emulated.loss[k], on_cpu.loss[k], eps * std::fabs(on_cpu.loss[k]) + 1e-30))
      wrong << names[k] << " " << emulated.loss[k] << ", on the CPU " << on_cpu.loss[k] << "; ";
  for (int64_t k = 0; k < problem.numel; ++k) {
    const double want = read(c.type, on_cpu.grad, k), have = read(c.type, emulated.grad, k);
    if (agree(have, want, eps * largest + rounding * std::fabs(want) + (c.type == 2 ? 6e-8 : 1e-37))) continue;
    wrong << "gradient " << k << " " << have << ", on the CPU " << want << ", the largest " << largest << "; ";
    break;
  }
  return wrong.str().empty() ? "ok" : wrong.str();
}

}  // namespace

int main() {
  for (std::string text; std::getline(std::cin, text);) {
    std::string answer;
    try {
      Line line(text);
      answer = compare(Problem(line));
    } catch (const std::exception& error) {
      answer = error.what();
    }
    std::puts(answer.c_str());
    std::fflush(stdout);
    if (answer != "ok") return 1;
  }
}
