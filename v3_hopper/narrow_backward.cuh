// The backward pass of narrow heads: what is known at compile time, and the warps that feed it.
#pragma once

#include "v3_hopper/load_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

// A key tile as the producer announces it: what costs divisions, and packed sequences loads, is
// found once, a tile ahead.
struct AnnouncedTile {
  KeyTile tile;
  Sequence sequence;
  RowSteps steps;
  bool exists;  // no: there are no more
};

// A CTA takes one tile of 128 keys after the other, and meets every block of query rows that sees
// it. Up to 64 dims dQ is computed transposed, from K in registers; wider, half of its columns at a
// time, from K in shared memory, whose chunks begin where the halves do.
template <class I, bool kHasSoftcap>
struct NarrowTraits {
  using Element = typename I::Element;
  static constexpr bool kSoftcap = kHasSoftcap;
  static constexpr int kHeadDim = I::kHeadDim;
  static constexpr int kChunks = (kHeadDim + kChunkColumns - 1) / kChunkColumns;
  static_assert(kHeadDim <= 96 && I::kHeadDimV == kHeadDim, "registers");
  static constexpr bool kTransposed = kChunks == 1;
  static constexpr bool kFinishes = kTransposed;  // rounds dQ, too
  static constexpr int kDimDQ = kTransposed ? kChunkColumns : kHeadDim;
  static constexpr int kColumnsDQ = kDimDQ / kChunks;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kBlockQ = kGradientRows;
  static constexpr int kKeysPerWarpgroup = 64;
  static constexpr int kBlockKV = kKeysPerWarpgroup * kConsumers;
  static constexpr int kStagesQ = 3;
  static constexpr int kStagesDQ = kTransposed ? 3 : kChunks;  // a warp for each adds it
  static constexpr int kTiles = kTransposed ? 2 : 1;           // this one and the next
  static constexpr int kThreads = kWarpgroup * (kConsumers + 2);
  static constexpr int kProducerRegisters = kTransposed ? 32 : 40;
  static constexpr int kSumRegisters = kTransposed ? 96 : 56;
  static constexpr int kConsumerRegisters = kTransposed ? 192 : 208;
  static_assert(kProducerRegisters + kSumRegisters + kConsumers * kConsumerRegisters <=
                65536 / kWarpgroup);

  using TileKV = Element[kChunks][kBlockKV][kChunkColumns];
  using TileQ = Element[kChunks][kBlockQ][kChunkColumns];
  using TileDS = Element[kBlockKV][kBlockQ];  // transposed
  struct Shared {
    alignas(1024) TileKV k[kTiles], v[kTiles];
    TileQ q[kStagesQ], dout[kStagesQ];
    TileDS ds[2];                               // one is read while one is written
    float dq[kStagesDQ][kBlockQ * kColumnsDQ];  // on its way to L2, in accumulator order
    float lse[kStagesQ][kBlockQ];
    float delta[kStagesQ][kBlockQ];
    int row[kStagesQ];  // first row of the block in the slot
    AnnouncedTile tile[kTiles];
    uint32_t poison[kBlockKV / 32];  // a bit for every key that was not finite
    Barrier tile_full[kTiles], tile_free[kTiles], keys_read[kTiles];
    Barrier k_full[kTiles], v_full[kTiles], landed;
    Barrier rows_full[kStagesQ], rows_free[kStagesQ];  // Q, dO and what belongs to them
    Barrier ds_full[2], ds_free[2];
    Barrier dq_full[kStagesDQ], dq_free[kStagesDQ];

    __device__ __forceinline__ void init() {
      constexpr int kWarps = 4 * kConsumers;  // each arrives once
      for (uint32_t& bits : poison) bits = 0;
      landed.init(1);
      for (int i = 0; i < kTiles; ++i) {
        tile_full[i].init(1);
        tile_free[i].init(kWarps + kStagesDQ);
        keys_read[i].init(4);
        k_full[i].init(1);
        v_full[i].init(1);
      }
      for (int i = 0; i < kStagesQ; ++i) {
        rows_full[i].init(2);
        rows_free[i].init(kWarps);
      }
      for (int i = 0; i < 2; ++i) {
        ds_full[i].init(kWarps);
        ds_free[i].init(4);
      }
      for (int i = 0; i < kStagesDQ; ++i) {
        dq_full[i].init(4);
        dq_free[i].init(1);
      }
      fence_barrier_init();
    }
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // room to align
};

// Where a step finds its tiles; the rings run on from one key tile to the next.
template <class Traits>
struct NarrowRings {
  Ring<Traits::kStagesQ> rows;
  Ring<2> ds;
  Ring<Traits::kStagesDQ> dq;

  __device__ __forceinline__ void advance() {
    rows.advance();
    ds.advance();
  }
};

// This warp has read, or filled, what the barrier stands for.
__device__ __forceinline__ void arrive_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

// Loads K and V of a key tile, and Q, LSE, dO and delta of all its steps.
template <class Traits>
__device__ __forceinline__ void load_key_tile(Producer<Traits>& self, const BackwardParams& p,
                                              const BackwardMaps& maps, const Scratch& scratch,
                                              const KeyTile& tile, const Sequence& sequence,
                                              RowSteps step, int slot, NarrowRings<Traits>& ring) {
  auto& shared = self.shared;
  if (!step.valid() && self.leader) {  // nobody reads K and V
    shared.k_full[slot].arrive();
    shared.v_full[slot].arrive();
  }
  const int batch_q = p.cu_seqlens_q == nullptr ? tile.batch : 0;
  const int first_key = tile.block * Traits::kBlockKV;
  const Coordinate keys{0, int(sequence.row_k) + first_key, tile.head_kv,
                        p.cu_seqlens_k == nullptr ? tile.batch : 0};
  const Range seen_keys = sequence.keys(0, sequence.seqlen_q);
  const Range seen_rows = sequence.rows(0, sequence.seqlen_k);
  const int block0 = int(first_block(p, sequence, tile.batch));
  for (bool first = true; step.valid(); first = false) {
    const Coordinate at{0, int(sequence.row_q) + step.row(), step.head, batch_q};
    const int64_t block = step.head * int(scratch.blocks) + block0 + step.block;
    const int rows = ring.rows.slot;
    Barrier& full = shared.rows_full[rows];
    if (first) {  // all tiles are on their way before one of them is cleaned
      self.template send<Traits::kColumnsDQ>(shared.k[slot], maps.k, keys, shared.k_full[slot],
                                             Keep::kFirstOut, first_key, seen_keys);
    }
    shared.rows_free[rows].wait(ring.rows.parity ^ 1);
    if (self.leader) shared.row[rows] = step.row();
    self.send(shared.q[rows], maps.q, at, full, Keep::kLastOut, step.row(), seen_rows,
              shared.lse[rows], scratch.lse + block * Traits::kBlockQ);
    if (first) {
      self.send(shared.v[slot], maps.v, keys, shared.v_full[slot], Keep::kFirstOut, first_key,
                seen_keys);
    }
    self.send(shared.dout[rows], maps.dout, at, full, Keep::kLastOut, step.row(), seen_rows,
              shared.delta[rows], scratch.delta + block * Traits::kBlockQ);
    const bool clean_keys = !first || self.is_clean(shared.k[slot], first_key, seen_keys);
    if (!clean_keys || !self.is_clean(shared.q[rows], step.row(), seen_rows)) {
      self.land();
      if (first) {
        self.clean(shared.k[slot], shared.k_full[slot], first_key, seen_keys);
        self.clean(shared.v[slot], shared.v_full[slot], first_key, seen_keys);
      }
      self.clean(shared.q[rows], full, step.row(), seen_rows);
      self.clean(shared.dout[rows], full, step.row(), seen_rows);
    }
    step.advance();
    ring.rows.advance();
  }
}

// Takes key tiles in the order of their numbers, so that a tile waits only for tiles that were
// taken before it, and loads them while the consumers are still at the tile before.
template <class Traits>
__device__ __forceinline__ void produce_tiles(typename Traits::Shared& shared,
                                              const BackwardParams& p, const BackwardMaps& maps,
                                              const Scratch& scratch, int tiles) {
  Producer<Traits> self{shared};
  NarrowRings<Traits> ring;
  Ring<Traits::kTiles> tile_ring;
  for (;;) {
    int index = 0;
    if (threadIdx.x % 32 == 0) index = atomicAdd(scratch.next_tile, 1);
    index = uniform(index);
    const bool over = index >= tiles;
    const auto tile = KeyTile::ordered(p, scratch, over ? 0 : index);
    const Sequence sequence(p, tile.batch);
    const int first_key = tile.block * Traits::kBlockKV;
    if (!over && first_key >= sequence.seqlen_k) continue;
    const int slot = tile_ring.slot;
    const RowSteps steps(p, tile, sequence.rows(first_key, Traits::kBlockKV));
    shared.tile_free[slot].wait(tile_ring.parity ^ 1);
    tile_ring.advance();
    if (self.leader) {
      shared.tile[slot] = {tile, sequence, steps, !over};
      shared.tile_full[slot].arrive();
    }
    if (over) return;
    load_key_tile(self, p, maps, scratch, tile, sequence, steps, slot, ring);
  }
}

// Calls visit(announced, place) for one key tile after the other.
template <class Traits, class Visit>
__device__ __forceinline__ void for_each_tile(typename Traits::Shared& shared, Visit visit) {
  for (Ring<Traits::kTiles> place;; place.advance()) {
    shared.tile_full[place.slot].wait(place.parity);
    const AnnouncedTile announced = shared.tile[place.slot];
    if (!announced.exists) return;
    visit(announced, place);
  }
}

// One thread per buffer of dQ (of all columns in turn, or of half of them) adds what is staged
// there: the wait for its turn and for the copy engine must not hold up the next block.
template <class Traits>
__device__ __forceinline__ void add_dq_of_tiles(typename Traits::Shared& shared,
                                                const BackwardParams& p, const Scratch& scratch,
                                                int buffer) {
  uint32_t parity = 0;
  int until_mine = buffer;  // steps
  for_each_tile<Traits>(shared, [&](const AnnouncedTile& now, const Ring<Traits::kTiles>& place) {
    shared.tile_free[place.slot].arrive();
    const KeyTile& tile = now.tile;
    const int block0 = int(first_block(p, now.sequence, tile.batch));
    for (RowSteps step = now.steps; step.valid(); step.advance()) {
      if (Traits::kTransposed && until_mine-- > 0) continue;
      until_mine = Traits::kStagesDQ - 1;
      const int block = step.head * int(scratch.blocks) + block0 + step.block;
      const int tiles_before = tile.template turn<Traits::kBlockKV>(p, now.sequence, step.row());
      add_staged_dq<Traits::kChunks>(shared, p, scratch, buffer, parity, block, tiles_before);
      parity ^= 1;
    }
    if (Traits::kFinishes) pass_turn(scratch.done + tile.batch * p.heads_kv + tile.head_kv);
  });
}

}  // namespace flash::v3
