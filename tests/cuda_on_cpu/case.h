// One test case, as the input of both the CUDA kernels and the CPU kernels.
#pragma once

#include <cstdint>
#include <vector>

struct Case {
  int type;  // of the logits: 0 float, 1 double, 2 float16, 3 bfloat16, as in csrc/half.h
  const void* logits;
  const bool* mask;
  const void *class_weight, *pos_weight;  // null: none; double if the logits are double, else float
  std::vector<int8_t> labels;  // 0 unknown, 1 negative, 2 positive
  int64_t bags, classes;
  int64_t positions;  // in a dense bag, or in all packed bags together
  int64_t logits_bag, logits_class, mask_bag;  // strides; the gradient has the strides of the logits
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
  void* grad;  // the caller allocates it, as large as the logits; the kernels fill it
};

void run_on_cpu(const Case& c, Result& result);
