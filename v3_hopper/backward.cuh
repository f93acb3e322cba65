// The backward pass: a CTA keeps its keys' K, V, dK and dV, and streams every query block past
// them.
//
// Scores are computed transposed (S^T = K Q^T), so P^T and dS^T go from accumulators straight into
// the products of dV and dK; dQ leaves for L2 by way of shared memory. It takes the dS of both
// warpgroups, and is computed a step later, so that they need not meet: they issue products in
// turn, half a step apart, and what one of them computes lies beside the products of the other.
//   tensor cores:  dV(i) dK(i) dQ(i-1) S(i+1) dP(i+1)  | the other's         | dV(i+1) dK(i+1) ...
//   warpgroup:                       add dQ(i-1) | P(i+1)  dS(i+1) |
#pragma once

#include "v3_hopper/consumer_backward.cuh"
#include "v3_hopper/finish_backward.cuh"
#include "v3_hopper/load_backward.cuh"

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

// P and dP of a block, S of which is being computed. With softcap P has no registers to spare, and
// goes first.
template <class Traits>
__device__ __forceinline__ void meet_rows(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                          const Exponent& exponent, const Rings<Traits>& ring) {
  if constexpr (Traits::kSoftcap) {
    wgmma_wait<0>();  // S is there
    find_probabilities(self, r, exponent, ring.q.slot);
  }
  start_dp(self, r, ring.dout);
  issue_dp(self, r, ring.dout);
  if constexpr (!Traits::kSoftcap) {
    wgmma_wait<1>();
    find_probabilities(self, r, exponent, ring.q.slot);
  }
  wgmma_wait<0>();  // dP is there
  pin(r.dp);
}

// dS of a block and its part of dV and dK; dQ of the block before; and, unless this is the last, S,
// P and dP of the next.
template <class Traits, bool kLast>
__device__ __forceinline__ void take_step(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                          const Exponent& exponent, Rings<Traits>& ring,
                                          bool first) {
  auto& shared = self.shared;
  const int slot_q = ring.q.slot;
  const int slot_do = ring.dout.slot;
  const int slot_ds = ring.ds.slot;
  const int before = (slot_ds + Traits::kStagesDS - 1) % Traits::kStagesDS;
  find_score_gradient(self, r, slot_ds);
  ring.q.advance();
  ring.dout.advance();
  ring.ds.advance();
  if constexpr (kLast) {
    store_score_gradient(self, r, slot_ds);
    fence_async_proxy();
    if (self.warpgroup == 1) named_arrive(kScoreGradientStored, self.kThreads);
  }
  self.take_turn();
  pin(r.p16);
  pin(r.ds16);
  wgmma_begin();
  gemm_gradient(r.dv, r.p16, shared.dout[slot_do]);
  wgmma_commit();
  gemm_gradient(r.dk, r.ds16, shared.q[slot_q]);
  wgmma_commit();
  if constexpr (!kLast) store_score_gradient(self, r, slot_ds);  // beside the products
  wgmma_wait<Traits::kSoftcap ? 0 : 1>();                        // dV is there
  pin(r.p16);
  self.arrive(shared.dout_free[slot_do]);
  if constexpr (!kLast) start_scores(self, r, ring.q);
  if (!first && shared.suspicious[before]) self.remove_poison(before);
  issue_dq(self, r, before);  // in the first step of no block, and not used
  if constexpr (!kLast) {
    issue_scores(self, r, ring.q);
    fence_async_proxy();  // the other's dQ reads this dS after its next turn
    wgmma_wait<1>();      // dK and dQ are there
    self.give_turn();
  } else {
    if (self.warpgroup == 0) self.give_turn();
    wgmma_wait<0>();
    pin(r.dv);
    pin(r.dk);
  }
  pin(r.ds16);
  self.arrive(shared.q_free[slot_q]);
  pin(r.dq);
  if (!first) hand_over_dq(self, r, ring.handed_over);
  if constexpr (!kLast) meet_rows(self, r, exponent, ring);
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
    if (self.warpgroup == 1) self.take_turn();  // half a step behind the first
    start_scores(self, r, ring.q);
    issue_scores(self, r, ring.q);
    shared.v_full.wait(0);
    wgmma_wait<0>();
    pin(r.s);
    self.give_turn();
    meet_rows(self, r, exponent, ring);
    for (int i = 0; i < steps - 1; ++i) take_step<Traits, false>(self, r, exponent, ring, i == 0);
    take_step<Traits, true>(self, r, exponent, ring, steps == 1);
    store_by_v(self, r.dv, 1.0f, p.dv, p.head_dim_v);
    if (self.warpgroup == 0) named_sync(kScoreGradientStored, self.kThreads);
    const int last = (ring.ds.slot + Traits::kStagesDS - 1) % Traits::kStagesDS;
    if (shared.suspicious[last]) self.remove_last_poison();
    issue_dq(self, r, last);
    wgmma_wait<0>();
    pin(r.dq);
    hand_over_dq(self, r, ring.handed_over);
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
  if (threadIdx.x == 0) {
    for (const auto* map : {&maps.k, &maps.q, &maps.v, &maps.dout}) prefetch_map(*map);
  }
  const int share = int(blockIdx.x) - scratch.tiles;  // of dQ, to be rounded
  const auto tile = KeyTile::ordered(p, scratch, share >= 0 ? 0 : int(blockIdx.x));
  const Sequence sequence(p, tile.batch);
  const int key = tile.block * Traits::kBlockKV;
  if (share >= 0) {
    finish_dq<Traits>(p, scratch, share, memory);
    return;
  }
  if (key >= sequence.seqlen_k) return;
  const RowSteps steps(p, tile, sequence.rows(key, Traits::kBlockKV));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kConsumers; ++i) {
      shared.dq_full[i].init(4);  // once per warp
      shared.dq_free[i].init(1);
    }
    for (uint32_t& bits : shared.poison) bits = 0;
    for (int& sign : shared.suspicious) sign = 0;
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
