// The memory layout of the instances of a pair (bag, class): maps, padded and packed bags, any strides.
#pragma once

#include <cstdint>
#include <vector>

namespace sgl {

// One dimension of the instances of a bag: its size, and its strides in the logits, the mask and the gradient.
struct Dimension {
  int64_t size, logits, mask, grad;
};

struct Layout {
  int64_t bags = 0, classes = 0;
  // strides from bag to bag (packed: from row to row) and from class to class
  int64_t logits_bag = 0, logits_class = 0, mask_bag = 0, grad_bag = 0, grad_class = 0;
  std::vector<Dimension> dimensions;  // dense: outermost first, at least one; packed: one, its size set per bag
  std::vector<int64_t> starts;  // packed: N + 1 offsets, clamped into the logits; empty for dense bags
  int64_t longest = 0;  // number of instances of the largest bag

  bool packed() const { return !starts.empty(); }

  // Whether the classes of an instance are adjacent in memory and its neighbours are not: packed bags, channels_last.
  bool classes_inside() const { return logits_class == 1 && grad_class <= 1 && dimensions.back().logits != 1; }
};

// Merges neighbouring dimensions that have a common stride, and drops dimensions of size 1. A contiguous map becomes
// one dimension.
inline std::vector<Dimension> collapse(const std::vector<Dimension>& all) {
  std::vector<Dimension> kept;
  for (const Dimension& d : all) {
    if (d.size == 1) continue;
    if (!kept.empty()) {
      Dimension& outer = kept.back();
      if (outer.logits == d.size * d.logits && outer.mask == d.size * d.mask && outer.grad == d.size * d.grad) {
        outer = {outer.size * d.size, d.logits, d.mask, d.grad};
        continue;
      }
    }
    kept.push_back(d);
  }
  if (kept.empty()) kept.push_back({1, 1, 1, 1});
  return kept;
}

// Counts pairs, with the bag and the class of each, without a division per pair.
struct PairIndex {
  int64_t pair, bag = 0, cls = 0;

  PairIndex(int64_t first, int64_t number_of_classes) : pair(first), classes(number_of_classes) {
    if (classes > 0) {
      bag = first / classes;
      cls = first % classes;
    }
  }

  void next() {
    ++pair;
    if (++cls == classes) {
      cls = 0;
      ++bag;
    }
  }

 private:
  int64_t classes;
};

// The instances of one pair.
struct Instances {
  const Dimension* dimensions;
  int count;  // number of dimensions
  int64_t inner;  // size of the last dimension
  int64_t logits, mask, grad;  // index of the first instance in each tensor
  int64_t positions;  // number of instances including padding
};

inline Instances instances_of(const Layout& layout, int64_t bag, int64_t cls) {
  Instances r;
  r.dimensions = layout.dimensions.data();
  r.count = static_cast<int>(layout.dimensions.size());
  const int64_t first = layout.packed() ? layout.starts[bag] : bag;
  r.logits = first * layout.logits_bag + cls * layout.logits_class;
  r.mask = first * layout.mask_bag;
  r.grad = first * layout.grad_bag + cls * layout.grad_class;
  if (layout.packed()) {
    r.inner = r.positions = layout.starts[bag + 1] - first;
  } else {
    r.inner = layout.dimensions.back().size;
    r.positions = layout.longest;
  }
  return r;
}

// Iterates over the runs along the last dimension, in row-major order of the instances.
class Runs {
 public:
  explicit Runs(const Instances& r)
      : logits(r.logits), mask(r.mask), grad(r.grad), instances_(r), done_(r.positions == 0) {
    for (int d = 0; d < r.count - 1; ++d) index_[d] = 0;  // not all 64: that takes longer than a short run
  }

  bool done() const { return done_; }

  void next() {
    for (int d = instances_.count - 2; d >= 0; --d) {
      const Dimension& dim = instances_.dimensions[d];
      logits += dim.logits;
      mask += dim.mask;
      grad += dim.grad;
      if (++index_[d] < dim.size) return;
      logits -= dim.size * dim.logits;
      mask -= dim.size * dim.mask;
      grad -= dim.size * dim.grad;
      index_[d] = 0;
    }
    done_ = true;
  }

  int64_t logits, mask, grad;  // index of the start of the run

 private:
  const Instances& instances_;
  bool done_;
  int64_t index_[64];  // torch has at most 64 dimensions
};

}  // namespace sgl
