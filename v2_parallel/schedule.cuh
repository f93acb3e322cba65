// Which CTA owns which Q block, and which K/V blocks that Q block needs.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v2_parallel/traits.cuh"

namespace flash::v2 {

// A Q block of a head of a batch; heads are counted through the batch.
struct Place {
  int head, block_q;
};

// All Q blocks of all heads as one line. Heads are taken in groups whose K and V fit in L2, larger
// ones where blocks are uneven (causal): within a group the blocks with the most keys go first, so
// that the short ones fill the end, of which there must be enough. A CTA takes one place of the
// line, or, where `ctas` of them stay, one of each round of `ctas` places, every second round
// backwards: long blocks then meet short ones.
struct Grid {
  int blocks_q;     // per head
  int heads;        // batch * heads_q
  int group;        // heads that are under way together
  int places;       // of a group: its Q blocks, and empty places up to a whole pair of rounds
  int ctas;         // that stay; 0: every CTA takes one place
  bool last_first;  // the last Q block sees the most keys (causal)

  Grid(const Problem& p, int block_q, int ctas = 0) : ctas(ctas) {
    constexpr int64_t kL2Bytes = 32 << 20;
    constexpr int64_t kLevelBlocks = 2048;
    blocks_q = (p.seqlen_q + block_q - 1) / block_q;
    heads = p.batch * p.heads_q;
    last_first = p.window_right != kUnlimited;
    const int64_t bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * 2 + 1;
    const int64_t fitting = kL2Bytes / bytes * (p.heads_q / (p.heads_kv < 1 ? 1 : p.heads_kv));
    const int64_t level = last_first && blocks_q > 0 ? kLevelBlocks / blocks_q : 0;
    const int64_t wanted = fitting > level ? fitting : level;
    group = int(wanted < 1 ? 1 : wanted > heads ? heads : wanted);
    places = group * blocks_q;
    if (ctas > 0 && last_first) fill_rounds();
  }

  int64_t tiles() const { return int64_t(blocks_q) * heads; }
  int64_t launched() const { return ctas > 0 ? ctas : tiles(); }

  // The place of the line that a CTA takes in a round, and what is there; a negative head: nothing.
  __device__ __forceinline__ int slot(int round) const {
    if (ctas == 0) return blockIdx.x;
    return round * ctas + (round % 2 == 0 ? blockIdx.x : ctas - 1 - blockIdx.x);
  }
  __device__ __forceinline__ bool ends_before(int slot) const {
    return slot / places * group >= heads;
  }
  __device__ __forceinline__ Place place(int slot) const {
    const int first_head = slot / places * group;
    const int heads_here = min(group, heads - first_head);
    const int rest = slot % places;
    if (heads_here <= 0 || rest >= heads_here * blocks_q) return {-1, 0};
    const int block = rest / heads_here;
    return {first_head + rest % heads_here, last_first ? blocks_q - 1 - block : block};
  }

 private:
  // Groups that fill pairs of rounds, so that every CTA gets as much work as any other.
  void fill_rounds() {
    const int pair = 2 * ctas;
    double best = 0;
    for (int pairs = 1; pairs <= 4; ++pairs) {
      const int64_t most = int64_t(pair) * pairs / blocks_q;
      const int here = int(most < heads ? most : heads);
      const double filled = double(here) * blocks_q / (double(pair) * pairs);
      if (filled > best + 0.01) best = filled, group = here, places = pair * pairs;
    }
    if (best > 0.9) return;
    group = heads;
    places = (heads * blocks_q + pair - 1) / pair * pair;
  }
};

// The warps that share rows: which of them is this warp, and how they meet.
template <class Traits>
struct Team {
  static constexpr int kThreads = 32 * Traits::kTeam;
  // Through a shuffle, so that the compiler knows them equal for the whole warp.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int index = warp / Traits::kTeam;              // of the team in the CTA
  const int part = warp % Traits::kTeam;               // of this warp in the team
  const int first_row = index * Traits::kRowsPerWarp;  // in the Q block

  // Every warp of the team is here: each sees what the others wrote to shared memory before.
  __device__ __forceinline__ void sync() const {
    if constexpr (Traits::kTeam > 1) named_barrier_sync(1 + index, kThreads);
  }
  // True for all when true for one; otherwise as sync.
  __device__ __forceinline__ bool any(bool condition) const {
    if constexpr (Traits::kTeam > 1) return named_barrier_or(1 + index, kThreads, condition);
    return __any_sync(0xffffffffu, condition);
  }
  // Which 8 columns of S, V or O are tile n of this warp: the parts take turns, 16 at a time.
  __device__ __forceinline__ int column_tile(int n) const {
    return n / 2 * (2 * Traits::kTeam) + 2 * part + n % 2;
  }
};

// The work of one CTA: one Q block of one head, and of one warp: kRowsPerWarp of its rows.
template <class Traits>
struct Tile {
  static constexpr int kBlockKV = Traits::kBlockKV;

  int batch, head, head_kv;
  Sequence sequence;
  int row;       // first row of the Q block
  int warp_row;  // first row of this warp's team
  int last_key;  // one past the last key that any row of the Q block sees
  Range blocks;  // K/V blocks that any row of the Q block sees
  Range clean;   // those that every row sees as a whole

  __device__ __forceinline__ Tile(const ForwardParams& p, Place place)
      : batch(place.head / p.heads_q),
        head(place.head % p.heads_q),
        head_kv(head / (p.heads_q / p.heads_kv)),
        sequence(p, batch),
        row(place.block_q * Traits::kBlockQ),
        warp_row(row + Team<Traits>().first_row),
        last_key(sequence.keys(row, Traits::kBlockQ).end),
        blocks(touched(row, Traits::kBlockQ)),
        clean(filled(row, Traits::kBlockQ)) {}

  __device__ __forceinline__ bool empty() const { return row >= sequence.seqlen_q; }
  __device__ __forceinline__ bool warp_sees_none(int j) const {
    return !touched(warp_row, Traits::kRowsPerWarp).holds(j);
  }
  // Does the first half of the block hold all keys of it that the warp sees?
  __device__ __forceinline__ bool half_suffices(int j) const {
    return sequence.keys(warp_row, Traits::kRowsPerWarp).end <= j * kBlockKV + kBlockKV / 2;
  }
  __device__ __forceinline__ bool warp_sees_all(int j) const {
    return filled(warp_row, Traits::kRowsPerWarp).holds(j);
  }

 private:
  // Blocks of which some, or all, of the rows see some, or all, keys.
  __device__ __forceinline__ Range touched(int first_row, int rows) const {
    const Range keys = sequence.keys(first_row, rows);
    return {keys.begin / kBlockKV, (keys.end + kBlockKV - 1) / kBlockKV};
  }
  __device__ __forceinline__ Range filled(int first_row, int rows) const {
    const Range keys = sequence.common_keys(first_row, rows);
    return {(keys.begin + kBlockKV - 1) / kBlockKV, keys.end / kBlockKV};
  }
};

// The tiles of one CTA, one after another. Where they lie in shared memory, every warp has its own.
template <class Traits>
class Work {
 public:
  __device__ __forceinline__ Work(const ForwardParams& p, const Grid& grid)
      : first_(p, grid.place(grid.slot(0))) {
    if constexpr (Traits::kSharedTile) {
      if (threadIdx.x % 32 == 0) {
        memory().tile = first_;
        memory().more = false;
        memory().turn = memory().round = 0;
      }
      __syncwarp();  // the warp sees its tile
    }
  }

  __device__ __forceinline__ const Tile<Traits>& tile() const {
    if constexpr (Traits::kSharedTile) return memory().tile;
    return first_;
  }
  __device__ __forceinline__ int turn() const { return memory().turn; }  // tiles before this one
  __device__ __forceinline__ bool more() const { return Traits::kPersistent && memory().more; }
  __device__ __forceinline__ const Tile<Traits>& next() const { return memory().next; }

  // Finds the tile after this one.
  __device__ __forceinline__ void look_ahead(const ForwardParams& p, const Grid& grid) const {
    if constexpr (Traits::kPersistent) {
      if (grid.ctas == 0) return;
      Place place = {-1, 0};
      int round = memory().round;
      while (place.head < 0) {
        const int slot = grid.slot(++round);
        if (grid.ends_before(slot)) break;
        place = grid.place(slot);
      }
      const Tile<Traits> next(p, place);
      __syncwarp();  // the warp has read what is written now
      if (threadIdx.x % 32 == 0) {
        memory().next = next;
        memory().round = round;
        memory().more = place.head >= 0;
      }
      __syncwarp();  // the warp sees it
    }
  }
  // Goes on to the next tile, if there is one.
  __device__ __forceinline__ bool advance() const {
    if (!more()) return false;
    __syncwarp();  // the warp has read what is written now
    if (threadIdx.x % 32 == 0) {
      memory().tile = memory().next;
      memory().turn += 1;
    }
    __syncwarp();  // the warp sees it
    return true;
  }

 private:
  struct Memory {
    Tile<Traits> tile, next;
    int turn, round;
    bool more;
  };
  const Tile<Traits> first_;

  static __device__ __forceinline__ Memory& memory() {
    __shared__ __align__(16) char bytes[Traits::kWarps][sizeof(Memory)];
    return reinterpret_cast<Memory&>(bytes[threadIdx.x / 32]);
  }

 public:
  static constexpr int kBytes = Traits::kSharedTile ? Traits::kWarps * int(sizeof(Memory)) : 0;
};

}  // namespace flash::v2
