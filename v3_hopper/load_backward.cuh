// The producer of the backward pass: K and V once, then Q, dO and their row statistics in a ring.
#pragma once

#include "v3_hopper/schedule_backward.cuh"
#include "v3_hopper/tma.cuh"

namespace flash::v3 {

struct BackwardMaps {
  CUtensorMap q, k, v, dout;
};

// Copies contiguous bytes into shared memory; they count on `full`.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, int bytes,
                                          Barrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&full.word))
      : "memory");
}

// Zeroes the rows of a tile outside [begin, end).
template <class Element, int kChunks, int kRows>
__device__ __forceinline__ void clear_rows(Element (&tile)[kChunks][kRows][kChunkColumns],
                                           int begin, int end) {
  auto clear = [&](int first, int last) {
#pragma unroll 1
    for (auto& chunk : tile) {
      auto* pieces = reinterpret_cast<uint4*>(chunk);
#pragma unroll 1
      for (int i = first * 8 + threadIdx.x % 32; i < last * 8; i += 32) pieces[i] = {0, 0, 0, 0};
    }
  };
  clear(0, min(begin, kRows));
  clear(max(end, 0), kRows);
}

// A tile of keys of one chunk, transposed, as a register operand: 64 dims by all keys.
template <class Element, int kKeys, int N>
__device__ __forceinline__ void load_transposed(uint32_t (&r)[N],
                                                const Element (&tile)[1][kKeys][kChunkColumns]) {
  static_assert(N == kKeys / 4, "all keys");
  const int lane = threadIdx.x % 32;
  const int piece = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;  // of 8 dims
#pragma unroll
  for (int slab = 0; slab < N / 4; ++slab) {
    const int key = 16 * slab + lane / 16 * 8 + lane % 8;
    const uint32_t address = shared_address(&tile[0][key][(piece ^ key % 8) * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[4 * slab]), "=r"(r[4 * slab + 1]), "=r"(r[4 * slab + 2]),
                   "=r"(r[4 * slab + 3])
                 : "r"(address)
                 : "memory");
  }
}

// The warp that fills shared memory, ahead of the consumers by the depth of the ring.
//
// What lies outside the rows that are needed belongs to no visible pair and may be NaN: it becomes
// zero before consumers see the tile.
template <class Traits>
struct Producer {
  typename Traits::Shared& shared;
  const bool leader = elect_one();
  uint32_t landed = 0;  // parity of the barrier of tiles that are cleaned before use

  template <class Tile>
  __device__ __forceinline__ static bool is_clean(const Tile& tile, int first, Range needed) {
    constexpr int kRows = sizeof(tile[0]) / kChunkBytes;
    return first >= needed.begin && first + kRows <= needed.end;
  }

  // Sends for a tile, chunks of 64 columns from every `kStep`-th on, with row statistics if there
  // are any.
  template <int kStep = kChunkColumns, class Tile>
  __device__ __forceinline__ void send(Tile& tile, const CUtensorMap& map, Coordinate at,
                                       Barrier& full, Keep keep, int first, Range needed,
                                       float* stats = nullptr, const float* source = nullptr) {
    constexpr int kChunks = sizeof(Tile) / sizeof(tile[0]);
    constexpr int kStatBytes = Traits::kBlockQ * sizeof(float);
    if (!leader) return;
    const bool clean = is_clean(tile, first, needed);
    Barrier& arrived = clean ? full : shared.landed;
    arrived.expect(sizeof(Tile) + (stats == nullptr ? 0 : kStatBytes));
    if (clean) full.arrive();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      at.column = chunk * kStep;
      load_box(tile[chunk], map, at, arrived, keep);
    }
    if (stats != nullptr) load_bulk(stats, source, kStatBytes, arrived);
  }

  // Waits until all tiles that are to be cleaned have landed.
  __device__ __forceinline__ void land() {
    if (leader) shared.landed.arrive();
    shared.landed.wait(landed);
    landed ^= 1;
  }

  // Cleans a tile that has landed.
  template <class Tile>
  __device__ __forceinline__ void clean(Tile& tile, Barrier& full, int first, Range needed) {
    if (is_clean(tile, first, needed)) return;
    clear_rows(tile, needed.begin - first, needed.end - first);
    fence_async_proxy();  // each lane's zeros are ordered before the products that read them
    __syncwarp();
    if (leader) full.arrive();
  }

  // Both, of one tile.
  template <int kStep = kChunkColumns, class Tile>
  __device__ __forceinline__ void load(Tile& tile, const CUtensorMap& map, Coordinate at,
                                       Barrier& full, Keep keep, int first, Range needed,
                                       float* stats = nullptr, const float* source = nullptr) {
    send<kStep>(tile, map, at, full, keep, first, needed, stats, source);
    if (!is_clean(tile, first, needed)) land();
    clean(tile, full, first, needed);
  }
};

// K and V once, then Q, LSE, dO and delta of every step.
template <class Traits>
__device__ __forceinline__ void produce(typename Traits::Shared& shared, const BackwardParams& p,
                                        const BackwardMaps& maps, const Scratch& scratch,
                                        const KeyTile& tile, const Sequence& sequence,
                                        RowSteps step) {
  if (!step.valid()) return;
  Producer<Traits> self{shared};
  const int batch = p.cu_seqlens_q == nullptr ? tile.batch : 0;
  const int first_key = tile.block * Traits::kBlockKV;
  const Coordinate keys{0, int(sequence.row_k) + first_key, tile.head_kv,
                        p.cu_seqlens_k == nullptr ? tile.batch : 0};
  const Range seen_keys = sequence.keys(0, sequence.seqlen_q);
  const Range seen_rows = sequence.rows(0, sequence.seqlen_k);
  const int64_t block0 = first_block(p, sequence, tile.batch);
  auto at = [&] { return Coordinate{0, int(sequence.row_q) + step.row(), step.head, batch}; };
  auto stats = [&] { return (step.head * scratch.blocks + block0 + step.block) * Traits::kBlockQ; };
  // All tiles of the first step are on their way before one of them is cleaned.
  self.template send<Traits::kColumnsDQ>(shared.k, maps.k, keys, shared.k_full, Keep::kFirstOut,
                                         first_key, seen_keys);
  if (self.leader) shared.row[0] = step.row();
  self.send(shared.q[0], maps.q, at(), shared.q_full[0], Keep::kLastOut, step.row(), seen_rows,
            shared.lse[0], scratch.lse + stats());
  self.send(shared.v, maps.v, keys, shared.v_full, Keep::kFirstOut, first_key, seen_keys);
  self.send(shared.dout[0], maps.dout, at(), shared.dout_full[0], Keep::kLastOut, step.row(),
            seen_rows, shared.delta[0], scratch.delta + stats());
  self.land();  // maybe none
  self.clean(shared.k, shared.k_full, first_key, seen_keys);
  self.clean(shared.q[0], shared.q_full[0], step.row(), seen_rows);
  self.clean(shared.v, shared.v_full, first_key, seen_keys);
  self.clean(shared.dout[0], shared.dout_full[0], step.row(), seen_rows);
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStagesDO> dout;
  for (;;) {
    step.advance();
    if (!step.valid()) break;
    q.advance();
    dout.advance();
    shared.q_free[q.slot].wait(q.parity ^ 1);
    if (self.leader) shared.row[q.slot] = step.row();
    self.load(shared.q[q.slot], maps.q, at(), shared.q_full[q.slot], Keep::kLastOut, step.row(),
              seen_rows, shared.lse[q.slot], scratch.lse + stats());
    shared.dout_free[dout.slot].wait(dout.parity ^ 1);
    self.load(shared.dout[dout.slot], maps.dout, at(), shared.dout_full[dout.slot], Keep::kLastOut,
              step.row(), seen_rows, shared.delta[dout.slot], scratch.delta + stats());
  }
}

}  // namespace flash::v3
