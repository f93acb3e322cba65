// FlashAttention-2: keep one Q block's output in registers and stream every K/V block past it.
#pragma once

#include "v2_parallel/gemm.cuh"
#include "v2_parallel/load.cuh"
#include "v2_parallel/pipeline.cuh"
#include "v2_parallel/softmax.cuh"
#include "v2_parallel/store.cuh"

namespace flash::v2 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Grid grid) {
  // --- work: a CTA owns one Q block of one head, or several in turn, each warp a slice of its rows
  Work<Traits> work(p, grid);
  if (work.tile().empty()) return;
  const Shared<Traits> smem;
  const Query<Traits> Q(smem);  // (kRowsPerWarp, kHeadDim)
  Flow<Traits, Traits::kWide> flow(smem, p, work.tile());

  do {
    const Tile<Traits>& tile = work.tile();
    typename Traits::Output O = {};  // (kRowsPerWarp, kHeadDimV) fp32, registers
    typename Traits::Scores S;       // (kRowsPerWarp, kBlockKV) fp32, registers
    Softmax<Traits> softmax(p, smem);
    bool poisoned = false;
    work.look_ahead(p, grid);
    flow.wait_q(work);

    for (int j = tile.blocks.begin; j < tile.blocks.end; ++j) {
      const bool edge = !tile.clean.holds(j);  // some row does not see some key
      poisoned |= flow.wait_k(j, edge);
      if (__builtin_expect(edge, false) && tile.warp_sees_none(j)) {
        poisoned |= flow.pass(work, j);
        continue;
      }

      // --- one block: S = Q K^T, P = softmax(S), O = O + P V
      const bool half = Traits::kHalves && edge && tile.half_suffices(j);
      gemm_qk(S, Q, smem, j, half, flow.beside_qk(tile, j));
      flow.release_k();
      cap<Traits>(S, p);
      if (__builtin_expect(edge, false)) mask(S, tile, j);
      softmax.update(S);
      softmax.rescale(O);
      poisoned |= flow.wait_v(j, edge);
      gemm_pv(O, S, softmax, smem, j, half, flow.beside_pv(work, j));
      flow.release_v();
    }

    flow.finish(work);
    softmax.normalize(O);  // divides by the sum once
    if (poisoned) restore_non_finite(O, p, tile);
    store_state(O, softmax, smem, p, tile);
  } while (work.advance());
}

}  // namespace flash::v2
