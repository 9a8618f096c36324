// A problem as plain numbers and pointers, which the kernels of both devices can be given.
#pragma once

#include <cstdint>
#include <vector>

struct Case {
  int type;  // float, double, float16, bfloat16, as in csrc/half.h
  const void* logits;
  const bool* mask;
  const void *class_weight, *pos_weight;  // float, or double for double; may be null
  std::vector<int8_t> labels;  // 0 unknown, 1 negative, 2 positive
  int64_t bags, classes, positions;  // of a dense bag, or of all packed ones
  int64_t logits_bag, logits_class, mask_bag;  // steps; the gradient's are the logits'
  int dimensions;
  int64_t size[2], logits_step[2], mask_step[2];
  std::vector<int64_t> offsets;  // empty: dense
  double delta_l, lam, mask_weight, pooling_parameter;
  int64_t pooling;
  bool per_bag, rescale, weighted;
  int64_t loss;
  double grad_output;
};

struct Result {
  double loss[4];  // total, bag, instance, mask
  void* grad;  // as large as the logits, filled
};

void run_on_cpu(const Case& c, Result& result);
