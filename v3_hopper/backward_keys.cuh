// dK and dV of wide heads: a CTA keeps 64 keys, and two warpgroups share the work by gradient.
//
// One warpgroup computes S^T, P^T and dV, the other dP^T, dS^T and dK: each holds one gradient of
// 64 keys in registers. P^T goes from the first to the second through shared memory, two steps
// deep.
#pragma once

#include "v3_hopper/backward.cuh"

namespace flash::v3 {

// Where a step finds its tiles: dO and P two deep, Q as deep as there is room.
template <int kStagesQ>
struct KeysRing : Ring<2> {
  Ring<kStagesQ> rows;
  __device__ __forceinline__ const Ring<kStagesQ>& q() const { return rows; }
  __device__ __forceinline__ void advance() {
    Ring<2>::advance();
    rows.advance();
  }
};
template <>
struct KeysRing<2> : Ring<2> {
  __device__ __forceinline__ const Ring<2>& q() const { return *this; }
};

template <class I, bool kHasSoftcap>
struct KeysTraits {
  using Element = typename I::Element;
  static constexpr bool kSoftcap = kHasSoftcap;
  static constexpr int kHeadDim = I::kHeadDim;
  static constexpr int kHeadDimV = I::kHeadDimV;
  static constexpr int kBlockQ = kGradientRows;
  static constexpr int kBlockKV = 64;
  static constexpr int kKeysPerWarpgroup = 0;       // both own all 64
  static constexpr int kColumnsDQ = kChunkColumns;  // K's chunks: dQ has a kernel of its own
  // Products in turn, K and V in registers: 64 columns with both operands in shared memory take all
  // of its bandwidth. dK is done just before the next turn then: the next scores need a third Q.
  static constexpr bool kInTurn = kHeadDim + kHeadDimV <= 384;
  static constexpr int kStagesQ = kInTurn ? 3 : 2;
  static constexpr int kStagesDO = 2;
  static constexpr int kConsumers = 2;  // the warpgroup of dV, the warpgroup of dK
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  template <int kDim, int kRows>
  using Tile = Element[(kDim + kChunkColumns - 1) / kChunkColumns][kRows][kChunkColumns];
  using TileP = float[kBlockQ / 8][kWarpgroup][4];  // in the order of the accumulators
  struct Shared {
    alignas(1024) Tile<kHeadDim, kBlockKV> k;
    Tile<kHeadDimV, kBlockKV> v;
    Tile<kHeadDim, kBlockQ> q[kStagesQ];
    Tile<kHeadDimV, kBlockQ> dout[kStagesDO];
    TileP p[2];
    float lse[kStagesQ][kBlockQ];
    float delta[kStagesDO][kBlockQ];
    int row[kStagesQ];  // first row of the block in the slot
    Barrier k_full, v_full, landed;
    Barrier q_full[kStagesQ], q_free[kStagesQ];
    Barrier dout_full[kStagesDO], dout_free[kStagesDO];
    Barrier p_full[2], p_free[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
};

template <class Traits>
__device__ __forceinline__ void init_keys_barriers(typename Traits::Shared& shared) {
  for (int i = 0; i < 2; ++i) {
    shared.p_full[i].init(4);  // once per warp
    shared.p_free[i].init(4);
  }
  init_barriers<Traits>(shared);
}

// The warpgroup of S^T, P^T and dV.
template <class Traits>
struct ForDV {
  using Element = typename Traits::Element;
  static constexpr int kScores = Traits::kBlockQ / 2;
  static constexpr bool kInTurn = Traits::kInTurn;
  static constexpr bool kTakesOver = false;
  using Steps = KeysRing<Traits::kStagesQ>;
  const KeyConsumer<Traits>& self;
  const Exponent exponent{self.p};
  float dv[Traits::kHeadDimV / 2];  // (64 keys, dim)
  float s[kScores];                 // (64 keys, 64 rows)
  uint32_t p16[kScores / 2];
  uint32_t k16[kInTurn ? Traits::kHeadDim / 4 : 1];  // K, the operand of all S

  __device__ __forceinline__ void meet_keys() {
    self.shared.k_full.wait(0);
    if constexpr (kInTurn) load_operand(k16, self.shared.k);
  }

  __device__ __forceinline__ void start_scores(const Steps& ring) {
    const int slot = ring.q().slot;
    self.shared.q_full[slot].wait(ring.q().parity);
    if constexpr (!Traits::kSoftcap) start(s, self.shared.lse[slot] + self.column());
    pin(s);
  }

  __device__ __forceinline__ void issue_scores(const Steps& ring) {
    wgmma_begin();
    const auto& q = self.shared.q[ring.q().slot];
    if constexpr (kInTurn) {
      gemm_scores(s, k16, q, !Traits::kSoftcap);
    } else {
      gemm_scores<Traits::kHeadDim>(s, self.shared.k, 0, q, !Traits::kSoftcap);
    }
    wgmma_commit();
  }

  // Hands P to the other warpgroup: each thread to the thread of the same place.
  __device__ __forceinline__ void hand_over(int slot, uint32_t parity) {
    self.shared.p_free[slot].wait(parity ^ 1);
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      float* to = self.shared.p[slot][i / 4][threadIdx.x % kWarpgroup];
      *reinterpret_cast<float4*>(to) = float4{s[i], s[i + 1], s[i + 2], s[i + 3]};
    }
    self.arrive(self.shared.p_full[slot]);
  }

  template <bool kLast>
  __device__ __forceinline__ void take_step(RowSteps& step, Steps& ring) {
    auto& shared = self.shared;
    const int slot = ring.slot;
    const uint32_t parity = ring.parity;
    const int slot_q = ring.q().slot;
    pin(s);
    if constexpr (Traits::kSoftcap) cap_scores(s, exponent);
    if (self.masked(step.row()))
      mask(s, self.sequence, self.position(step.row()), exponent.hidden());
    float p[kScores];
    probabilities<Traits::kSoftcap>(s, p, shared.lse[slot_q] + self.column(), exponent.scale);
    hand_over(slot, parity);
    self.arrive(shared.q_free[slot_q]);
    round_operand<Element>(p16, p);
    step.advance();
    ring.advance();
    shared.dout_full[slot].wait(parity);
    // Loads of shared memory queue behind products: in turn, the next scores' start comes first.
    if constexpr (kInTurn) {
      if constexpr (!kLast) start_scores(ring);
      self.take_turn();
    }
    pin(p16);
    pin(dv);
    wgmma_begin();
    gemm_gradient(dv, p16, shared.dout[slot]);
    wgmma_commit();
    if constexpr (!kLast) {
      if constexpr (!kInTurn) start_scores(ring);
      issue_scores(ring);
      wgmma_wait<1>();  // dV is there: its dO may go
      if constexpr (kInTurn) self.give_turn();
      self.arrive(shared.dout_free[slot]);
    } else if constexpr (Traits::kInTurn) {
      self.give_turn();
    }
    wgmma_wait<0>();  // the next S is there
  }
};

// The warpgroup of dP^T, dS^T and dK.
template <class Traits>
struct ForDK {
  using Element = typename Traits::Element;
  static constexpr int kScores = Traits::kBlockQ / 2;
  static constexpr bool kInTurn = Traits::kInTurn;
  static constexpr bool kTakesOver = true;
  using Steps = KeysRing<Traits::kStagesQ>;
  const KeyConsumer<Traits>& self;
  float dk[Traits::kHeadDim / 2];  // (64 keys, dim)
  float dp[kScores];               // (64 keys, 64 rows)
  float p[kScores];                // P of the same rows
  uint32_t ds16[kScores / 2];
  uint32_t v16[kInTurn ? Traits::kHeadDimV / 4 : 1];  // V, the operand of all dP

  __device__ __forceinline__ void meet_keys() {
    self.shared.v_full.wait(0);
    if constexpr (kInTurn) load_operand(v16, self.shared.v);
  }

  __device__ __forceinline__ void start_scores(const Steps& ring) {
    self.shared.dout_full[ring.slot].wait(ring.parity);
    start(dp, self.shared.delta[ring.slot] + self.column());
    pin(dp);
  }

  __device__ __forceinline__ void issue_scores(const Steps& ring) {
    wgmma_begin();
    const auto& dout = self.shared.dout[ring.slot];
    if constexpr (kInTurn) {
      gemm_scores(dp, v16, dout, true);
    } else {
      gemm_scores<Traits::kHeadDimV>(dp, self.shared.v, 0, dout, true);
    }
    wgmma_commit();
  }

  // Takes P from the other warpgroup, while dP of the same rows is being computed.
  __device__ __forceinline__ void take_over(int slot, uint32_t parity) {
    self.shared.p_full[slot].wait(parity);
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      const float* from = self.shared.p[slot][i / 4][threadIdx.x % kWarpgroup];
      const float4 four = *reinterpret_cast<const float4*>(from);
      p[i] = four.x, p[i + 1] = four.y, p[i + 2] = four.z, p[i + 3] = four.w;
    }
    pin(p);
    self.arrive(self.shared.p_free[slot]);
  }

  template <bool kLast>
  __device__ __forceinline__ void take_step(RowSteps& step, Steps& ring) {
    auto& shared = self.shared;
    const int slot = ring.slot;
    const int slot_q = ring.q().slot;
    pin(dp);
    self.arrive(shared.dout_free[slot]);
    if (self.masked(step.row())) mask_gradient(dp, p);
    score_gradient(dp, p);
    round_operand<Element>(ds16, dp);
    step.advance();
    ring.advance();
    if constexpr (kInTurn) {
      if constexpr (!kLast) start_scores(ring);
      self.take_turn();
    }
    pin(ds16);
    pin(dk);
    wgmma_begin();
    gemm_gradient(dk, ds16, shared.q[slot_q]);
    wgmma_commit();
    if constexpr (!kLast) {
      if constexpr (!kInTurn) start_scores(ring);
      issue_scores(ring);
      wgmma_wait<1>();  // dK is there: its Q may go
      if constexpr (kInTurn) self.give_turn();
      self.arrive(shared.q_free[slot_q]);
      take_over(ring.slot, ring.parity);
    }
    wgmma_wait<0>();  // the next dP is there
  }
};

// The loop that both warpgroups run.
template <class Work>
__device__ __forceinline__ void take_steps(Work& work, RowSteps step) {
  if (!step.valid()) return;
  const int steps = step.count();
  typename Work::Steps ring;
  work.meet_keys();
  work.start_scores(ring);
  work.issue_scores(ring);
  if constexpr (Work::kTakesOver) work.take_over(0, 0);
  wgmma_wait<0>();
  if constexpr (Work::kInTurn && Work::kTakesOver) work.self.give_turn();  // the first one
  for (int i = 0; i < steps - 1; ++i) work.template take_step<false>(step, ring);
  work.template take_step<true>(step, ring);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads,
                             1) void backward_keys(const __grid_constant__ BackwardParams p,
                                                   const __grid_constant__ BackwardMaps maps,
                                                   const __grid_constant__ Scratch scratch) {
  extern __shared__ uint8_t memory[];
  auto& shared = *align_shared<typename Traits::Shared>(memory);
  const auto tile = KeyTile::ordered(p, scratch, blockIdx.x);
  const Sequence sequence(p, tile.batch);
  const int key = tile.block * Traits::kBlockKV;
  if (key >= sequence.seqlen_k) return;
  const RowSteps steps(p, tile, sequence.rows(key, Traits::kBlockKV));
  if (threadIdx.x == 0) init_keys_barriers<Traits>(shared);
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    shrink_registers<Traits::kProducerRegisters>();
    if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0)
      produce<Traits>(shared, p, maps, scratch, tile, sequence, steps);
    return;
  }
  grow_registers<Traits::kConsumerRegisters>();
  const KeyConsumer<Traits> self{shared, p, scratch, tile, sequence};
  const int done = kWarpgroupDone + self.warpgroup;
  if (self.warpgroup == 0) {
    ForDV<Traits> work{self};
    for (float& x : work.dv) x = 0.0f;
    pin(work.dv);
    take_steps(work, steps);
    pin(work.dv);
    named_sync(kKeysRead, KeyConsumer<Traits>::kThreads);
    self.stage(shared.v, work.dv, 1.0f);
    named_sync(done, kWarpgroup);
    self.store(shared.v, p.dv, p.head_dim_v);
  } else {
    ForDK<Traits> work{self};
    for (float& x : work.dk) x = 0.0f;
    pin(work.dk);
    take_steps(work, steps);
    pin(work.dk);
    named_sync(kKeysRead, KeyConsumer<Traits>::kThreads);
    self.stage(shared.k, work.dk, p.scale);
    named_sync(done, kWarpgroup);
    self.store(shared.k, p.dk, p.head_dim);
  }
}

}  // namespace flash::v3
