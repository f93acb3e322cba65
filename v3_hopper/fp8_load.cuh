// Global -> shared by TMA, in FP8: one warp keeps the rings of Q, K and V as it comes full.
#pragma once

#include "v3_hopper/fp8_maps.cuh"
#include "v3_hopper/load.cuh"

namespace flash::v3::fp8 {

template <class Traits>
__device__ __forceinline__ void init_pipes(typename Traits::Shared& shared) {
  for (int i = 0; i < Traits::kWorkSlots; ++i) {
    shared.work_full[i].init(1);
    shared.work_empty[i].init(Traits::kConsumers);
  }
  for (int i = 0; i < Traits::kStagesQ; ++i) {
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      shared.q_full[i][consumer].init(1);
      shared.q_empty[i][consumer].init(1);
    }
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    shared.k_full[i].init(1);
    shared.k_empty[i].init(Traits::kConsumers * kGroupWarps);
    shared.v_full[i].init(kTransposers + Traits::kKeysContiguous);  // and of the copy
    shared.v_empty[i].init(Traits::kConsumers);
  }
  for (int i = 0; i < Traits::kStagesRaw; ++i) {
    shared.raw_full[i].init(2);  // the copy and the scale
    shared.raw_empty[i].init(kTransposers);
  }
  fence_barrier_init();
}

// What the loading warp carries through the whole kernel. Its instructions are to be few, for the
// scheduler that issues them serves consumers, too.
template <class Traits>
struct Loader {
  const Arguments& args;
  typename Traits::Shared& shared;
  Counter tile, block, orders;  // block: of K, until its V has been loaded, too

  __device__ __forceinline__ void load_q(const Work& at) {
    const int slot = tile.template slot<Traits::kStagesQ>();
    const int row = query_row(at, 0), head = at.head, batch = at.batch;
#pragma unroll
    for (int group = 0; group < Traits::kConsumers; ++group) {
      shared.q_empty[slot][group].wait(tile.template parity<Traits::kStagesQ>() ^ 1);
      if (elect_one()) {
        Barrier& full = shared.q_full[slot][group];
        full.arrive_expect(Traits::kBytesQ);
        load_rows<kGroupRows, Traits::kChunks>(shared.q[slot][group], args.q,
                                               row + group * kGroupRows, head, batch, full);
      }
    }
  }

  __device__ __forceinline__ void load_k(const Work& at, int block) {
    const int slot = this->block.template slot<Traits::kStages>();
    shared.k_empty[slot].wait(this->block.template parity<Traits::kStages>() ^ 1);
    if (elect_one()) {
      Barrier& full = shared.k_full[slot];
      full.expect(Traits::kBytesK);
      load_block(shared.k[slot], at, block, full);
    }
  }

  // K counts as full with its scales. `first`: of the tile.
  __device__ __forceinline__ void load_scales(const Work& at, int block, bool first) {
    const int slot = this->block.template slot<Traits::kStages>();
    const unsigned place = unsigned(block) % kScalesFetched;
    if (first || place == kScalesFetched - 1) fetch_scales(at, block, first);
    if (elect_one()) {
      shared.scales[slot] = shared.fetched[place];
      shared.k_full[slot].arrive();
    }
  }

  __device__ __forceinline__ void load_v(const Work& at, int block) {
    if constexpr (Traits::kKeysContiguous) {
      load_columns(at, block);
    } else {
      load_raw(at, block);
    }
  }

  __device__ __forceinline__ void load_raw(const Work& at, int block) {
    const int slot = this->block.template slot<Traits::kStagesRaw>();
    shared.raw_empty[slot].wait(this->block.template parity<Traits::kStagesRaw>() ^ 1);
    if (elect_one()) {
      Barrier& full = shared.raw_full[slot];
      full.arrive_expect(Traits::kBytesRaw);
      load_rows<Traits::kBlockKV, Traits::kChunksV>(
          shared.raw[slot], args.v, key_row<Traits>(at, block), at.head_kv, at.batch, full);
      Order& order = shared.orders[slot];
      order.care = Care::kNone;
      if (!at.unguarded.holds(block)) {
        const int keys = at.sequence.seqlen_k - block * Traits::kBlockKV;
        const bool behind = args.p.cu_seqlens_k != nullptr && keys < Traits::kBlockKV;
        order = {behind ? Care::kClean : Care::kLook, keys,
                 tile.template slot<Traits::kWorkSlots>(), 0};
      }
      full.arrive();
    }
  }

  // V with contiguous keys goes to where it is used. It counts as full after the copy and one
  // arrival of each warp that looks for NaN; where none has to, this one arrives for them.
  __device__ __forceinline__ void load_columns(const Work& at, int block) {
    const bool guarded = !at.unguarded.holds(block);
    const int slot = this->block.template slot<Traits::kStages>();
    const int order = orders.template slot<Traits::kStagesRaw>();
    shared.v_empty[slot].wait(this->block.template parity<Traits::kStages>() ^ 1);
    if (guarded) shared.raw_empty[order].wait(orders.template parity<Traits::kStagesRaw>() ^ 1);
    if (elect_one()) {
      Barrier& full = guarded ? shared.raw_full[order] : shared.v_full[slot];
      full.arrive_expect(Traits::kHeadDimV * kChunkBytes);
      shared.v_full[slot].arrive(guarded ? 1 : kTransposers);
      load_box(shared.v[slot], args.v, {block * Traits::kBlockKV, 0, at.head_kv, at.batch}, full);
      if (guarded) {
        shared.orders[order] = {Care::kClean, 0, tile.template slot<Traits::kWorkSlots>(), slot};
        full.arrive();
      }
    }
    orders.passed += guarded;
  }

  // No tile of V follows.
  __device__ __forceinline__ void end() {
    const Counter& last = Traits::kKeysContiguous ? orders : block;
    const int slot = last.template slot<Traits::kStagesRaw>();
    shared.raw_empty[slot].wait(last.template parity<Traits::kStagesRaw>() ^ 1);
    if (threadIdx.x == 0) {
      shared.orders[slot].care = Care::kEnd;
      shared.raw_full[slot].arrive(2);
    }
  }

 private:
  // A lane for each of the blocks from here on towards the first, down to a multiple of how many
  // are fetched at a time; at the beginning of a tile also one for the rows of each consumer.
  __device__ __forceinline__ void fetch_scales(const Work& at, int block, bool first) {
    __syncwarp();  // the lane that has read those before, and kept the last
    const int lane = threadIdx.x, mine = min(block - block % kScalesFetched + lane, block);
    const int key = mine * Traits::kBlockKV;
    const float k = descale_of(args.p.k_descale, at.index, key, at.head_kv);
    const float v = descale_of(args.p.v_descale, at.index, key, at.head_kv);
    if (first && lane < Traits::kConsumers) {
      const int row = min(at.row + lane * kGroupRows, at.sequence.seqlen_q - 1);
      const float q = descale_of(args.p.q_descale, at.index, row, at.head_kv);
      shared.to_log2[tile.template slot<Traits::kWorkSlots>()][lane] = args.p.scale * kLog2E * q;
    }
    float before = __shfl_down_sync(~0u, v, 1);
    if (mine == block) {
      before = first ? 1.0f : shared.scales[(this->block.passed - 1) % Traits::kStages].v;
    }
    const float ratio = isfinite(before) ? __fdividef(before, v) : 0.0f;
    if (lane < kScalesFetched) shared.fetched[lane] = {k, v, ratio + (v - v)};
    __syncwarp();
  }

  __device__ __forceinline__ void load_block(unsigned char* tile, const Work& at, int block,
                                             Barrier& full) const {
    if constexpr (Traits::kKeysContiguous) {
      constexpr int kHalf = Traits::kBlockKV / 2;
#pragma unroll
      for (int i = 0; i < 2 * Traits::kChunks; ++i) {
        load_keys(tile + i * kHalf * kChunkBytes, args.k, i / 2 * kChunkBytes, i % 2,
                  block * (Traits::kBlockKV / kKeyGroup), at.head_kv, at.batch, full);
      }
    } else {
      load_rows<Traits::kBlockKV, Traits::kChunks>(tile, args.k, key_row<Traits>(at, block),
                                                   at.head_kv, at.batch, full);
    }
  }

  template <int kRows, int kChunkCount>
  __device__ __forceinline__ void load_rows(unsigned char* tile, const CUtensorMap& map, int row,
                                            int head, int batch, Barrier& full) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunkCount; ++chunk) {
      load_box(tile + chunk * kRows * kChunkBytes, map, {chunk * kChunkBytes, row, head, batch},
               full);
    }
  }
};

// Announces tile after tile, and loads what it needs in the order in which it is needed; V early,
// for it is transposed first. Tiles whose rows see no key are finished here.
template <class Traits>
__device__ __forceinline__ void produce(const Arguments& args, typename Traits::Shared& shared) {
  Schedule<Traits> schedule(args, shared.walk);
  Loader<Traits> load{args, shared};
  for (;;) {
    const Tile tile = schedule.next();
    const int slot = load.tile.template slot<Traits::kWorkSlots>();
    Work& work = shared.work[slot];
    shared.work_empty[slot].wait(load.tile.template parity<Traits::kWorkSlots>() ^ 1);
    if (threadIdx.x == 0) describe<Traits>(work, args.p, tile);
    __syncwarp();
    if (tile.head >= 0 && is_empty<Traits>(work)) {
      store_nothing<Traits>(args.p, work);
      __syncwarp();  // before the slot is written again
      continue;
    }
    if (threadIdx.x == 0) shared.work_full[slot].arrive();
    if (tile.head < 0) return load.end();
    const Range blocks = key_blocks<Traits>(work);
    load.load_k(work, blocks.end - 1);
    if constexpr (!Traits::kStagesO) {
      load.load_scales(work, blocks.end - 1, true);
      load.load_q(work);
      load.load_v(work, blocks.end - 1);
    } else {
      load.load_v(work, blocks.end - 1);
      load.load_q(work);  // its slot is the last to be free
      load.load_scales(work, blocks.end - 1, true);
    }
    ++load.block.passed;
    for (int j = blocks.end - 2; j >= blocks.begin; --j, ++load.block.passed) {
      load.load_k(work, j);
      load.load_scales(work, j, false);
      load.load_v(work, j);
    }
    __syncwarp();
    ++load.tile.passed;
  }
}

}  // namespace flash::v3::fp8
