// The backward pass of narrow heads: as backward.cuh, but dQ has a warpgroup of its own, and a CTA
// takes one key tile after the other, up to 64 dims while the copy engine is a tile ahead.
//
// Consumers wait for nobody but the copy engine, and no product is waited for before it has had
// time:
//   tensor cores:  dV(i) S(i+1) | dP(i+1) dK(i) | dV(i+1) S(i+2) | ...     and dQ(i) on the side
//   warpgroup:     dS(i)        | P(i+1)        | dS(i+1)        | ...
#pragma once

#include "v3_hopper/finish_narrow.cuh"
#include "v3_hopper/gemm_backward.cuh"
#include "v3_hopper/guard_backward.cuh"
#include "v3_hopper/load_backward.cuh"
#include "v3_hopper/narrow_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

// The registers of a consumer.
template <class Traits>
struct NarrowFragments {
  float dk[Traits::kHeadDim / 2];  // (64 keys, dim)
  float dv[Traits::kHeadDim / 2];
  float s[Traits::kBlockQ / 2];  // (64 keys, 64 rows)
  float dp[Traits::kBlockQ / 2];
  uint32_t p16[Traits::kBlockQ / 4];   // P^T as an operand
  uint32_t ds16[Traits::kBlockQ / 4];  // dS^T
  int row;                             // of S
  bool masked;                         // P
};

// One consumer warpgroup on one key tile: what it knows about its place, and the verbs of the loop.
template <class Traits>
struct NarrowConsumer {
  using Element = typename Traits::Element;
  using Fragments = NarrowFragments<Traits>;

  typename Traits::Shared& shared;
  const BackwardParams& p;
  const Exponent& exponent;
  const KeyTile& tile;
  const Sequence& sequence;
  const int slot;                                             // of K and V
  const int warpgroup;                                        // 0, 1
  const int key = Traits::kKeysPerWarpgroup * warpgroup;      // in the tile
  const int first_key = tile.block * Traits::kBlockKV + key;  // and in the sequence

  __device__ __forceinline__ int column() const { return threadIdx.x % 4 * 2; }
  __device__ __forceinline__ int key_of_thread() const {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ void meet() const {
    named_sync(kWarpgroupDone + warpgroup, kWarpgroup);
  }

  // Keys that dQ would spread to rows that do not see them become zero.
  __device__ __forceinline__ void remove_poison() const {
    const Range rows = sequence.rows(first_key, 64);
    if (sequence.all_visible(rows.begin, rows.end - rows.begin, first_key, 64)) return;
    const bool found = find_non_finite(shared.k[slot], key, 64, kWarpgroup);
    if (!any_at(kWarpgroupDone + warpgroup, kWarpgroup, found)) return;
    remove_non_finite(shared.k[slot], key, 64, kWarpgroup, shared.poison);
    meet();  // these keys are zero now
  }
  // Their gradients become NaN.
  __device__ __forceinline__ void spoil_gradients(Fragments& r) const {
    spoil(r.dk, shared.poison, key + key_of_thread());
    spoil(r.dv, shared.poison, key + key_of_thread());
    meet();  // all four warps have read
    if (threadIdx.x % kWarpgroup < 2) shared.poison[2 * warpgroup + threadIdx.x % kWarpgroup] = 0;
  }

  // S^T starts at -LSE / scale, dP^T at -delta.
  __device__ __forceinline__ void start_scores(Fragments& r,
                                               const NarrowRings<Traits>& ring) const {
    const int at = ring.q.slot;
    shared.q_full[at].wait(ring.q.parity);
    r.row = shared.row[at];
    if constexpr (!Traits::kSoftcap) start(r.s, shared.lse[at] + column());
  }
  __device__ __forceinline__ void start_dp(Fragments& r, const NarrowRings<Traits>& ring) const {
    shared.dout_full[ring.dout.slot].wait(ring.dout.parity);
    start(r.dp, shared.delta[ring.dout.slot] + column());
  }
  __device__ __forceinline__ void issue_scores(Fragments& r,
                                               const NarrowRings<Traits>& ring) const {
    pin(r.s);
    wgmma_begin();
    gemm_scores<Traits::kHeadDim, Traits::kColumnsDQ>(r.s, shared.k[slot], key,
                                                      shared.q[ring.q.slot], !Traits::kSoftcap);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_dp(Fragments& r, const NarrowRings<Traits>& ring) const {
    pin(r.dp);
    wgmma_begin();
    gemm_scores<Traits::kHeadDim>(r.dp, shared.v[slot], key, shared.dout[ring.dout.slot], true);
    wgmma_commit();
  }

  // S^T -> P^T, with the mask where the block needs one.
  __device__ __forceinline__ void find_probabilities(Fragments& r, int at) const {
    pin(r.s);
    if constexpr (Traits::kSoftcap) cap_scores(r.s, exponent);
    r.masked = !sequence.all_visible(r.row, Traits::kBlockQ, first_key, 64);
    if (r.masked) {
      mask(r.s, sequence, {first_key + key_of_thread(), r.row + column()}, exponent.hidden());
    }
    float p[Traits::kBlockQ / 2];
    probabilities<Traits::kSoftcap>(r.s, p, shared.lse[at] + column(), exponent.scale);
    round_operand<Element>(r.p16, p);
    pin(r.s);
    pin(r.p16);
  }

  // The first S, dP and P of a tile.
  __device__ __forceinline__ void begin(Fragments& r, const NarrowRings<Traits>& ring) const {
    start_scores(r, ring);
    issue_scores(r, ring);
    wgmma_wait<0>();
    pin(r.s);
    start_dp(r, ring);
    issue_dp(r, ring);
    wgmma_wait<0>();
    pin(r.dp);
    find_probabilities(r, ring.q.slot);
    shared.ds_free[ring.ds.slot].wait(ring.ds.parity ^ 1);
  }

  // One block of query rows, from P to dS; and, unless it is the last, S, dP and P of the next.
  template <bool kLast>
  __device__ __forceinline__ void take_step(Fragments& r, NarrowRings<Traits>& ring) const {
    const int slot_q = ring.q.slot;
    const int slot_do = ring.dout.slot;
    const int slot_ds = ring.ds.slot;
    ring.advance();
    if (r.masked) mask_gradient(r.dp, r.s);
    score_gradient(r.dp, r.s);
    round_operand<Element>(r.ds16, r.dp);
    const int warp = threadIdx.x / 32 % 4;
    store_fragment(shared_address(shared.ds[slot_ds][key + 16 * warp]), 0, r.ds16);
    if constexpr (!kLast) start_scores(r, ring);
    if constexpr (!kLast && Traits::kTransposed) start_dp(r, ring);
    fence_async_proxy();
    arrive_warp(shared.ds_full[slot_ds]);
    if constexpr (!kLast) issue_scores(r, ring);
    pin(r.p16);
    pin(r.ds16);
    wgmma_begin();
    gemm_gradient(r.dv, r.p16, shared.dout[slot_do]);
    gemm_gradient(r.dk, r.ds16, shared.q[slot_q]);
    wgmma_commit();
    if constexpr (!kLast && Traits::kTransposed) {
      issue_dp(r, ring);
      wgmma_wait<1>();  // S is there, and the gradients
    } else {
      wgmma_wait<0>();
    }
    pin(r.p16);  // may change
    pin(r.ds16);
    arrive_warp(shared.dout_free[slot_do]);
    arrive_warp(shared.q_free[slot_q]);
    if constexpr (!kLast) {
      if constexpr (!Traits::kTransposed) {  // registers: only now
        start_dp(r, ring);
        issue_dp(r, ring);
      }
      find_probabilities(r, ring.q.slot);
      shared.ds_free[ring.ds.slot].wait(ring.ds.parity ^ 1);  // keeps ptxas from waiting earlier
      wgmma_wait<0>();
      pin(r.dp);
    }
  }

  // Copies 64 staged rows to their place in dK or dV.
  template <class Tile>
  __device__ __forceinline__ void store(const Tile& staged, const View& view, int columns) const {
    auto* target = static_cast<Element*>(view.data) + tile.batch * view.batch +
                   tile.head_kv * view.head + (sequence.row_k + first_key) * view.row;
    store_gradient(staged, key, target, view.row, sequence.seqlen_k - first_key, columns);
  }

  // dK and dV leave by way of the memory of K and V.
  __device__ __forceinline__ void store_gradients(Fragments& r, uint32_t parity) const {
    if constexpr (!Traits::kTransposed) spoil_gradients(r);
    shared.keys_read[slot].wait(parity);
    stage_gradient(shared.v[slot], key, r.dv, 1.0f);
    stage_gradient(shared.k[slot], key, r.dk, p.scale);
    meet();  // all four warps have staged
    store(shared.v[slot], p.dv, p.head_dim_v);
    store(shared.k[slot], p.dk, p.head_dim);
    fence_async_proxy();  // K and V of a later tile will be copied here
  }

  __device__ __forceinline__ void take_tile(NarrowRings<Traits>& ring, int steps,
                                            uint32_t parity) const {
    Fragments r;
    for (int i = 0; i < Traits::kHeadDim / 2; ++i) r.dk[i] = r.dv[i] = 0.0f;
    pin(r.dk);
    pin(r.dv);
    if (steps > 0) {
      shared.k_full[slot].wait(parity);
      if constexpr (!Traits::kTransposed) remove_poison();
      shared.v_full[slot].wait(parity);
      begin(r, ring);
      for (int i = 0; i < steps - 1; ++i) take_step<false>(r, ring);
      take_step<true>(r, ring);
      pin(r.dk);
      pin(r.dv);
    }
    store_gradients(r, parity);
  }
};

// The warpgroup that multiplies dQ: it keeps K transposed in registers.
template <class Traits>
__device__ __forceinline__ void multiply_dq(typename Traits::Shared& shared,
                                            NarrowRings<Traits>& ring, int steps, int slot,
                                            bool hides) {
  float dq[Traits::kBlockQ / 2];  // (dim, 64 rows)
  uint32_t k[Traits::kBlockKV / 4];
  if (steps > 0) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);  // K is there
    load_transposed(k, shared.k[slot]);
    if (hides) remove_non_finite<typename Traits::Element>(k);
    pin(k);
  }
  arrive_warp(shared.keys_read[slot]);
  for (int i = 0; i < steps; ++i) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);
    pin(dq);
    wgmma_begin();
    gemm_dq_transposed(dq, k, shared.ds[ring.ds.slot]);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
    arrive_warp(shared.ds_free[ring.ds.slot]);
    shared.dq_free[ring.dq.slot].wait(ring.dq.parity ^ 1);
    stage_dq(shared.dq[ring.dq.slot], dq);
    fence_async_proxy();
    arrive_warp(shared.dq_full[ring.dq.slot]);
    ring.ds.advance();
    ring.dq.advance();
  }
}

// The same of wider heads: K stays where it is, and half of the columns are computed at a time.
template <class Traits>
__device__ __forceinline__ void multiply_dq_halves(typename Traits::Shared& shared,
                                                   NarrowRings<Traits>& ring, int steps, int slot) {
  for (int i = 0; i < steps; ++i) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);
#pragma unroll
    for (int half = 0; half < Traits::kChunks; ++half) {
      float dq[Traits::kColumnsDQ / 2];  // (64 rows, half of dim)
      wgmma_begin();
      gemm_dq(dq, shared.ds[ring.ds.slot], shared.k[slot][half]);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dq);
      if (half + 1 == Traits::kChunks) arrive_warp(shared.ds_free[ring.ds.slot]);
      shared.dq_free[half].wait(ring.dq.parity ^ 1);
      stage_dq(shared.dq[half], dq);
      fence_async_proxy();
      arrive_warp(shared.dq_full[half]);
    }
    ring.ds.advance();
    ring.dq.parity ^= 1;
  }
  arrive_warp(shared.keys_read[slot]);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads,
                             1) void backward_narrow(const __grid_constant__ BackwardParams p,
                                                     const __grid_constant__ BackwardMaps maps,
                                                     const __grid_constant__ Scratch scratch,
                                                     int tiles) {
  extern __shared__ uint8_t memory[];
  auto& shared = *align_shared<typename Traits::Shared>(memory);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  NarrowRings<Traits> ring;
  if (warpgroup == 0) {
    shrink_registers<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
      produce_tiles<Traits>(shared, p, maps, scratch, tiles);
    } else if (warp <= Traits::kStagesDQ && elect_one()) {
      add_dq_of_tiles<Traits>(shared, p, scratch, warp - 1);
    }
  } else if (warpgroup == Traits::kConsumers + 1) {
    shrink_registers<Traits::kSumRegisters>();
    if constexpr (Traits::kTransposed) {
      for_each_tile<Traits>(shared, p, scratch,
                            [&](const KeyTile& tile, const Sequence& sequence,
                                const RowSteps& steps, int slot, uint32_t) {
                              const int key = tile.block * Traits::kBlockKV;
                              const Range rows = sequence.rows(key, Traits::kBlockKV);
                              const bool hides = !sequence.all_visible(
                                  rows.begin, rows.end - rows.begin, key, Traits::kBlockKV);
                              multiply_dq<Traits>(shared, ring, steps.count(), slot, hides);
                            });
    } else {
      for_each_tile<Traits>(
          shared, p, scratch,
          [&](const KeyTile&, const Sequence&, const RowSteps& steps, int slot, uint32_t) {
            multiply_dq_halves<Traits>(shared, ring, steps.count(), slot);
          });
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    const Exponent exponent(p);
    for_each_tile<Traits>(shared, p, scratch,
                          [&](const KeyTile& tile, const Sequence& sequence, const RowSteps& steps,
                              int slot, uint32_t parity) {
                            const NarrowConsumer<Traits> self{shared,   p,    exponent,     tile,
                                                              sequence, slot, warpgroup - 1};
                            self.take_tile(ring, steps.count(), parity);
                            arrive_warp(shared.tile_free[slot]);
                          });
    if constexpr (Traits::kFinishes) {
      // Its gradients are stored; K and V of its keys are read by nobody any more.
      named_sync(kWarpgroupDone + warpgroup - 1, kWarpgroup);
      const int warp = threadIdx.x / 32 % 4;
      auto& rows = warp < 2 ? shared.k[0][0] : shared.v[0][0];
      const int row = Traits::kKeysPerWarpgroup * (warpgroup - 1);
      finish_dq_blocks<Traits>(p, scratch, shared_address(rows[row]) + warp % 2 * kRoundedBytes);
    }
  }
}

}  // namespace flash::v3
