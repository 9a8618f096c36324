// The interface between the operators (ops.cpp, compiled with torch) and the kernels (launch.cu, compiled by nvcc,
// without torch).
#pragma once

#include "../batch.h"
#include "../half.h"
#include "../layout.h"

namespace sgl {
namespace cuda {

// Dimensions of instances that do not collapse into one another.
constexpr int kMaxDimensions = 8;

// A Layout that fits into a kernel's arguments. The kernel reads the offsets of packed bags on the device.
struct Rows {
  int64_t bags;
  uint32_t classes, units;  // units: pairs (bag, class)
  int64_t positions;  // of a dense bag: instances and padding together; packed: rows of all bags
  int64_t logits_bag, logits_class, mask_bag, grad_bag, grad_class;  // steps, as in Layout
  int dimensions;
  Dimension dimension[kMaxDimensions];
  const void* offsets;  // null: dense
  int64_t offsets_step;
  bool offsets_are_64_bit;
};

// Division of numbers below 2^31 by a number that a launch keeps: a product in place of some 20 instructions.
struct Divisor {
  uint32_t by, multiplier, shift;
};

inline Divisor divisor_of(uint32_t by) {
  by = by > 0 ? by : 1;  // no classes: nothing is divided
  uint32_t shift = 0;
  while (uint64_t{1} << shift < by) ++shift;
  return {by, static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1), shift};
}

SGL_HD uint32_t quotient_of(uint32_t n, const Divisor& d) {
  return (static_cast<uint32_t>((static_cast<uint64_t>(n) * d.multiplier) >> 32) + n) >> d.shift;
}

// The number of classes that neighbouring threads of a group process in backward. Packed bags and channels_last maps hold the
// classes of an instance side by side, so that neighbouring threads access neighbouring addresses.
SGL_HD uint32_t classes_across(const Rows& rows, uint32_t threads) {
  const bool side_by_side = rows.logits_class == 1 && rows.grad_class <= 1;  // 0 in forward
  if (!side_by_side || rows.classes < 2 || rows.dimension[rows.dimensions - 1].logits == 1) return 1;
  const uint32_t strips = (rows.classes + threads - 1) / threads;
  return (rows.classes + strips - 1) / strips;
}

// Labels of any dtype. Integers are 0 or other numbers; floating-point labels may be NaN.
struct Targets {
  const void* data;  // null: the bag logits are computed, for which no label is needed
  int64_t bag_step, class_step;
  int bytes;
  // The bits of a label except for the sign of a floating-point number, and the largest such bits that are no NaN.
  uint64_t magnitude, largest;
};

// `infinity`: its bits, of a floating-point number of t.bytes; 0 for integers
inline void set_label_bits(Targets& t, uint64_t infinity) {
  t.magnitude = infinity == 0 ? ~uint64_t{0} : (uint64_t{1} << (8 * t.bytes - 1)) - 1;
  t.largest = infinity == 0 ? ~uint64_t{0} : infinity;
}

// What forward and backward have in common.
struct Call {
  Type type;
  const void* logits;
  const bool* mask;  // null: every position is an instance
  const void* pos_weight;  // (C,) of the loss's type; null: 1
  Rows rows;
  Settings settings;
  bool is_simple;  // rows have one stride, and every position is an instance
  bool is_adjacent;  // simple, with stride 1
};

// From the other members
inline void set_form(Call& call) {
  call.is_simple = call.rows.dimensions == 1 && call.mask == nullptr;
  call.is_adjacent = call.is_simple && call.rows.dimension[0].logits == 1;
}

// What the first pass of a piece of a pair found.
struct PartialResult {
  uint64_t words[6];
};

struct Forward {
  Targets targets;
  const void* class_weight;  // like pos_weight
  void *total, *parts, *saved;  // of the loss's type
  void* bag_logits;  // one for each pair, of the loss's type; null: not wanted
  void* workspace;  // of workspace_bytes(), aligned to 8 bytes
  Batch* sums;  // null, or what gets the sums over the batch
  // set by launch_forward
  Batch* of_block;  // one for each block of the plan
  PartialResult* partial;  // one for each piece of a pair
  uint32_t* blocks_done;  // a counter that is 0 before and after the launch
};

struct Backward {
  const void *grad_output, *saved;  // of the loss's type
  void* grad;
  uint32_t grad_output_step;  // 1 if grad_output has a number for each pair, 0 if it has one for all
};

// How a call is divided among the multiprocessors of a GPU. Only the shape and the GPU decide it, and with it the order of
// the additions.
struct Plan {
  // 2^forward_bits threads of a block form a group: a warp or the block. Its 2^part_bits parts process a pair each.
  // Backward: 2^backward_bits threads process a pair: a part of a warp, a warp, or the block.
  int forward_bits, part_bits, backward_bits;
  // If piece_bits > 0, another launch of forward comes first: 2^piece_bits blocks of `first_threads` divide the pairs of a group,
  // which is the block and has 2^first_part_bits parts. Then part_bits has to be 0, and the group of forward the block, with at
  // least 2^piece_bits threads: they merge what the pieces of a pair gave.
  int piece_bits, first_part_bits, first_threads;
  int threads, forward_blocks, backward_blocks;
  int pieces;  // backward: work items of a pair, or of several pairs side by side
};

Plan plan_of(const Call& call, int multiprocessors);

int64_t workspace_bytes(const Call& call, const Plan& plan);

// How backward divides its work: an item is a piece of a strip of `across` classes, which lie side by side in memory, of a bag.
struct Tiling {
  Divisor across, strips, pieces;
  uint32_t lengthwise;  // threads of a group for each of these classes
  uint32_t items;
  uint32_t groups, item_step;  // groups in a block, and in the grid
  int group_bits;
  // The rest is for simple rows: every position is an instance, and they have one stride. Addresses take few instructions,
  // because these strides have 32 bits. Rows of larger strides are not simple.
  bool is_simple;
  uint32_t own_pooling;  // 1 << code of the pooling if it has a loop of its own, else 0
  bool in_packs;  // the instances of a thread are adjacent: it accesses packs of 16 bytes
  uint32_t skew_mask;  // this part of the index of the row's first number is where the row begins in the first pack
  int first_step, each, step;  // positions from thread to thread, between instances of a pack, and from pack to pack
  uint32_t logits_bag, logits_class, grad_bag, grad_class;  // as in Rows
  int logits_stride, grad_stride;  // in bytes, from position to position
  int64_t logits_each, grad_each, logits_step, grad_step;  // in bytes, as each and step
};

// These functions return an error code of the CUDA runtime, 0 for success.
int launch_forward(const Call& call, Forward forward, const Plan& plan, int device, void* stream);
int launch_backward(const Call& call, const Backward& backward, const Plan& plan, void* stream);
// The loss and the denominators, of the loss's type, from sums over several batches.
int launch_finalize(
    const Batch* sums, const Settings& settings, double times, bool is_double, void* total, void* parts,
    void* denominators, void* stream);
int multiprocessors_of(int device, int* count);

const char* error_text(int error);

}  // namespace cuda
}  // namespace sgl
