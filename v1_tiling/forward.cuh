// FlashAttention-1: keep K/V blocks on chip and stream every Q block, with its O, m, l, past them.
#pragma once

#include "v1_tiling/gemm.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/quarantine.cuh"
#include "v1_tiling/softmax.cuh"
#include "v1_tiling/store.cuh"

namespace flash::v1 {

// --- one visit: a Q block takes up its state, meets the K/V blocks of a pass, and leaves its state
template <class Traits>
__device__ __forceinline__ void visit(Shared<Traits>& smem, const ForwardParams& p,
                                      const Grid& grid, const Tile<Traits>& tile, Range pass,
                                      int turn) {
  const bool last_turn = turn == grid.turns - 1;
  Query<Traits> Q(smem);      // (kRowsPerWarp, kHeadDim)
  typename Traits::Output O;  // (kRowsPerWarp, kHeadDim) fp32, registers
  typename Traits::Scores S;  // (kRowsPerWarp, kBlockKV) fp32, registers
  Softmax<Traits> softmax(p);

  if (!tile.absent) load_state(O, softmax, p, grid, tile);
  wait_q(smem);
  Q.keep();

  for (int j = pass.begin; j < pass.end; ++j) {
    wait_kv(smem, j);
    if (!tile.warp_sees_none(j)) {
      // --- one block: S = Q K^T, P = softmax(S), O = O + P V
      gemm_qk(S, Q, smem, j);
      cap<Traits>(S, p);
      const bool partial = !tile.warp_sees_all(j);
      if (partial) mask(S, tile, j);
      softmax.update(S);
      softmax.rescale(O);
      if (partial && poisoned(smem, j)) {
        gemm_pv_poisoned(O, S, softmax, smem, tile, j);
      } else {
        gemm_pv<Traits>(O, S, softmax, smem, j);
      }
    }
    if (last_turn) release_kv(smem, p, tile, pass, j);
  }

  // The next Q block comes while this one leaves; but a finished O leaves through its place.
  const bool more = !last_turn || pass.end < tile.blocks.end;
  const int next = Tile<Traits>::q_block_of(grid, last_turn ? 0 : turn + 1);
  const bool finished = tile.last && !tile.absent;
  if (more && !finished) load_q(smem, p, tile, next);
  if (!tile.absent) {
    softmax.normalize(O);  // divides by the sum at every visit
    store_state(O, softmax, smem, p, grid, tile);
  }
  if (more && finished) load_q(smem, p, tile, next);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Grid grid) {
  if constexpr (Traits::kRuns) {
    // --- work: one CTA owns slices of Q, one after another, each warp Q blocks of the slice
    Shared<Traits> smem(grid.stages);
    auto& tile = smem.template tile<Tile<Traits>>();
    for (int round = 0; grid.tile(round) < grid.tiles; ++round) {
      __syncwarp();  // no lane reads the last tile any more
      tile = Tile<Traits>(p, grid, grid.tile(round));
      __syncwarp();  // every lane sees the tile
      if (tile.empty()) continue;
      smem.ring.restart(tile.blocks.begin);
      load_q(smem, p, tile, Tile<Traits>::q_block_of(grid, 0));
      for (int s = 0; s < grid.stages; ++s) load_kv(smem, p, tile, tile.blocks.begin + s);

      Range pass = tile.first_pass();
      do {
        for (int turn = 0; turn < grid.turns; ++turn) {
          tile.visit(grid, pass, turn);
          visit(smem, p, grid, tile, pass, turn);
        }
        smem.ring.advance(pass.end);
        pass = tile.next_pass(pass);
      } while (pass.begin < pass.end);
    }
  }
}

}  // namespace flash::v1
