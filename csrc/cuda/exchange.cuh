// Another way to the gradient, which is not shipped but measured beside the shipped one: forward also writes the gradient,
// for grad_output = 1, and backward scales it. All blocks are resident. They exchange the counts of the batch across the
// grid, and then go through their bag-classes again, those that have stayed in shared memory and those that have not.
//
// float32 and dense bags only, which is what there is to decide about: half gradients would be rounded twice.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace sgl {
namespace cuda {

// What is left of the 48 KB that need no opting in.
constexpr unsigned kKeptPacks = 2048;

struct ExchangeShared {
  Pack<float> kept[kKeptPacks];
  ForwardShared forward;
};

// The row of a round: a copy in shared memory where this group's part of it has room. Each thread copies what no other
// thread is going to read (rows.cuh), so that nobody waits.
class KeptRows {
 public:
  SGL_DEVICE KeptRows(const Call& call, Pack<float>* kept) : call_(call), kept_(kept) {}

  SGL_DEVICE Row<float> row(const Group& group, unsigned round, const Place& place, bool copies) const {
    constexpr int kSize = Pack<float>::kSize;
    Row<float> row(call_, place);
    const Rows& rows = call_.rows;
    const unsigned packs = (row.n + kSize - 1) / kSize, room = kKeptPacks / group.count();
    if (rows.dimensions != 1 || rows.dimension[0].logits != 1 || row.mask != nullptr || (round + 1) * packs > room)
      return row;
    Pack<float>* const to = kept_ + group.index() * room + round * packs;
    if (copies) {
      for (int p = group.rank(); p * kSize < row.n; p += group.size()) {
        if (p < row.whole_packs) {
          to[p] = row.pack(p);
        } else {
          for (int v = 0; v < kSize && p * kSize + v < row.n; ++v) to[p].x[v] = row.x[p * kSize + v];
        }
      }
    }
    row.x = to->x;
    row.whole_packs = row.n / kSize;
    return row;
  }

 private:
  const Call& call_;
  Pack<float>* const kept_;
};

// The last block to arrive runs `last`, and then everybody goes on and sees what it wrote. `arrived` counts up to twice
// the blocks, those that come and those that go, and is 0 again.
template <class Last>
SGL_DEVICE void exchange(uint32_t* arrived, bool& is_last, const Last& last) {
  const uint32_t end = 2 * gridDim.x - 1;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(arrived, end) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) last();
  if (threadIdx.x == 0) {
    __threadfence();
    // the last to arrive is the first to go
    while (!is_last && atomicAdd(arrived, 0u) <= gridDim.x) {
    }
    __threadfence();
    atomicInc(arrived, end);
  }
  __syncthreads();
}

__global__ void __maxnreg__(kRegisters<float>) exchange_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Forward forward, float* const grad,
    const bool warp_per_bag_class) {
  SGL_SHARED(ExchangeShared, shared);
  const KeptRows rows(call, shared.kept);
  const auto row_of = [&](const Group& group, unsigned round, unsigned bag, unsigned cls) {
    return rows.row(group, round, place_of(call.rows, bag, cls), true);
  };
  const BatchSums batch = sums_of_block<float, float>(call, forward, warp_per_bag_class, shared.forward, row_of);
  if (threadIdx.x == 0) forward.of_block[blockIdx.x] = batch;
  exchange(forward.blocks_done, shared.forward.is_last, [&] { save_batch<float>(call, forward, shared.forward); });

  const float* const saved = static_cast<const float*>(forward.saved);
  const float* const shares = saved + int64_t{call.rows.units} * kColumns;
  const Group group(warp_per_bag_class, shared.forward.group);
  unsigned rounds = 0;
  while (pair_of(group, rounds) < call.rows.units) ++rounds;
  // backwards: what was read last is in the L2 cache
  for (unsigned round = rounds; round-- > 0;) {
    const unsigned unit = pair_of(group, round);
    const unsigned bag = unit / call.rows.classes, cls = unit - bag * call.rows.classes;
    const Place place = place_of(call.rows, bag, cls);
    write_row(
        call, rows.row(group, round, place, false), grad + place.grad, saved + int64_t{unit} * kColumns, shares, 1.0f,
        cls, group.rank(), group.size());
  }
}

// In place. What is 0 stays 0, whatever grad_output is: it may be of a bag-class that takes no part.
__global__ void scale_kernel(float* const grad, const int64_t n, const float* const grad_output) {
  const float scale = *grad_output;
  if (scale == 1.0f) return;
  constexpr int kSize = Pack<float>::kSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, packs = lies_on_16_bytes(grad) ? n / kSize : 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto scaled = [&](float x) { return x == 0.0f ? x : x * scale; };
  for (int64_t p = first; p < packs; p += step) {
    Pack<float> pack = reinterpret_cast<Pack<float>*>(grad)[p];
#pragma unroll
    for (int v = 0; v < kSize; ++v) pack.x[v] = scaled(pack.x[v]);
    reinterpret_cast<Pack<float>*>(grad)[p] = pack;
  }
  for (int64_t i = packs * kSize + first; i < n; i += step) grad[i] = scaled(grad[i]);
}

}  // namespace cuda
}  // namespace sgl
