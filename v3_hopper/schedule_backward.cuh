// Which CTA of the backward pass owns which keys, and where its partial results lie in memory.
#pragma once

#include "common/mask.cuh"
#include "v3_hopper/traits_backward.cuh"

namespace flash::v3 {

// Memory beyond inputs and outputs: dQ in fp32, two statistics per row, and the turns of
// deterministic sums. Rows are padded to whole blocks per sequence.
struct Scratch {
  float* dq;           // (heads_q, blocks, fragment order of 64 x padded dim)
  float* lse;          // (heads_q, blocks * 64): -LSE / scale, or -LSE in base 2 with softcap
  float* delta;        // likewise, dLSE - rowsum(dO * O)
  int* turn;           // (heads_q, blocks, 2): contributions so far
  int* next_tile;      // of key tiles, what no CTA has taken yet
  int* next_share;     // of dQ, what no warp has taken to round
  int* done;           // (batch, heads_kv): key tiles whose adds to dQ are done, by each adder
  bool zeroed;         // dQ is, beforehand: key tiles add to it in any order
  int2* order;         // packed: batch and key block of one head's tiles, longest first; or null
  int64_t blocks;      // per head, in all sequences
  int block_kv;        // keys of a tile
  int tiles_per_head;  // key blocks of the longest sequence; packed: at most, of all sequences
  int tiles;           // of all heads
  int shares;          // of dQ that CTAs behind the tiles round; 0: another kernel does
  int heads_at_once;   // heads whose tiles are launched together, longest first
  // Of dQ, where it has a kernel of its own:
  int block_q;       // rows of a tile
  int row_tiles;     // packed: of one head, row blocks, at most, of all sequences
  int2* order_rows;  // packed: batch and row block of these, those with most keys first
};

inline __host__ __device__ int64_t blocks_of(int64_t rows) {
  return (rows + kGradientRows - 1) / kGradientRows;
}

// The first dQ block of a sequence: sequences are padded to whole blocks.
template <class Params>
__device__ __forceinline__ int64_t first_block(const Params& p, const Sequence& sequence,
                                               int batch) {
  if (p.cu_seqlens_q == nullptr) return batch * blocks_of(p.seqlen_q);
  return sequence.row_q / kGradientRows + batch;
}

// Tiles in rounds of heads: of each round the first tile of all its heads, then the second.
struct HeadTile {
  int head, tile;

  __device__ __forceinline__ HeadTile(const Scratch& scratch, int index, int heads, int tiles) {
    const int round = scratch.heads_at_once * tiles;
    const int first_head = index / round * scratch.heads_at_once;
    const int round_heads = min(scratch.heads_at_once, heads - first_head);
    const int within = index % round;
    head = first_head + within % round_heads;
    tile = within / round_heads;
  }
};

// The keys that one CTA owns.
struct KeyTile {
  int batch, head_kv, block;

  __device__ __forceinline__ KeyTile(const BackwardParams& p, const Scratch& scratch,
                                     int index = blockIdx.x) {
    const HeadTile at(scratch, index, p.batch * p.heads_kv, scratch.tiles_per_head);
    block = last_first(p) ? scratch.tiles_per_head - 1 - at.tile : at.tile;
    batch = at.head / p.heads_kv;
    head_kv = at.head % p.heads_kv;
  }

  // Of packed sequences, in the order that was found for them.
  __device__ __forceinline__ static KeyTile ordered(const BackwardParams& p, const Scratch& scratch,
                                                    int index) {
    if (scratch.order == nullptr) return KeyTile(p, scratch, index);
    const HeadTile at(scratch, index, p.heads_kv, scratch.tiles_per_head);
    const int2 found = scratch.order[at.tile];
    return KeyTile(found.x, at.head, found.y);
  }
  __device__ __forceinline__ KeyTile(int batch, int head_kv, int block)
      : batch(batch), head_kv(head_kv), block(block) {}

  // Deterministic causal sums start at the diagonal, where no CTA waits for another.
  __device__ __forceinline__ static bool last_first(const BackwardParams& p) {
    return p.deterministic && p.window_right != kUnlimited;
  }

  // How many key tiles add to these rows of dQ before this one: they were all launched earlier.
  template <int kBlockKV>
  __device__ __forceinline__ int turn(const BackwardParams& p, const Sequence& sequence,
                                      int row) const {
    const Range keys = sequence.keys(row, kGradientRows);
    return last_first(p) ? (keys.end - 1) / kBlockKV - block : block - keys.begin / kBlockKV;
  }
};

// The steps of one CTA: all blocks of rows that see its keys, in all query heads of its KV head.
//
// Blocks go from the last row to the first, and key tiles are launched from the first key on: then
// the key tile that is first to add to some rows of dQ is also among the first to arrive there. So
// it stays with the heads of a group inside: long and short key tiles go through them together.
struct RowSteps {
  int head, block;        // of this step
  int first_head, group;  // the query heads of the KV head
  int direction;          // +1 or -1
  int end;                // behind the last block, in that direction

  __device__ __forceinline__ RowSteps(const BackwardParams& p, const KeyTile& tile, Range rows) {
    group = p.heads_q / p.heads_kv;
    first_head = head = tile.head_kv * group;
    const int begin = rows.begin / kGradientRows;
    const int last = rows.end > rows.begin ? int(blocks_of(rows.end)) - 1 : begin - 1;
    direction = KeyTile::last_first(p) ? 1 : -1;
    block = direction > 0 ? begin : last;
    end = (direction > 0 ? last : begin) + direction;
  }
  __device__ __forceinline__ bool valid() const { return block != end; }
  // All of them, before the first.
  __device__ __forceinline__ int count() const { return group * (end - block) * direction; }
  __device__ __forceinline__ int row() const { return block * kGradientRows; }
  __device__ __forceinline__ void advance() {
    if (++head < first_head + group) return;
    head = first_head;
    block += direction;
  }
};

// The query rows that one CTA owns; the longest loops are launched first.
struct RowTile {
  int batch, head, row;

  __device__ __forceinline__ RowTile(const BackwardParams& p, const Scratch& scratch, int rows) {
    if (scratch.order != nullptr) {
      const HeadTile at(scratch, blockIdx.x, p.heads_q, scratch.row_tiles);
      const int2 found = scratch.order_rows[at.tile];
      batch = found.x;
      head = at.head;
      row = rows * found.y;
      return;
    }
    const int blocks = (p.seqlen_q + rows - 1) / rows;
    const HeadTile at(scratch, blockIdx.x, p.batch * p.heads_q, blocks);
    row = rows * (p.window_right == kUnlimited ? at.tile : blocks - 1 - at.tile);
    head = at.head % p.heads_q;
    batch = at.head / p.heads_q;
  }
};

}  // namespace flash::v3
