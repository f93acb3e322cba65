// dQ of wide heads: a CTA keeps 128 query rows, and streams every key block past them.
//
// S, P, dP and dS are computed a second time, which buys sums without atomics: dQ stays in
// registers, needs no fp32 copy in memory, and is the same bits every time.
#pragma once

#include "v3_hopper/backward.cuh"

namespace flash::v3 {

template <class I, bool kHasSoftcap>
struct QueriesTraits {
  using Element = typename I::Element;
  static constexpr bool kSoftcap = kHasSoftcap;
  static constexpr int kHeadDim = I::kHeadDim;
  static constexpr int kHeadDimV = I::kHeadDimV;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockQ = 64 * kConsumers;
  static constexpr int kBlockKV = 64;
  static constexpr int kStagesK = 2;
  static constexpr int kStagesV = kHeadDim + kHeadDimV > 384 ? 1 : 2;  // what fits
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  template <int kDim, int kRows>
  using Tile = Element[(kDim + kChunkColumns - 1) / kChunkColumns][kRows][kChunkColumns];
  struct Shared {
    alignas(1024) Tile<kHeadDim, kBlockQ> q;
    Tile<kHeadDimV, kBlockQ> dout;
    Tile<kHeadDim, kBlockKV> k[kStagesK];
    Tile<kHeadDimV, kBlockKV> v[kStagesV];
    Barrier q_full, dout_full, landed;
    Barrier k_full[kStagesK], k_free[kStagesK];
    Barrier v_full[kStagesV], v_free[kStagesV];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
};

// The query rows that one CTA owns; the longest loops are launched first.
struct RowTile {
  int batch, head, row;

  __device__ __forceinline__ RowTile(const BackwardParams& p, const Scratch& scratch, int rows) {
    const int blocks = (p.seqlen_q + rows - 1) / rows;
    const HeadTile at(scratch, blockIdx.x, p.batch * p.heads_q, blocks);
    row = rows * (p.window_right == kUnlimited ? at.tile : blocks - 1 - at.tile);
    head = at.head % p.heads_q;
    batch = at.head / p.heads_q;
  }
};

template <class Traits>
__device__ __forceinline__ void produce_keys(typename Traits::Shared& shared,
                                             const BackwardParams& p, const BackwardMaps& maps,
                                             const RowTile& tile, const Sequence& sequence,
                                             Range keys) {
  Producer<Traits> self{shared};
  const Coordinate rows{0, int(sequence.row_q) + tile.row, tile.head,
                        p.cu_seqlens_q == nullptr ? tile.batch : 0};
  const Range seen_keys = sequence.keys(0, sequence.seqlen_q);
  const Range seen_rows = sequence.rows(0, sequence.seqlen_k);
  Ring<Traits::kStagesK> ring_k;
  Ring<Traits::kStagesV> ring_v;
  self.load(shared.q, maps.q, rows, shared.q_full, Keep::kFirstOut, tile.row, seen_rows);
  const int first = keys.begin / Traits::kBlockKV * Traits::kBlockKV;
  for (int key = first; key < keys.end; key += Traits::kBlockKV) {
    const Coordinate at{0, int(sequence.row_k) + key, tile.head / (p.heads_q / p.heads_kv),
                        p.cu_seqlens_k == nullptr ? tile.batch : 0};
    const int k = ring_k.slot;
    const int v = ring_v.slot;
    shared.k_free[k].wait(ring_k.parity ^ 1);
    self.load(shared.k[k], maps.k, at, shared.k_full[k], Keep::kLastOut, key, seen_keys);
    if (key == first) {
      self.load(shared.dout, maps.dout, rows, shared.dout_full, Keep::kFirstOut, tile.row,
                seen_rows);
    }
    shared.v_free[v].wait(ring_v.parity ^ 1);
    self.load(shared.v[v], maps.v, at, shared.v_full[v], Keep::kLastOut, key, seen_keys);
    ring_k.advance();
    ring_v.advance();
  }
}

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

  __device__ __forceinline__ void issue_scores(int slot, uint32_t parity) {
    shared.k_full[slot].wait(parity);
    pin(s);
    wgmma_begin();
    gemm_scores<Traits::kHeadDim>(s, shared.q, 64 * warpgroup, shared.k[slot], false);
    wgmma_commit();
  }

  // Both warpgroups have their S of these keys; those that are not finite become zero before dQ
  // would spread them to rows that do not see them.
  template <class Tile>
  __device__ __forceinline__ void guard_keys(Tile& keys, int key) const {
    const int row = first_row - 64 * warpgroup;
    if (sequence.all_visible(row, Traits::kBlockQ, key, Traits::kBlockKV)) return;
    if (!any_at(kKeysRead, kThreads, find_non_finite(keys, 0, Traits::kBlockKV, kThreads))) return;
    remove_non_finite(keys, 0, Traits::kBlockKV, kThreads, nullptr);
    named_sync(kKeysRead, kThreads);
  }

  // S -> P, with the mask where the block needs one; true if it did.
  __device__ __forceinline__ bool find_probabilities(const Exponent& exponent, int key) {
    const bool masked = !sequence.all_visible(first_row, 64, key, Traits::kBlockKV);
    if constexpr (Traits::kSoftcap) cap_scores(s, exponent);
    if (masked) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int column = key + threadIdx.x % 4 * 2 + 8 * (i / 4) + i % 2;
        if (!sequence.visible(row() + 8 * (i / 2 % 2), column)) s[i] = exponent.hidden();
      }
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float x = fast_exp2(s[i] * exponent.scale + lse[i / 2 % 2]);
      s[i] = Traits::kSoftcap ? x * fmaxf(1.0f - s[i] * s[i], 0.0f) : x;
    }
    return masked;
  }

  // One key block; and, unless it is the last, S of the next.
  template <bool kLast>
  __device__ __forceinline__ void take_step(const Exponent& exponent, int key,
                                            Ring<Traits::kStagesK>& ring_k,
                                            Ring<Traits::kStagesV>& ring_v) {
    const int slot = ring_k.slot;
    pin(s);
    guard_keys(shared.k[slot], key);
    const bool masked = find_probabilities(exponent, key);
    shared.v_full[ring_v.slot].wait(ring_v.parity);
    pin(dp);
    wgmma_begin();
    gemm_scores<Traits::kHeadDimV>(dp, shared.dout, 64 * warpgroup, shared.v[ring_v.slot], false);
    wgmma_commit();
    wgmma_wait<0>();  // dP is there
    pin(dp);
    arrive(shared.v_free[ring_v.slot]);
    ring_k.advance();
    ring_v.advance();
#pragma unroll
    for (int i = 0; i < kScores; ++i) dp[i] += delta[i / 2 % 2];
    if (masked) mask_gradient(dp, s);
    score_gradient(dp, s);
    round_operand<Element>(ds16, dp);
    pin(ds16);
    pin(dq);
    wgmma_begin();
    gemm_gradient(dq, ds16, shared.k[slot]);
    wgmma_commit();
    if constexpr (!kLast) {
      issue_scores(ring_k.slot, ring_k.parity);
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
    issue_scores(0, 0);
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

template <class Traits>
__device__ __forceinline__ void init_query_barriers(typename Traits::Shared& shared) {
  constexpr int kWarps = Traits::kConsumers * 4;
  shared.q_full.init(1);
  shared.dout_full.init(1);
  shared.landed.init(1);
  for (int i = 0; i < Traits::kStagesK; ++i) {
    shared.k_full[i].init(1);
    shared.k_free[i].init(kWarps);
  }
  for (int i = 0; i < Traits::kStagesV; ++i) {
    shared.v_full[i].init(1);
    shared.v_free[i].init(kWarps);
  }
  fence_barrier_init();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads,
                             1) void backward_queries(const __grid_constant__ BackwardParams p,
                                                      const __grid_constant__ BackwardMaps maps,
                                                      const __grid_constant__ Scratch scratch) {
  extern __shared__ uint8_t memory[];
  auto& shared = *align_shared<typename Traits::Shared>(memory);
  const RowTile tile(p, scratch, Traits::kBlockQ);
  const Sequence sequence(p, tile.batch);
  if (tile.row >= sequence.seqlen_q) return;
  const Range keys = sequence.keys(tile.row, Traits::kBlockQ);
  if (threadIdx.x == 0) init_query_barriers<Traits>(shared);
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    shrink_registers<Traits::kProducerRegisters>();
    if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0 && keys.begin < keys.end) {
      produce_keys<Traits>(shared, p, maps, tile, sequence, keys);
    }
    return;
  }
  grow_registers<Traits::kConsumerRegisters>();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0) - 1;  // uniform
  RowConsumer<Traits> self{shared, p, sequence, warpgroup, tile.row + 64 * warpgroup};
  self.load_statistics(scratch, tile);
  for (float& x : self.dq) x = 0.0f;
  pin(self.dq);
  if (keys.begin < keys.end) self.take_steps(keys);
  pin(self.dq);
  self.store(tile);
}

}  // namespace flash::v3
