// dQ of wide heads: a CTA keeps 128 query rows, and streams every key block past them.
//
// S, P, dP and dS are computed a second time, which buys sums without atomics: dQ stays in
// registers, needs no fp32 copy in memory, and is the same bits every time.
#pragma once

#include "v3_hopper/backward.cuh"
#include "v3_hopper/consumer_queries.cuh"

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
  // In turn one's dQ is done just before the other's next: a third K is on its way by then.
  static constexpr bool kInTurn = kHeadDim + kHeadDimV <= 384;
  static constexpr int kStagesK = kInTurn ? 3 : 2;
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
  int head = tile.head / (p.heads_q / p.heads_kv);
  int batch = p.cu_seqlens_k == nullptr ? tile.batch : 0;
  asm volatile("" : "+r"(head), "+r"(batch));  // else every step finds them anew, and divides
  auto at = [&](int key) { return Coordinate{0, int(sequence.row_k) + key, head, batch}; };
  int key = keys.begin / Traits::kBlockKV * Traits::kBlockKV;
  // All tiles of the first step are on their way before one of them is cleaned.
  self.send(shared.q, maps.q, rows, shared.q_full, Keep::kFirstOut, tile.row, seen_rows);
  self.send(shared.k[0], maps.k, at(key), shared.k_full[0], Keep::kLastOut, key, seen_keys);
  self.send(shared.dout, maps.dout, rows, shared.dout_full, Keep::kFirstOut, tile.row, seen_rows);
  self.send(shared.v[0], maps.v, at(key), shared.v_full[0], Keep::kLastOut, key, seen_keys);
  self.land();  // maybe none
  self.clean(shared.q, shared.q_full, tile.row, seen_rows);
  self.clean(shared.k[0], shared.k_full[0], key, seen_keys);
  self.clean(shared.dout, shared.dout_full, tile.row, seen_rows);
  self.clean(shared.v[0], shared.v_full[0], key, seen_keys);
  for (key += Traits::kBlockKV; key < keys.end; key += Traits::kBlockKV) {
    ring_k.advance();
    ring_v.advance();
    const int k = ring_k.slot;
    const int v = ring_v.slot;
    shared.k_free[k].wait(ring_k.parity ^ 1);
    self.load(shared.k[k], maps.k, at(key), shared.k_full[k], Keep::kLastOut, key, seen_keys);
    shared.v_free[v].wait(ring_v.parity ^ 1);
    self.load(shared.v[v], maps.v, at(key), shared.v_full[v], Keep::kLastOut, key, seen_keys);
  }
}

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
  if (keys.begin < keys.end) {
    if constexpr (Traits::kInTurn) {
      self.take_steps_in_turn(keys);
    } else {
      self.take_steps(keys);
    }
  }
  pin(self.dq);
  self.store(tile);
}

}  // namespace flash::v3
