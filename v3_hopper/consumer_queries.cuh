// A consumer warpgroup of dQ's kernel: its rows, its registers, and its loop over key blocks.
#pragma once

#include "v3_hopper/gemm_backward.cuh"
#include "v3_hopper/guard_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

// One consumer warpgroup: 64 query rows; each thread holds elements of rows `row` and `row` + 8.
template <class Traits>
struct RowConsumer {
  using Element = typename Traits::Element;
  static constexpr int kScores = Traits::kBlockKV / 2;
  static constexpr int kThreads = Traits::kConsumers * kWarpgroup;

  typename Traits::Shared& shared;
  const BackwardParams& p;
  const Sequence& sequence;
  const int warpgroup;
  const int first_row;  // of the warpgroup, in the sequence
  float lse[2], delta[2];
  float dq[Traits::kHeadDim / 2];  // (64 rows, dim)
  float s[kScores];                // (64 rows, 64 keys): S, then P
  float dp[kScores];
  uint32_t ds16[kScores / 2];

  __device__ __forceinline__ int row() const {
    return first_row + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ void load_statistics(const Scratch& scratch, const RowTile& tile) {
    const int64_t block = tile.head * scratch.blocks + first_block(p, sequence, tile.batch);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = row() + 8 * i;
      const bool valid = at < sequence.seqlen_q;
      lse[i] = valid ? scratch.lse[block * kGradientRows + at] : -INFINITY;
      if (!Traits::kSoftcap && valid) lse[i] *= Exponent(p).scale;  // into base 2
      delta[i] = valid ? scratch.delta[block * kGradientRows + at] : 0.0f;
    }
  }

  __device__ __forceinline__ void arrive(Barrier& barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  // Of this warpgroup in a tile; found anew, for descriptors that live through the loop spill.
  __device__ __forceinline__ int tile_row() const {
    int row = 64 * warpgroup;
    if constexpr (Traits::kSoftcap || Traits::kInTurn) asm volatile("" : "+r"(row));
    return row;
  }

  __device__ __forceinline__ void issue_scores(int slot) {
    pin(s);
    gemm_scores<Traits::kHeadDim>(s, shared.q, tile_row(), shared.k[slot], false);
    wgmma_commit();
  }

  // Calls visit(score, is it hidden) for all scores: the first and the last key that a row sees are
  // found once, then each element's is a constant. Rows from `end` on see all.
  template <class Visit>
  __device__ __forceinline__ void visit_scores(int key, int end, Visit visit) {
    const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row() + 8 * half;
      const int low = at < end ? at + sequence.first - column : 0;
      const int most = min(at + sequence.last, sequence.seqlen_k - 1);
      const int high = at < end ? most - column : 2 * kScores;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
        visit(s[i], (8 * (i / 4) < low) | (8 * (i / 4) > high));
        visit(s[i + 1], (8 * (i / 4) + 1 < low) | (8 * (i / 4) + 1 > high));
      }
    }
  }

  // A key that is not finite has scores that are not: where some row must not see it, it becomes
  // zero before dQ would spread it. Both warpgroups have their S of these keys then.
  template <class Tile>
  __device__ __forceinline__ void guard_keys(Tile& keys, int key, bool masked) {
    const int row = first_row - 64 * warpgroup;
    if (sequence.all_visible(row, Traits::kBlockQ, key, Traits::kBlockKV)) return;
    float sum = 0.0f;  // of zeros, unless a hidden score is not finite
    if (masked) {
      visit_scores(key, sequence.seqlen_q,
                   [&](float score, bool hidden) { sum = fmaf(hidden ? score : 0.0f, 0.0f, sum); });
    }
    if (!any_at(kKeysRead, kThreads, !(sum == 0.0f))) return;
    auto* pieces = reinterpret_cast<uint4*>(&keys);
#pragma unroll 1
    for (int i = threadIdx.x % kThreads; i < int(sizeof(keys) / sizeof(uint4)); i += kThreads) {
      if (any_non_finite<Element>(pieces[i])) pieces[i] = uint4{0, 0, 0, 0};
    }
    fence_async_proxy();
    named_sync(kKeysRead, kThreads);
  }

  // S -> P, with the mask where the block needs one.
  __device__ __forceinline__ void find_probabilities(const Exponent& exponent, int key,
                                                     bool masked) {
    if constexpr (Traits::kSoftcap) cap_scores(s, exponent);
    if (masked) {
      visit_scores(key, INT_MAX, [&](float& score, bool hidden) {
        if (hidden) score = exponent.hidden();
      });
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float x = fast_exp2(s[i] * exponent.scale + lse[i / 2 % 2]);
      s[i] = Traits::kSoftcap ? x * fmaxf(1.0f - s[i] * s[i], 0.0f) : x;
    }
  }

  __device__ __forceinline__ void take_turn() const {
    named_sync(kProductTurn + warpgroup, kThreads);
  }
  __device__ __forceinline__ void give_turn() const {
    named_arrive(kProductTurn + 1 - warpgroup, kThreads);
  }

  __device__ __forceinline__ void issue_dp(const Ring<Traits::kStagesV>& ring) {
    pin(dp);
    gemm_scores<Traits::kHeadDimV>(dp, shared.dout, tile_row(), shared.v[ring.slot], false);
    wgmma_commit();
  }

  // dS, as an operand, from dP and P.
  __device__ __forceinline__ void find_gradient(bool masked) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) dp[i] += delta[i / 2 % 2];
    if (masked) mask_gradient(dp, s);
    score_gradient(dp, s);
    round_operand<Element>(ds16, dp);
  }

  // P and dS of a key block, S and dP of which are being computed.
  __device__ __forceinline__ void meet_keys(const Exponent& exponent, int key, int slot_k,
                                            const Ring<Traits::kStagesV>& ring_v) {
    wgmma_wait<1>();  // S is there
    pin(s);
    give_turn();
    const bool masked = !sequence.all_visible(first_row, 64, key, Traits::kBlockKV);
    guard_keys(shared.k[slot_k], key, masked);
    find_probabilities(exponent, key, masked);
    pin(s);
    // This has come long ago: a branch, lest the wait for dP be moved above the exponentials.
    shared.v_full[ring_v.slot].wait(ring_v.parity);
    wgmma_wait<0>();  // dP is there
    pin(dp);
    arrive(shared.v_free[ring_v.slot]);
    find_gradient(masked);
  }

  // All products between two dS in one turn, dQ of these keys first: the arithmetic of one
  // warpgroup lies beside the products of the other.
  __device__ __forceinline__ void take_steps_in_turn(Range keys) {
    const Exponent exponent(p);
    Ring<Traits::kStagesK> ring_k;
    Ring<Traits::kStagesV> ring_v;
    shared.q_full.wait(0);
    shared.k_full[0].wait(0);
    int key = keys.begin / Traits::kBlockKV * Traits::kBlockKV;
    if (warpgroup == 1) give_turn();
    take_turn();
    wgmma_begin();
    issue_scores(0);
    shared.dout_full.wait(0);
    shared.v_full[0].wait(0);
    wgmma_begin();
    issue_dp(ring_v);
    meet_keys(exponent, key, 0, ring_v);
    for (key += Traits::kBlockKV; key < keys.end; key += Traits::kBlockKV) {
      const int before = ring_k.slot;
      ring_k.advance();
      ring_v.advance();
      shared.k_full[ring_k.slot].wait(ring_k.parity);
      shared.v_full[ring_v.slot].wait(ring_v.parity);
      take_turn();
      pin(ds16);
      pin(dq);
      wgmma_begin();
      gemm_gradient(dq, ds16, shared.k[before]);
      wgmma_commit();
      issue_scores(ring_k.slot);
      issue_dp(ring_v);
      wgmma_wait<2>();  // dQ is there: its K may go
      arrive(shared.k_free[before]);
      meet_keys(exponent, key, ring_k.slot, ring_v);
    }
    take_turn();
    pin(ds16);
    pin(dq);
    wgmma_begin();
    gemm_gradient(dq, ds16, shared.k[ring_k.slot]);
    wgmma_commit();
    if (warpgroup == 0) give_turn();
    wgmma_wait<0>();
  }

  // One key block; and, unless it is the last, S of the next.
  template <bool kLast>
  __device__ __forceinline__ void take_step(const Exponent& exponent, int key,
                                            Ring<Traits::kStagesK>& ring_k,
                                            Ring<Traits::kStagesV>& ring_v) {
    const int slot = ring_k.slot;
    pin(s);
    const bool masked = !sequence.all_visible(first_row, 64, key, Traits::kBlockKV);
    guard_keys(shared.k[slot], key, masked);
    find_probabilities(exponent, key, masked);
    shared.v_full[ring_v.slot].wait(ring_v.parity);
    pin(dp);
    wgmma_begin();
    gemm_scores<Traits::kHeadDimV>(dp, shared.dout, tile_row(), shared.v[ring_v.slot], false);
    wgmma_commit();
    wgmma_wait<0>();  // dP is there
    pin(dp);
    arrive(shared.v_free[ring_v.slot]);
    ring_k.advance();
    ring_v.advance();
    find_gradient(masked);
    pin(ds16);
    pin(dq);
    wgmma_begin();
    gemm_gradient(dq, ds16, shared.k[slot]);
    wgmma_commit();
    if constexpr (!kLast) {
      shared.k_full[ring_k.slot].wait(ring_k.parity);
      wgmma_begin();
      issue_scores(ring_k.slot);
      wgmma_wait<1>();  // dQ is there: its K may go
      arrive(shared.k_free[slot]);
    }
    wgmma_wait<0>();  // the next S is there
  }

  __device__ __forceinline__ void take_steps(Range keys) {
    const Exponent exponent(p);
    Ring<Traits::kStagesK> ring_k;
    Ring<Traits::kStagesV> ring_v;
    shared.q_full.wait(0);
    shared.k_full[0].wait(0);
    wgmma_begin();
    issue_scores(0);
    wgmma_wait<0>();
    shared.dout_full.wait(0);
    int key = keys.begin / Traits::kBlockKV * Traits::kBlockKV;
    for (; key + Traits::kBlockKV < keys.end; key += Traits::kBlockKV) {
      take_step<false>(exponent, key, ring_k, ring_v);
    }
    take_step<true>(exponent, key, ring_k, ring_v);
  }

  __device__ __forceinline__ void store(const RowTile& tile) {
    named_sync(kWarpgroupDone + warpgroup, kWarpgroup);  // nobody reads these rows of Q any more
    stage_gradient(shared.q, 64 * warpgroup, dq, p.scale);
    named_sync(kWarpgroupDone + warpgroup, kWarpgroup);  // all four warps have staged
    const Sequence again(p, tile.batch);  // cheaper than registers that live through the loop
    auto* target = static_cast<Element*>(p.dq.data) + tile.batch * p.dq.batch +
                   tile.head * p.dq.head + (again.row_q + first_row) * p.dq.row;
    store_gradient(shared.q, 64 * warpgroup, target, p.dq.row, again.seqlen_q - first_row,
                   p.head_dim);
  }
};

}  // namespace flash::v3
