// One consumer warpgroup of the backward pass of narrow heads: S, P, dP, dS, dK and dV of 64 keys.
#pragma once

#include "v3_hopper/gemm_backward.cuh"
#include "v3_hopper/guard_backward.cuh"
#include "v3_hopper/narrow_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

// Its registers.
template <class Traits>
struct NarrowFragments {
  float dk[Traits::kHeadDim / 2];  // (64 keys, dim)
  float dv[Traits::kHeadDim / 2];
  float s[Traits::kBlockQ / 2];  // (64 keys, 64 rows)
  float dp[Traits::kBlockQ / 2];
  uint32_t p16[Traits::kBlockQ / 4];   // P^T as an operand
  uint32_t ds16[Traits::kBlockQ / 4];  // dS^T
  int row;                             // of S
  bool ready;                          // the rows of the next S
  bool masked;                         // P
};

template <class Fragments>
__device__ __forceinline__ void clear_gradients(Fragments& r) {
  for (float& x : r.dk) x = 0.0f;
  for (float& x : r.dv) x = 0.0f;
  pin(r.dk);
  pin(r.dv);
}

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
  __device__ __forceinline__ void await_rows(Fragments& r, const NarrowRings<Traits>& ring) const {
    if (!r.ready) shared.rows_full[ring.rows.slot].wait(ring.rows.parity);
    r.row = shared.row[ring.rows.slot];
  }
  __device__ __forceinline__ void start_scores(Fragments& r, const NarrowRings<Traits>& ring,
                                               int begin = 0, int end = Traits::kBlockQ / 2) const {
    if constexpr (Traits::kSoftcap) return;
    start(r.s, shared.lse[ring.rows.slot] + column(), begin, end);
  }
  __device__ __forceinline__ void start_dp(Fragments& r, const NarrowRings<Traits>& ring) const {
    start(r.dp, shared.delta[ring.rows.slot] + column());
  }
  __device__ __forceinline__ void issue_scores(Fragments& r,
                                               const NarrowRings<Traits>& ring) const {
    pin(r.s);
    wgmma_begin();
    gemm_scores<Traits::kHeadDim, Traits::kColumnsDQ>(r.s, shared.k[slot], key,
                                                      shared.q[ring.rows.slot], !Traits::kSoftcap);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_dp(Fragments& r, const NarrowRings<Traits>& ring) const {
    pin(r.dp);
    wgmma_begin();
    gemm_scores<Traits::kHeadDim>(r.dp, shared.v[slot], key, shared.dout[ring.rows.slot], true);
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

  // Are the next rows there? Asked early, so that the answer is there when it is needed.
  __device__ __forceinline__ void look_ahead(Fragments& r, const NarrowRings<Traits>& ring) const {
    auto next = ring.rows;
    next.advance();
    r.ready = shared.rows_full[next.slot].test(next.parity);
  }

  // The first S and dP of a tile,
  __device__ __forceinline__ void issue_first(Fragments& r, const NarrowRings<Traits>& ring,
                                              uint32_t parity) const {
    shared.k_full[slot].wait(parity);
    if constexpr (!Traits::kTransposed) remove_poison();
    shared.v_full[slot].wait(parity);
    r.ready = false;
    await_rows(r, ring);
    start_scores(r, ring);
    if constexpr (Traits::kTransposed) {
      start_dp(r, ring);
      pin(r.dp);
    }
    issue_scores(r, ring);
    if constexpr (Traits::kTransposed) issue_dp(r, ring);
  }
  // and its first P.
  __device__ __forceinline__ void await_first(Fragments& r, const NarrowRings<Traits>& ring) const {
    if constexpr (Traits::kTransposed) {
      wgmma_wait<1>();
    } else {  // registers
      wgmma_wait<0>();
      pin(r.s);
      start_dp(r, ring);
      issue_dp(r, ring);
    }
    find_probabilities(r, ring.rows.slot);
    look_ahead(r, ring);
    shared.ds_free[ring.ds.slot].wait(ring.ds.parity ^ 1);
    wgmma_wait<0>();
    pin(r.dp);
  }

  // dP -> dS; the next S starts where P is not needed any more.
  template <bool kLast>
  __device__ __forceinline__ void find_score_gradient(Fragments& r,
                                                      const NarrowRings<Traits>& ring) const {
    if (r.masked) mask_gradient(r.dp, r.s);
    constexpr int kParts = Traits::kTransposed ? 2 : 1;
    constexpr int kPart = Traits::kBlockQ / 2 / kParts;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      score_gradient(r.dp, r.s, i * kPart, (i + 1) * kPart);
      pin(r.dp);
      if constexpr (kLast) continue;
      if (i == 0) await_rows(r, ring);
      start_scores(r, ring, i * kPart, (i + 1) * kPart);
    }
  }

  // dS goes where the warpgroup of dQ reads it.
  __device__ __forceinline__ void hand_over_ds(const Fragments& r, int at) const {
    const int warp = threadIdx.x / 32 % 4;
    store_fragment(shared_address(shared.ds[at][key + 16 * warp]), 0, r.ds16);
    fence_async_proxy();
    arrive_warp(shared.ds_full[at]);
  }

  // One block of query rows, from P to dS; and, unless it is the last, S, dP and P of the next.
  template <bool kLast>
  __device__ __forceinline__ void take_step(Fragments& r, NarrowRings<Traits>& ring) const {
    const int slot_rows = ring.rows.slot;
    const int slot_ds = ring.ds.slot;
    ring.advance();
    find_score_gradient<kLast>(r, ring);
    round_operand<Element>(r.ds16, r.dp);
    if constexpr (!kLast && Traits::kTransposed) start_dp(r, ring);
    if constexpr (!Traits::kTransposed) hand_over_ds(r, slot_ds);  // dQ takes longer
    if constexpr (!kLast) issue_scores(r, ring);
    pin(r.p16);
    pin(r.ds16);
    wgmma_begin();
    gemm_gradient(r.dv, r.p16, shared.dout[slot_rows]);
    gemm_gradient(r.dk, r.ds16, shared.q[slot_rows]);
    wgmma_commit();
    if constexpr (Traits::kTransposed) hand_over_ds(r, slot_ds);  // beside the products
    if constexpr (!kLast && Traits::kTransposed) {
      issue_dp(r, ring);
      wgmma_wait<1>();  // S is there, and the gradients
    } else {
      wgmma_wait<0>();
    }
    pin(r.p16);  // may change
    pin(r.ds16);
    arrive_warp(shared.rows_free[slot_rows]);
    if constexpr (!kLast) {
      if constexpr (!Traits::kTransposed) {  // registers: only now
        start_dp(r, ring);
        issue_dp(r, ring);
      }
      find_probabilities(r, ring.rows.slot);
      look_ahead(r, ring);
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
    arrive_warp(shared.tile_free[slot]);
  }

  // All steps of a tile behind its first P.
  __device__ __forceinline__ void take_steps(Fragments& r, NarrowRings<Traits>& ring,
                                             int steps) const {
    for (int i = 0; i < steps - 1; ++i) take_step<false>(r, ring);
    take_step<true>(r, ring);
    pin(r.dk);
    pin(r.dv);
  }
  // A tile from its first S to its gradients.
  __device__ __forceinline__ void take_tile(NarrowRings<Traits>& ring, int steps,
                                            uint32_t parity) const {
    Fragments r;
    clear_gradients(r);
    if (steps > 0) {
      issue_first(r, ring, parity);
      await_first(r, ring);
      take_steps(r, ring, steps);
    }
    store_gradients(r, parity);
  }
};

}  // namespace flash::v3
