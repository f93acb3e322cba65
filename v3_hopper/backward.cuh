// The backward pass: a CTA keeps its keys' K, V, dK and dV, and streams every query block past
// them.
//
// Scores are computed transposed (S^T = K Q^T), so P^T and dS^T go from accumulators straight into
// the products of dV and dK; dQ leaves for L2 from registers. Products stay queued on the tensor
// cores while a warpgroup does arithmetic:
//   tensor cores:  dP(i) dV(i) | S(i+1) dQ(i) dK(i) | dP(i+1) dV(i+1) | ...
//   warpgroup:          dS(i)  |    P(i+1), add dQ(i)    |     dS(i+1)
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

// One block of query rows, from P to dQ; and, unless it is the last, S and P of the next.
template <class Traits, bool kLast>
__device__ __forceinline__ void take_step(const KeyConsumer<Traits>& self, Fragments<Traits>& r,
                                          const Exponent& exponent, Rings<Traits>& ring,
                                          bool first) {
  auto& shared = self.shared;
  const int slot_q = ring.q.slot;
  const int slot_do = ring.dout.slot;
  const int slot = ring.ds.slot;
  start_dp(self, r, ring.dout);
  issue_dp(self, r, ring.dout);
  pin(r.p16);
  wgmma_begin();
  gemm_gradient(r.dv, r.p16, shared.dout[slot_do]);
  wgmma_commit();
  wgmma_wait<1>();  // dP is there, and the dK before it
  pin(r.dp);
  if (!first) self.arrive(shared.q_free[(slot_q + Traits::kStagesQ - 1) % Traits::kStagesQ]);
  find_score_gradient(self, r, slot);
  ring.q.advance();
  ring.dout.advance();
  ring.ds.advance();
  if constexpr (!kLast) {
    start_scores(self, r, ring.q);
    issue_scores(self, r, ring.q);
  }
  named_sync(kScoreGradientStored, KeyConsumer<Traits>::kThreads);  // dS of all keys is there
  if (shared.suspicious[slot]) self.remove_poison(slot);
  wgmma_begin();
  gemm_dq(r.dq, shared.ds[slot], shared.k[self.warpgroup]);
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

// One block of query rows where nothing is masked, S and dP first: dS and dQ are written to shared
// memory while products run that take one operand from registers, which leaves it half its time.
template <class Traits, bool kLast>
__device__ __forceinline__ void take_full_step(const KeyConsumer<Traits>& self,
                                               Fragments<Traits>& r, const Exponent& exponent,
                                               Rings<Traits>& ring) {
  auto& shared = self.shared;
  const int slot_q = ring.q.slot;
  const int slot_do = ring.dout.slot;
  const int slot = ring.ds.slot;
  start_scores(self, r, ring.q);
  start_dp(self, r, ring.dout);
  issue_scores(self, r, ring.q);
  issue_dp(self, r, ring.dout);
  wgmma_wait<1>();  // S is there
  pin(r.s);
  find_probabilities(self, r, exponent, slot_q, slot);
  wgmma_wait<0>();  // dP is there
  pin(r.dp);
  find_score_gradient(self, r, slot);
  ring.q.advance();
  ring.dout.advance();
  ring.ds.advance();
  pin(r.p16);
  wgmma_begin();
  gemm_gradient(r.dv, r.p16, shared.dout[slot_do]);
  wgmma_commit();
  named_sync(kScoreGradientStored, KeyConsumer<Traits>::kThreads);  // dS of all keys is there
  if (shared.suspicious[slot]) self.remove_poison(slot);
  wgmma_begin();
  gemm_dq(r.dq, shared.ds[slot], shared.k[self.warpgroup]);
  wgmma_commit();
  wgmma_wait<1>();  // dV is there
  pin(r.p16);
  self.arrive(shared.dout_free[slot_do]);
  pin(r.ds16);
  wgmma_begin();
  gemm_gradient(r.dk, r.ds16, shared.q[slot_q]);
  wgmma_commit();
  hand_over_dq<Traits>(self, r, slot);
  if constexpr (kLast) {
    pin(r.dv);
    store_by_v(self, r.dv, 1.0f, self.p.dv, self.p.head_dim_v);
  }
  wgmma_wait<0>();  // dK is there
  pin(r.ds16);
  pin(r.dk);
  self.arrive(shared.q_free[slot_q]);
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
    if constexpr (Traits::kFull) {
      shared.v_full.wait(0);
      for (int i = 0; i < steps - 1; ++i) take_full_step<Traits, false>(self, r, exponent, ring);
      take_full_step<Traits, true>(self, r, exponent, ring);
    } else {
      start_scores(self, r, ring.q);
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
    }
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
  const int share = Traits::kFull ? int(blockIdx.x) - scratch.tiles : -1;  // of dQ, to be rounded
  const KeyTile tile(p, scratch, share >= 0 ? 0 : int(blockIdx.x));
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
