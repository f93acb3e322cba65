// The backward pass: a CTA keeps its keys' K, V, dK and dV, and streams every query block past
// them.
//
// Scores are computed transposed (S^T = K Q^T), so P^T and dS^T go from accumulators straight into
// the products of dV and dK; dQ leaves for L2 from registers. Products stay queued on the tensor
// cores while a warpgroup does arithmetic:
//   tensor cores:  dP(i) dV(i) | S(i+1) dQ(i) dK(i) | dP(i+1) dV(i+1) | ...
//   warpgroup:          dS(i)  |    P(i+1), add dQ(i)    |     dS(i+1)
#pragma once

#include "v3_hopper/gemm_backward.cuh"
#include "v3_hopper/guard_backward.cuh"
#include "v3_hopper/load_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::Shared& shared) {
  shared.k_full.init(1);
  shared.v_full.init(1);
  shared.landed.init(1);
  constexpr int kWarps = Traits::kConsumers * 4;  // each arrives once
  for (int i = 0; i < Traits::kStagesQ; ++i) {
    shared.q_full[i].init(1);
    shared.q_free[i].init(kWarps);
  }
  for (int i = 0; i < Traits::kStagesDO; ++i) {
    shared.dout_full[i].init(1);
    shared.dout_free[i].init(kWarps);
  }
  fence_barrier_init();
}

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
  const int64_t block0 = first_block(p, sequence, tile.batch);

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

  __device__ __forceinline__ bool masked(int row) const {
    return !sequence.all_visible(row, Traits::kBlockQ, first_key, 64);
  }

  // Keys that are not finite become zero, before dQ spreads them to rows that do not see them.
  __device__ __forceinline__ void remove_poison(int slot) const {
    int first = key;
    asm volatile("" : "+r"(first));  // else every step prepares for it
    remove_non_finite(shared.k, first, 64, kWarpgroup, shared.poison);
    named_sync(kKeysRead, kThreads);  // all keys are finite, and all have seen the sign
    if (threadIdx.x == kWarpgroup) shared.suspicious[slot] = 0;
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
};

// Where a step finds its tiles.
template <class Traits>
struct Rings {
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStagesDO> dout;
  Ring<2> ds;
};

// S^T of a step is issued, from -LSE on.
template <class Traits>
__device__ __forceinline__ void issue_scores(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                             const Ring<Traits::kStagesQ>& q) {
  constexpr bool kStarted = !Traits::kSoftcap;
  auto& shared = self.shared;
  shared.q_full[q.slot].wait(q.parity);
  r.row = shared.row[q.slot];
  if constexpr (kStarted) start(r.s, shared.lse[q.slot] + self.column());
  pin(r.s);
  wgmma_begin();
  gemm_scores<Traits::kHeadDim>(r.s, shared.k, self.key, shared.q[q.slot], kStarted);
  wgmma_commit();
}

// S^T -> P^T, with the mask where the block needs one.
template <class Traits>
__device__ __forceinline__ void find_probabilities(const KeyConsumer<Traits>& self,
                                                   Fragments<Traits>& r, const Exponent& exponent,
                                                   int slot, int slot_ds) {
  pin(r.s);
  r.masked = self.masked(r.row);
  if (r.masked && hides_non_finite(r.s, self.sequence, self.position(r.row))) {
    self.shared.suspicious[slot_ds] = 1;
  }
  if constexpr (Traits::kSoftcap) cap_scores(r.s, exponent);
  if (r.masked) mask(r.s, self.sequence, self.position(r.row), exponent.hidden());
  float p[Traits::kBlockQ / 2];
  probabilities<Traits::kSoftcap>(r.s, p, self.shared.lse[slot] + self.column(), exponent.scale);
  round_operand<typename Traits::Element>(r.p16, p);
  pin(r.s);
  pin(r.p16);
}

// dP^T of a step is issued, from -delta on.
template <class Traits>
__device__ __forceinline__ void issue_dp(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                         const Ring<Traits::kStagesDO>& dout) {
  auto& shared = self.shared;
  shared.dout_full[dout.slot].wait(dout.parity);
  start(r.dp, shared.delta[dout.slot] + self.column());
  pin(r.dp);
  wgmma_begin();
  gemm_scores<Traits::kHeadDim>(r.dp, shared.v, self.key, shared.dout[dout.slot], true);
  wgmma_commit();
}

// dQ goes where the copy engine adds it to the sums in L2 from.
template <class Traits>
__device__ __forceinline__ void hand_over_dq(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                             uint32_t parity) {
  auto& shared = self.shared;
  shared.dq_free[self.warpgroup].wait(parity ^ 1);
  wgmma_wait<1>();  // dQ is there
  pin(r.dq);
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

// One block of query rows, from P to dQ; and, unless it is the last, S and P of the next.
template <class Traits, bool kLast>
__device__ __forceinline__ void take_step(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                          const Exponent& exponent, Rings<Traits>& ring,
                                          bool first) {
  auto& shared = self.shared;
  const int slot_q = ring.q.slot;
  const int slot_do = ring.dout.slot;
  const int slot = ring.ds.slot;
  issue_dp(self, r, ring.dout);
  pin(r.p16);
  wgmma_begin();
  gemm_gradient(r.dv, r.p16, shared.dout[slot_do]);
  wgmma_commit();
  wgmma_wait<1>();  // dP is there, and the dK before it
  pin(r.dp);
  if (!first) self.arrive(shared.q_free[(slot_q + Traits::kStagesQ - 1) % Traits::kStagesQ]);
  if (r.masked) mask_gradient(r.dp, r.s);
  score_gradient(r.dp, r.s);
  round_operand<typename Traits::Element>(r.ds16, r.dp);

  const int warp = threadIdx.x / 32 % 4;
  store_fragment(shared_address(shared.ds[slot][self.key + 16 * warp]), 0, r.ds16);
  fence_async_proxy();
  ring.q.advance();
  ring.dout.advance();
  ring.ds.advance();
  if constexpr (!kLast) issue_scores(self, r, ring.q);
  named_sync(kScoreGradientStored, KeyConsumer<Traits>::kThreads);  // dS of all keys is there
  if (shared.suspicious[slot]) self.remove_poison(slot);
  wgmma_begin();
  gemm_dq(r.dq, shared.ds[slot], shared.k, Traits::kColumnsDQ * self.warpgroup);
  wgmma_commit();
  gemm_dk(r.dk, shared.ds[slot], self.key, shared.q[slot_q]);
  wgmma_commit();
  if constexpr (!kLast) {
    wgmma_wait<2>();  // S is there, and the dV before it
    pin(r.p16);       // whose operand may change
    self.arrive(shared.dout_free[slot_do]);
    find_probabilities(self, r, exponent, ring.q.slot, ring.ds.slot);
  } else {
    wgmma_wait<2>();  // dV is there, and leaves while dQ and dK are computed
    pin(r.p16);
    pin(r.dv);
    store_by_v(self, r.dv, 1.0f, self.p.dv, self.p.head_dim_v);
  }
  hand_over_dq<Traits>(self, r, slot);
}

template <class Traits>
__device__ __forceinline__ void consume(typename Traits::Shared& shared, const BackwardParams& p,
                                        const Scratch& scratch, const KeyTile& tile,
                                        const Sequence& sequence, int steps) {
  const KeyConsumer<Traits> self{shared, p, scratch, tile, sequence};
  const Exponent exponent(p);
  Fragments<Traits> r;
  for (int i = 0; i < Traits::kHeadDim / 2; ++i) r.dk[i] = r.dv[i] = 0.0f;
  pin(r.dk);
  pin(r.dv);
  if (steps > 0) {
    shared.k_full.wait(0);
    Rings<Traits> ring;
    issue_scores(self, r, ring.q);
    shared.v_full.wait(0);
    wgmma_wait<0>();
    pin(r.s);
    find_probabilities(self, r, exponent, 0, 0);
    for (int i = 0; i < steps - 1; ++i) {
      take_step<Traits, false>(self, r, exponent, ring, i == 0);
    }
    take_step<Traits, true>(self, r, exponent, ring, steps == 1);
    wgmma_wait<0>();
    pin(r.dk);
  } else {
    store_by_v(self, r.dv, 1.0f, p.dv, p.head_dim_v);
  }
  named_sync(kWarpgroupDone + self.warpgroup, kWarpgroup);  // all four warps have copied dV
  store_by_v(self, r.dk, p.scale, p.dk, p.head_dim);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads,
                             1) void backward(const __grid_constant__ BackwardParams p,
                                              const __grid_constant__ BackwardMaps maps,
                                              const __grid_constant__ Scratch scratch) {
  extern __shared__ uint8_t memory[];
  auto& shared = *align_shared<typename Traits::Shared>(memory);
  const KeyTile tile(p, scratch);
  const Sequence sequence(p, tile.batch);
  const int key = tile.block * Traits::kBlockKV;
  if (key >= sequence.seqlen_k) return;
  const RowSteps steps(p, tile, sequence.rows(key, Traits::kBlockKV));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kConsumers; ++i) {
      shared.dq_full[i].init(4);  // once per warp
      shared.dq_free[i].init(1);
    }
    for (uint32_t& bits : shared.poison) bits = 0;
    shared.suspicious[0] = shared.suspicious[1] = 0;
    init_barriers<Traits>(shared);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    shrink_registers<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
      produce<Traits>(shared, p, maps, scratch, tile, sequence, steps);
    } else if (warp <= Traits::kConsumers && elect_one()) {
      add_dq<Traits>(shared, p, scratch, tile, sequence, steps, warp - 1);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, p, scratch, tile, sequence, steps.count());
  }
}

}  // namespace flash::v3
