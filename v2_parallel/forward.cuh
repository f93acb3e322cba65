// FlashAttention-2: keep one Q block's output in registers and stream every K/V block past it.
#pragma once

#include "v2_parallel/gemm.cuh"
#include "v2_parallel/load.cuh"
#include "v2_parallel/softmax.cuh"
#include "v2_parallel/store.cuh"

namespace flash::v2 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Grid grid) {
  // --- work: one CTA owns one Q block of one head, each warp a slice of its rows
  const Tile<Traits> tile(p, grid);
  if (tile.empty()) return;
  const Shared<Traits> smem;
  Query<Traits> Q(smem);           // (kRowsPerWarp, kHeadDim)
  typename Traits::Output O = {};  // (kRowsPerWarp, kHeadDimV) fp32, registers
  typename Traits::Scores S;       // (kRowsPerWarp, kBlockKV) fp32, registers
  Softmax<Traits> softmax(p, smem);

  load_q(smem, p, tile);
  for (int s = 0; s < Traits::kStages - 1; ++s) load_kv(smem, p, tile, tile.blocks.begin + s);

  bool poisoned = false;
  for (int j = tile.blocks.begin; j < tile.blocks.end; ++j) {
    const bool edge = !tile.clean.holds(j);  // some row does not see some key
    poisoned |= wait_kv(smem, j, edge);
    KeyValueCopy<Traits> later(smem, p, tile, j + Traits::kStages - 1);
    if (__builtin_expect(edge, false) && tile.warp_sees_none(j)) {
      later.issue(0, 1);
      continue;
    }

    // --- one block: S = Q K^T, P = softmax(S), O = O + P V
    gemm_qk(S, Q, smem, j, later);
    cap<Traits>(S, p);
    if (__builtin_expect(edge, false)) mask(S, tile, j);
    softmax.update(S);
    softmax.rescale(O);
    gemm_pv(O, S, softmax, smem, j);
  }

  softmax.normalize(O);  // divides by the sum once
  if (poisoned) restore_non_finite(O, p, tile);
  store_state(O, softmax, smem, p, tile);
}

}  // namespace flash::v2
