// The traffic of a CTA: which copies are under way, who waits for them, and who may overwrite what.
#pragma once

#include "v2_parallel/load.cuh"

namespace flash::v2 {

// A copy that the products share out among themselves: what belongs to product i.
template <class Traits, class Copy>
__device__ __forceinline__ void copy_beside(Copy& copy, int i) {
  if (i == 0) copy.begin();
  if (i < Traits::kCopyParts) copy.issue(i, Traits::kCopyParts);
}

// All of it at once, by a warp that has nothing to multiply.
template <class Copy>
__device__ __forceinline__ void copy_alone(Copy copy) {
  copy.begin();
  copy.issue(0, 1);
}

struct NoCopy {
  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void issue(int, int) const {}
};

// The copy of K_j and V_j. Past the last block it only writes zeros.
template <class Traits>
struct KeyValueCopy {
  using Element = typename Traits::Element;
  using CopyK = BlockCopy<Traits, Traits::kBlockKV, Traits::kHeadDim>;
  using CopyV = BlockCopy<Traits, Traits::kBlockKV, Traits::kHeadDimV>;
  static constexpr int kChunks = CopyK::kChunks + CopyV::kChunks;
  CopyK k;
  CopyV v;

  __device__ __forceinline__ KeyValueCopy(const Shared<Traits>& smem, const ForwardParams& p,
                                          const Tile<Traits>& tile, int j)
      : k(smem.k(j), first_key<Traits>(p.k, tile, j), p.k.row, keys_from(tile, j), p.head_dim),
        v(smem.v(j), first_key<Traits>(p.v, tile, j), p.v.row, keys_from(tile, j), p.head_dim_v) {}

  __device__ __forceinline__ void begin() const {}
  // Starts part `now` of `parts`; the last one closes the group.
  __device__ __forceinline__ void issue(int now, int parts) {
#pragma unroll
    for (int i = now * kChunks / parts; i < (now + 1) * kChunks / parts; ++i) {
      if (i < CopyK::kChunks) {
        k.issue(i);
      } else {
        v.issue(i - CopyK::kChunks);
      }
    }
    if (now + 1 == parts) cp_async_commit();
  }
};

// The copy of a block of K, or of V, to the one stage that it has. `find` says what to copy, once
// the copy begins, so that until then it takes no registers.
template <class Traits, int kDim, class Find>
struct StageCopy {
  using Copy = BlockCopy<Traits, Traits::kBlockKV, kDim>;
  uint32_t full, empty;
  int visit;  // how many blocks were in this stage before
  Find find;  // (Copy&): false if there is nothing, and only zeros are written
  bool wanted;
  Copy copy;

  __device__ __forceinline__ StageCopy(uint32_t full, uint32_t empty, int visit, Find find)
      : full(full), empty(empty), visit(visit), find(find) {}

  // Returns when no warp reads the block before this one any more.
  __device__ __forceinline__ void begin() {
    if (visit > 0) barrier_wait(empty, visit - 1);
    wanted = find(copy);
  }
  // Starts part `now` of `parts`; the last one says that it was.
  __device__ __forceinline__ void issue(int now, int parts) {
#pragma unroll
    for (int i = now * Copy::kChunks / parts; i < (now + 1) * Copy::kChunks / parts; ++i) {
      copy.issue(i);
    }
    if (now + 1 < parts) return;
    if constexpr (Traits::kFeatured) __threadfence_block();  // rows copied through registers
    if (wanted) barrier_arrive_copies(full);
  }
};

// The traffic of a CTA with two stages of K and V: block j + 1 is on its way while j is used.
template <class Traits, bool kWide>
struct Flow {
  static_assert(Traits::kStages == 2);
  const Shared<Traits>& smem;
  const ForwardParams& p;

  __device__ __forceinline__ Flow(const Shared<Traits>& smem, const ForwardParams& p,
                                  const Tile<Traits>& tile)
      : smem(smem), p(p) {
    load_q(smem, p, tile);
    copy_alone(beside_qk(tile, tile.blocks.begin - 1));
  }
  __device__ __forceinline__ void wait_q(const Work<Traits>&) const {}
  // Waits for block j. Afterwards K_j, V_j (and Q) are visible to every warp, and no warp reads
  // block j - 1 any more: its stage may be filled again.
  __device__ __forceinline__ bool wait_k(int j, bool edge) const {
    cp_async_wait<0>();
    if (__builtin_expect(edge, false)) return clean_v(smem, j);
    __syncthreads();
    return false;
  }
  __device__ __forceinline__ bool wait_v(int, bool) const { return false; }
  __device__ __forceinline__ void release_k() const {}
  __device__ __forceinline__ void release_v() const {}
  __device__ __forceinline__ void finish(const Work<Traits>&) const {}

  // What is copied while block j is used.
  __device__ __forceinline__ KeyValueCopy<Traits> beside_qk(const Tile<Traits>& tile, int j) const {
    return KeyValueCopy<Traits>(smem, p, tile, j + 1);
  }
  __device__ __forceinline__ NoCopy beside_pv(const Work<Traits>&, int) const { return {}; }
  // The share in all this of a warp that does not need block j.
  __device__ __forceinline__ bool pass(const Work<Traits>& work, int j) const {
    copy_alone(beside_qk(work.tile(), j));
    return false;
  }
};

// The traffic of a wide CTA. V_j is on its way while S is formed, the next K while O is; a warp
// waits for the others only where it would overwrite what they read, so that one warp's products
// hide another's exponentials. The next K and Q may be those of the next tile.
template <class Traits>
struct Flow<Traits, true> {
  using Shared_ = Shared<Traits>;
  using CopyK = BlockCopy<Traits, Traits::kBlockKV, Traits::kHeadDim>;
  using CopyV = BlockCopy<Traits, Traits::kBlockKV, Traits::kHeadDimV>;
  const Shared_& smem;
  const ForwardParams& p;
  int visit = 0;  // K/V blocks before this one

  __device__ __forceinline__ Flow(const Shared_& smem, const ForwardParams& p,
                                  const Tile<Traits>& tile)
      : smem(smem), p(p) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shared_::kBarriers; ++i) {
        barrier_init(smem.barrier(typename Shared_::Barrier(i)), Traits::kThreads);
      }
      store_shared_4(smem.poisoned(), 0);
    }
    __syncthreads();  // the barriers exist
    start_q(tile);
    start_k(tile);
  }
  // Waits for the rows of Q, or of a block of K or V, that this tile or block j needs.
  __device__ __forceinline__ void wait_q(const Work<Traits>& work) const {
    barrier_wait(smem.barrier(Shared_::kFullQ), work.turn());
  }
  __device__ __forceinline__ bool wait_k(int, bool) const {
    barrier_wait(smem.barrier(Shared_::kFullK), visit);
    return false;
  }
  __device__ __forceinline__ bool wait_v(int j, bool edge) const {
    barrier_wait(smem.barrier(Shared_::kFullV), visit);
    return __builtin_expect(edge, false) && clean_v(smem, j);
  }
  // This thread's warp reads K_j, or V_j, no more.
  __device__ __forceinline__ void release_k() const {
    barrier_arrive(smem.barrier(Shared_::kEmptyK));
  }
  __device__ __forceinline__ void release_v() {
    barrier_arrive(smem.barrier(Shared_::kEmptyV));
    ++visit;
  }
  // After the last block: the next tile's Q takes the place of this one's.
  __device__ __forceinline__ void finish(const Work<Traits>& work) {
    if (!work.more()) return;
    if (visit > 0) barrier_wait(smem.barrier(Shared_::kEmptyK), visit - 1);  // no warp reads Q
    start_q(work.next());
    if (work.tile().blocks.begin >= work.tile().blocks.end) {
      cp_async_wait<0>();  // zeros that were written to no purpose
      start_k(work.next());
    }
  }

  // What is copied while S, or O, of block j is formed.
  __device__ __forceinline__ auto beside_qk(const Tile<Traits>& tile, int j) const {
    auto find = [=, &tile](CopyV& copy) {
      copy = CopyV(smem.v(j), first_key(p.v, tile, j), p.v.row, keys_from(tile, j), p.head_dim_v);
      return true;
    };
    return StageCopy<Traits, Traits::kHeadDimV, decltype(find)>(
        smem.barrier(Shared_::kFullV), smem.barrier(Shared_::kEmptyV), visit, find);
  }
  __device__ __forceinline__ auto beside_pv(const Work<Traits>& work, int j) const {
    return copy_k(visit + 1, [=, &work](CopyK& copy) {
      const bool last = j + 1 == work.tile().blocks.end;
      if (!last || !work.more()) {
        copy = block_k(work.tile(), j + 1);
        return !last;
      }
      const Range& blocks = work.next().blocks;
      copy = block_k(work.next(), blocks.begin);
      return blocks.begin < blocks.end;
    });
  }
  // The share in all this of a warp that does not need block j.
  __device__ __forceinline__ bool pass(const Work<Traits>& work, int j) {
    copy_alone(beside_qk(work.tile(), j));
    release_k();
    const bool poisoned = wait_v(j, true);
    copy_alone(beside_pv(work, j));
    release_v();
    return poisoned;
  }

 private:
  __device__ __forceinline__ CopyK block_k(const Tile<Traits>& tile, int j) const {
    return {smem.k(j), first_key(p.k, tile, j), p.k.row, keys_from(tile, j), p.head_dim};
  }
  template <class Find>
  __device__ __forceinline__ auto copy_k(int visit, Find find) const {
    return StageCopy<Traits, Traits::kHeadDim, Find>(smem.barrier(Shared_::kFullK),
                                                     smem.barrier(Shared_::kEmptyK), visit, find);
  }
  __device__ __forceinline__ void start_q(const Tile<Traits>& tile) const {
    load_q(smem, p, tile);
    if constexpr (Traits::kFeatured) __threadfence_block();  // rows copied through registers
    barrier_arrive_copies(smem.barrier(Shared_::kFullQ));
  }
  __device__ __forceinline__ void start_k(const Tile<Traits>& tile) const {
    if (tile.blocks.begin >= tile.blocks.end) return;
    copy_alone(copy_k(visit, [&](CopyK& copy) {
      copy = block_k(tile, tile.blocks.begin);
      return true;
    }));
  }
};

}  // namespace flash::v2
