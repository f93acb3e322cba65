// The backward pass of narrow heads: as backward.cuh, but dQ has a warpgroup of its own, and a CTA
// takes one key tile after the other, up to 64 dims while the copy engine is a tile ahead.
//
// Consumers wait for nobody but the copy engine, and no product is waited for before it has had
// time:
//   tensor cores:  S(i+1) dV(i) dK(i) dP(i+1) | S(i+2) ...                   and dQ(i) on the side
//   warpgroup:     dS(i) -> smem              | P(i+1) | dS(i+1) -> smem
#pragma once

#include "v3_hopper/consumer_narrow.cuh"
#include "v3_hopper/finish_narrow.cuh"

namespace flash::v3 {

// Has the next key tile come, with its first rows? All four warps find the same.
template <class Traits>
__device__ __forceinline__ bool next_is_here(typename Traits::Shared& shared,
                                             const Ring<Traits::kTiles>& next,
                                             const NarrowRings<Traits>& ring, int warpgroup) {
  const bool here = shared.tile_full[next.slot].test(next.parity) &&
                    shared.k_full[next.slot].test(next.parity) &&
                    shared.v_full[next.slot].test(next.parity) &&
                    shared.rows_full[ring.rows.slot].test(ring.rows.parity);
  if (any_at(kWarpgroupDone + warpgroup, kWarpgroup, !here)) return false;
  return shared.tile[next.slot].steps.count() > 0;
}

// One consumer warpgroup, where there is room for two key tiles. If the next has come by then, it
// begins before the gradients of this one leave: its first S and dP are computed meanwhile.
template <class Traits>
__device__ __forceinline__ void consume_tiles(typename Traits::Shared& shared,
                                              const BackwardParams& p, int warpgroup) {
  const Exponent exponent(p);
  NarrowRings<Traits> ring;
  NarrowFragments<Traits> r;
  bool begun = false;
  for_each_tile<Traits>(shared, [&](const AnnouncedTile& now, const Ring<Traits::kTiles>& place) {
    const NarrowConsumer<Traits> self{shared,       p,          exponent, now.tile,
                                      now.sequence, place.slot, warpgroup};
    const int steps = now.steps.count();
    clear_gradients(r);
    if (steps > 0) {
      if (!begun) {
        self.issue_first(r, ring, place.parity);
        self.await_first(r, ring);
      }
      self.take_steps(r, ring, steps);
    }
    auto next = place;
    next.advance();
    begun = next_is_here<Traits>(shared, next, ring, warpgroup);
    if (begun) {
      const AnnouncedTile after = shared.tile[next.slot];
      const NarrowConsumer<Traits> then{shared,         p,         exponent, after.tile,
                                        after.sequence, next.slot, warpgroup};
      then.issue_first(r, ring, next.parity);
      self.store_gradients(r, place.parity);
      then.await_first(r, ring);
    } else {
      self.store_gradients(r, place.parity);
    }
  });
}

// The warpgroup that multiplies dQ: it keeps K transposed in registers.
template <class Traits>
__device__ __forceinline__ void multiply_dq(typename Traits::Shared& shared,
                                            NarrowRings<Traits>& ring, const AnnouncedTile& now,
                                            int slot) {
  const int key = now.tile.block * Traits::kBlockKV;
  const Range rows = now.sequence.rows(key, Traits::kBlockKV);
  const bool hides =
      !now.sequence.all_visible(rows.begin, rows.end - rows.begin, key, Traits::kBlockKV);
  const int steps = now.steps.count();
  float dq[Traits::kBlockQ / 2];  // (dim, 64 rows)
  uint32_t k[Traits::kBlockKV / 4];
  if (steps > 0) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);  // K is there
    load_transposed(k, shared.k[slot]);
    if (hides) remove_non_finite<typename Traits::Element>(k);
    pin(k);
  }
  arrive_warp(shared.keys_read[slot]);
  for (int i = 0; i < steps; ++i) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);
    pin(dq);
    wgmma_begin();
    gemm_dq_transposed(dq, k, shared.ds[ring.ds.slot]);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
    arrive_warp(shared.ds_free[ring.ds.slot]);
    shared.dq_free[ring.dq.slot].wait(ring.dq.parity ^ 1);
    stage_dq(shared.dq[ring.dq.slot], dq);
    fence_async_proxy();
    arrive_warp(shared.dq_full[ring.dq.slot]);
    ring.ds.advance();
    ring.dq.advance();
  }
}

// The same of wider heads: K stays where it is, and half of the columns are computed at a time.
template <class Traits>
__device__ __forceinline__ void multiply_dq_halves(typename Traits::Shared& shared,
                                                   NarrowRings<Traits>& ring,
                                                   const AnnouncedTile& now, int slot) {
  const int steps = now.steps.count();
  for (int i = 0; i < steps; ++i) {
    shared.ds_full[ring.ds.slot].wait(ring.ds.parity);
#pragma unroll
    for (int half = 0; half < Traits::kChunks; ++half) {
      float dq[Traits::kColumnsDQ / 2];  // (64 rows, half of dim)
      wgmma_begin();
      gemm_dq(dq, shared.ds[ring.ds.slot], shared.k[slot][half]);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dq);
      if (half + 1 == Traits::kChunks) arrive_warp(shared.ds_free[ring.ds.slot]);
      shared.dq_free[half].wait(ring.dq.parity ^ 1);
      stage_dq(shared.dq[half], dq);
      fence_async_proxy();
      arrive_warp(shared.dq_full[half]);
    }
    ring.ds.advance();
    ring.dq.parity ^= 1;
  }
  arrive_warp(shared.keys_read[slot]);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads,
                             1) void backward_narrow(const __grid_constant__ BackwardParams p,
                                                     const __grid_constant__ BackwardMaps maps,
                                                     const __grid_constant__ Scratch scratch,
                                                     int tiles) {
  extern __shared__ uint8_t memory[];
  auto& shared = *align_shared<typename Traits::Shared>(memory);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  NarrowRings<Traits> ring;
  if (warpgroup == 0) {
    shrink_registers<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
      produce_tiles<Traits>(shared, p, maps, scratch, tiles);
    } else if (warp <= Traits::kStagesDQ && elect_one()) {
      add_dq_of_tiles<Traits>(shared, p, scratch, warp - 1);
    }
  } else if (warpgroup == Traits::kConsumers + 1) {
    shrink_registers<Traits::kSumRegisters>();
    for_each_tile<Traits>(shared, [&](const AnnouncedTile& now, const Ring<Traits::kTiles>& place) {
      if constexpr (Traits::kTransposed) {
        multiply_dq<Traits>(shared, ring, now, place.slot);
      } else {
        multiply_dq_halves<Traits>(shared, ring, now, place.slot);
      }
    });
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    if constexpr (Traits::kTiles > 1) {
      consume_tiles<Traits>(shared, p, warpgroup - 1);
    } else {
      const Exponent exponent(p);
      for_each_tile<Traits>(
          shared, [&](const AnnouncedTile& now, const Ring<Traits::kTiles>& place) {
            const NarrowConsumer<Traits> self{shared,       p,          exponent,     now.tile,
                                              now.sequence, place.slot, warpgroup - 1};
            self.take_tile(ring, now.steps.count(), place.parity);
          });
    }
    if constexpr (Traits::kFinishes) {
      // Its gradients are stored; K and V of its keys are read by nobody any more.
      named_sync(kWarpgroupDone + warpgroup - 1, kWarpgroup);
      const int warp = threadIdx.x / 32 % 4;
      auto& rows = warp < 2 ? shared.k[0][0] : shared.v[0][0];
      const int row = Traits::kKeysPerWarpgroup * (warpgroup - 1);
      finish_dq_blocks<Traits>(p, scratch, shared_address(rows[row]) + warp % 2 * kRoundedBytes);
    }
  }
}

}  // namespace flash::v3
