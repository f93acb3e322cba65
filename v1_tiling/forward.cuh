// FlashAttention-1: keep K/V blocks on chip and stream every Q block, with its O, m, l, past them.
#pragma once

#include "v1_tiling/gemm.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/quarantine.cuh"
#include "v1_tiling/softmax.cuh"
#include "v1_tiling/store.cuh"

namespace flash::v1 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Grid grid) {
  if constexpr (!Traits::kRuns) return;
  // --- work: one CTA owns slices of Q, one after another, each warp Q blocks of the slice
  Shared<Traits> smem(grid.stages);
  Visits<Traits> visits(smem, p, grid);
  const Tile<Traits>& tile = visits.tile;
  Query<Traits> Q(smem);      // (kRowsPerWarp, kHeadDim)
  typename Traits::Output O;  // (kRowsPerWarp, kHeadDim) fp32, registers
  typename Traits::Scores S;  // (kRowsPerWarp, kBlockKV) fp32, registers
  Softmax<Traits> softmax(p);

  while (visits.advance(smem, p, grid)) {
    load_q(smem, p, tile);
    load_state(O, softmax, p, grid, tile);
    wait_q(smem, tile);
    Q.keep();

    for (int j = tile.pass.begin; j < tile.pass.end; ++j) {
      load_kv(smem, p, tile, visits.next, j);
      wait_kv(smem, tile, j);
      const bool edge = !tile.warp_sees_all(j);  // some row does not see some key
      if (__builtin_expect(edge, false) && tile.warp_sees_none(j)) {
        release_kv(smem, tile, j);
        continue;
      }

      // --- one block: S = Q K^T, P = softmax(S), O = O + P V
      gemm_qk(S, Q, smem, j);
      cap<Traits>(S, p);
      if (__builtin_expect(edge, false)) mask(S, tile, j);
      softmax.update(S);
      softmax.rescale(O);
      const bool poisoned = __builtin_expect(edge, false) && quarantine(O, smem, tile, j);
      gemm_pv(O, S, softmax, smem, j, poisoned);
      release_kv(smem, tile, j);
    }

    softmax.normalize(O);  // divides by the sum at every visit
    store_state(O, softmax, smem, p, grid, tile);
  }
}

}  // namespace flash::v1
