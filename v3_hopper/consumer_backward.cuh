// A consumer warpgroup of the backward pass: what it knows about its place, its registers, and the
// verbs of a step.
#pragma once

#include "v3_hopper/gemm_backward.cuh"
#include "v3_hopper/guard_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

// One consumer warpgroup: what it knows about its place, and the verbs of the loop.
template <class Traits>
struct KeyConsumer {
  static constexpr int kThreads = Traits::kConsumers * kWarpgroup;
  using Element = typename Traits::Element;

  typename Traits::Shared& shared;
  const BackwardParams& p;
  const Scratch& scratch;
  const KeyTile& tile;
  const Sequence& sequence;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0) - 1;  // uniform
  const int key = Traits::kKeysPerWarpgroup * warpgroup;      // of this warpgroup, in the tile
  const int first_key = tile.block * Traits::kBlockKV + key;  // and in the sequence

  // This warp has read, or filled, what the barrier stands for.
  __device__ __forceinline__ void arrive(Barrier& barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }
  __device__ __forceinline__ Position position(int row) const {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kWarpgroup / 32;
    return {first_key + 16 * warp + lane / 4, row + lane % 4 * 2};
  }
  __device__ __forceinline__ int column() const { return threadIdx.x % 4 * 2; }

  // Some of these rows do not see some key of the sequence here, or, behind its end, its last.
  __device__ __forceinline__ bool masked(int row) const {
    const int from = min(first_key, sequence.seqlen_k - 1);
    const int to = min(first_key + 64, sequence.seqlen_k) - 1;
    return from < row + Traits::kBlockQ - 1 + sequence.first || to > row + sequence.last;
  }
  // The sequence ends before these keys do.
  __device__ __forceinline__ bool ends() const { return first_key + 64 > sequence.seqlen_k; }

  // Keys that are not finite become zero, before dQ spreads them to rows that do not see them.
  __device__ __forceinline__ void remove_poison(int slot) const {
    int first = 0;
    asm volatile("" : "+r"(first));  // else every step prepares for it
    remove_non_finite(shared.k, first, Traits::kBlockKV, kWarpgroup, shared.poison);
    named_sync(kWarpgroupDone + warpgroup, kWarpgroup);              // all keys are finite
    if (threadIdx.x == 2 * kWarpgroup) shared.suspicious[slot] = 0;  // the second has seen it too
  }
  // The last time, when nobody has a turn any more.
  __device__ __forceinline__ void remove_last_poison() const {
    remove_non_finite(shared.k, key, 64, kWarpgroup, shared.poison);
    named_sync(kKeysRead, kThreads);
  }
  // The products of a step belong together: warpgroups issue them in turn.
  __device__ __forceinline__ void take_turn() const {
    named_sync(kProductTurn + warpgroup, kThreads);
  }
  __device__ __forceinline__ void give_turn() const {
    named_arrive(kProductTurn + 1 - warpgroup, kThreads);
  }

  // Rounds a gradient into this warpgroup's rows of a tile that nobody reads any more.
  template <class Tile, int N>
  __device__ __forceinline__ void stage(Tile& tile, const float (&d)[N], float scale) const {
    stage_gradient(tile, key, d, scale);
  }
  // Copies them to their place in dK or dV.
  template <class Tile>
  __device__ __forceinline__ void store(const Tile& staged, const View& view, int columns) const {
    const Sequence again(p, tile.batch);  // cheaper than registers that live through the loop
    auto* target = static_cast<Element*>(view.data) + tile.batch * view.batch +
                   tile.head_kv * view.head + (again.row_k + first_key) * view.row;
    store_gradient(staged, key, target, view.row, again.seqlen_k - first_key, columns);
  }
};

// The registers of a consumer. Only dK's product is in flight between two steps.
template <class Traits>
struct Fragments {
  float dk[Traits::kHeadDim / 2];  // (64 keys, dim)
  float dv[Traits::kHeadDim / 2];
  float s[Traits::kBlockQ / 2];  // (64 keys, 64 rows): S, then P
  float dp[Traits::kBlockQ / 2];
  float dq[Traits::kColumnsDQ / 2];    // (64 rows, this warpgroup's columns)
  uint32_t p16[Traits::kBlockQ / 4];   // P^T as an operand
  uint32_t ds16[Traits::kBlockQ / 4];  // dS^T
  int row;                             // of S
  bool masked;                         // P
  bool suspicious;                     // a masked score was not finite
};

// Where a step finds its tiles.
template <class Traits>
struct Rings {
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStagesDO> dout;
  Ring<Traits::kStagesDS> ds;
  uint32_t handed_over = 0;  // parity of dQ's place
};

// S^T of a step starts at -LSE,
template <class Traits>
__device__ __forceinline__ void start_scores(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                             const Ring<Traits::kStagesQ>& q) {
  auto& shared = self.shared;
  shared.q_full[q.slot].wait(q.parity);
  r.row = shared.row[q.slot];
  if constexpr (Traits::kSoftcap) {
#pragma unroll
    for (float& x : r.s) x = 0.0f;
  } else {
    start(r.s, shared.lse[q.slot] + self.column());
  }
  pin(r.s);
}

// and is issued.
template <class Traits>
__device__ __forceinline__ void issue_scores(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                             const Ring<Traits::kStagesQ>& q) {
  int key = self.key;
  asm volatile("" : "+r"(key));  // else descriptors live through the loop
  wgmma_begin();
  gemm_scores<Traits::kHeadDim, Traits::kColumnsDQ>(r.s, self.shared.k, key, self.shared.q[q.slot],
                                                    !Traits::kSoftcap);
  wgmma_commit();
}

// S^T -> P^T, with the mask where the block needs one.
template <class Traits>
__device__ __forceinline__ void find_probabilities(const KeyConsumer<Traits>& self,
                                                   Fragments<Traits>& r, const Exponent& exponent,
                                                   int slot) {
  pin(r.s);
  r.masked = self.masked(r.row);
  r.suspicious = r.masked && hides_non_finite(r.s, self.sequence, self.position(r.row));
  if constexpr (Traits::kSoftcap) cap_scores(r.s, exponent);
  if (r.masked) {
    mask(r.s, self.sequence, self.position(r.row), exponent.hidden());
  } else if (self.ends()) {
    mask_end(r.s, self.sequence, self.position(r.row), exponent.hidden());
  }
  float p[Traits::kBlockQ / 2];
  probabilities<Traits::kSoftcap>(r.s, p, self.shared.lse[slot] + self.column(), exponent.scale);
  round_operand<typename Traits::Element>(r.p16, p);
  pin(r.s);
  pin(r.p16);
}

// dP^T of a step starts at -delta, and is issued.
template <class Traits>
__device__ __forceinline__ void start_dp(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                         const Ring<Traits::kStagesDO>& dout) {
  auto& shared = self.shared;
  shared.dout_full[dout.slot].wait(dout.parity);
  start(r.dp, shared.delta[dout.slot] + self.column());
  pin(r.dp);
}
template <class Traits>
__device__ __forceinline__ void issue_dp(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                         const Ring<Traits::kStagesDO>& dout) {
  auto& shared = self.shared;
  int key = self.key;
  asm volatile("" : "+r"(key));
  wgmma_begin();
  gemm_scores<Traits::kHeadDim>(r.dp, shared.v, key, shared.dout[dout.slot], true);
  wgmma_commit();
}

// dP^T -> dS^T.
template <class Traits>
__device__ __forceinline__ void find_score_gradient(const KeyConsumer<Traits>& self,
                                                    Fragments<Traits>& r, int slot) {
  if (r.masked) mask_gradient(r.dp, r.s);
  score_gradient(r.dp, r.s);
  round_operand<typename Traits::Element>(r.ds16, r.dp);
  if (r.suspicious) self.shared.suspicious[slot] = 1;
}

// All keys' dQ reads dS from shared memory, once it is fenced.
template <class Traits>
__device__ __forceinline__ void store_score_gradient(const KeyConsumer<Traits>& self,
                                                     const Fragments<Traits>& r, int slot) {
  const int warp = threadIdx.x / 32 % 4;
  store_fragment(shared_address(self.shared.ds[slot][self.key + 16 * warp]), 0, r.ds16);
}

// Issues dQ of the block in this slot of dS.
template <class Traits>
__device__ __forceinline__ void issue_dq(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                         int slot) {
  auto& shared = self.shared;
#pragma unroll
  for (float& x : r.dq) x = 0.0f;  // else its registers are held from step to step
  wgmma_begin();
  gemm_dq(r.dq, shared.ds[slot], shared.k[self.warpgroup]);
  wgmma_commit();
}

// dQ, computed, goes where the copy engine adds it to the sums in L2 from.
template <class Traits>
__device__ __forceinline__ void hand_over_dq(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                             uint32_t& parity) {
  auto& shared = self.shared;
  shared.dq_free[self.warpgroup].wait(parity ^ 1);
  parity ^= 1;
  stage_dq(shared.dq[self.warpgroup], r.dq);
  fence_async_proxy();
  self.arrive(shared.dq_full[self.warpgroup]);
}

// A gradient leaves by way of this warpgroup's rows of V, which nobody reads any more.
template <class Traits, int N>
__device__ __forceinline__ void store_by_v(const KeyConsumer<Traits>& self, float (&d)[N],
                                           float scale, const View& view, int columns) {
  int mine = self.key - self.first_key + self.position(0).key;
  asm volatile("" : "+r"(mine));  // else every step prepares for it
  spoil(d, self.shared.poison, mine);
  self.stage(self.shared.v, d, scale);
  named_sync(kWarpgroupDone + self.warpgroup, kWarpgroup);  // all four warps have staged
  self.store(self.shared.v, view, columns);
}

}  // namespace flash::v3
