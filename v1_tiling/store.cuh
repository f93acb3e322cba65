// O, m and l to memory and back at every visit; O and LSE at the last.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/gemm.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/softmax.cuh"

namespace flash::v1 {

template <class Traits>
__device__ __forceinline__ void store_lse(const Softmax<Traits>& softmax, const ForwardParams& p,
                                          const Tile<Traits>& tile) {
  const int lane = opaque(threadIdx.x % 32);
  if (p.lse.data == nullptr || lane % 4 != 0) return;
  float* gLSE = p.lse.data + tile.batch * p.lse.batch + tile.head * p.lse.head +
                tile.sequence.row_q;  // (seqlen_q)
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile.warp_row + m * 16 + h * 8 + lane / 4;
      if (row < tile.sequence.seqlen_q) gLSE[row] = softmax.lse(m, h);
    }
  }
}

// O from accumulators to shared memory, as rows of elements.
template <class Traits>
__device__ __forceinline__ void stage_output(const typename Traits::Output& O, uint32_t sO) {
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < Traits::kTilesV; ++n) {
        const float* pair = &O[m][n][2 * h];
        if constexpr (Traits::kFloat32) {
          const uint32_t to = sO + Rows::offset(row, 2 * n + lane % 4 / 2) + lane % 2 * 8;
          store_shared_4(to, __float_as_uint(pair[0]));
          store_shared_4(to + 4, __float_as_uint(pair[1]));
        } else {
          store_shared_4(sO + Rows::offset(row, n) + lane % 4 * 4,
                         pack<typename Traits::Element>(pair[0], pair[1]));
        }
      }
    }
  }
}

// Where this warp's Q block keeps its state; only this warp reads it, and only it writes it.
template <class Traits>
__device__ __forceinline__ float* state_address(const ForwardParams& p, const Grid& grid,
                                                const Tile<Traits>& tile) {
  const int64_t block =
      int64_t(blockIdx.x) * (grid.turns * grid.warps) + tile.turn * grid.warps + threadIdx.x / 32;
  return static_cast<float*>(p.workspace) + block * Traits::kStateFloats;
}

// O, m and l from memory, as the last visit left them.
template <class Traits>
__device__ __forceinline__ void load_state(typename Traits::Output& O, Softmax<Traits>& softmax,
                                           const ForwardParams& p, const Grid& grid,
                                           const Tile<Traits>& tile) {
  if (tile.absent || tile.first) return softmax.start(O);
  const int lane = opaque(threadIdx.x % 32);
  const auto* from = reinterpret_cast<const float4*>(state_address(p, grid, tile));
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
    const float4 rows = __ldcg(from + m * 8 + lane / 4);
    softmax.resume(m, 0, rows.x, rows.y);
    softmax.resume(m, 1, rows.z, rows.w);
  }
  from += Traits::kTilesQ * 8 + lane;
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n, from += 32) {
      const float4 x = __ldcg(from);
      O[m][n][0] = x.x, O[m][n][1] = x.y, O[m][n][2] = x.z, O[m][n][3] = x.w;
    }
  }
}

// O, m and l back to memory, for the next visit.
template <class Traits>
__device__ __forceinline__ void keep_state(const typename Traits::Output& O,
                                           const Softmax<Traits>& softmax, const ForwardParams& p,
                                           const Grid& grid, const Tile<Traits>& tile) {
  const int lane = opaque(threadIdx.x % 32);
  auto* to = reinterpret_cast<float4*>(state_address(p, grid, tile));
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
    const float4 rows = {softmax.reference[m][0], softmax.row_sum[m][0], softmax.reference[m][1],
                         softmax.row_sum[m][1]};
    if (lane % 4 == 0) __stcg(to + m * 8 + lane / 4, rows);
  }
  to += Traits::kTilesQ * 8 + lane;
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n, to += 32) {
      __stcg(to, make_float4(O[m][n][0], O[m][n][1], O[m][n][2], O[m][n][3]));
    }
  }
  __syncwarp();  // m and l are visible to the other lanes of the quad
}

// The finished O, through shared memory over the warp's own rows of Q, so that whole rows leave.
template <class Traits>
__device__ __forceinline__ void store_output(const typename Traits::Output& O, Shared<Traits>& smem,
                                             const ForwardParams& p, const Tile<Traits>& tile) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
  const uint32_t sO = opaque(smem.q());
  __syncwarp();  // no lane reads Q any more
  stage_output<Traits>(O, sO);
  __syncwarp();  // the warp's rows of O are complete in shared memory

  Element* gO = static_cast<Element*>(p.o.data) + tile.batch * p.o.batch + tile.head * p.o.head +
                (tile.sequence.row_q + tile.warp_row) * p.o.row;  // (kRowsPerWarp, kHeadDim)
  const int rows = tile.sequence.seqlen_q - tile.warp_row;
  constexpr int kElements = Traits::kChunkElements;
  bool aligned = true;
  if constexpr (Traits::kFeatured) {
    aligned = (reinterpret_cast<uint64_t>(gO) % 16 == 0) && p.o.row % kElements == 0;
  }
#pragma unroll 4
  for (int i = lane; i < Traits::kRowsPerWarp * Rows::kChunks; i += 32) {
    const int row = i / Rows::kChunks;
    const int chunk = i % Rows::kChunks;
    if (row >= rows || chunk * kElements >= p.head_dim_v) continue;
    alignas(16) uint32_t words[4];
    load_shared_16(words, sO + Rows::offset(row, chunk));
    Element* to = gO + row * p.o.row + chunk * kElements;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[e] = reinterpret_cast<const Element*>(words)[e];
    }
  }
}

// At the end of a visit: the result if this was the last one, else the state.
template <class Traits>
__device__ __forceinline__ void store_state(const typename Traits::Output& O,
                                            const Softmax<Traits>& softmax, Shared<Traits>& smem,
                                            const ForwardParams& p, const Grid& grid,
                                            const Tile<Traits>& tile) {
  if (tile.absent) return;
  if (!tile.last) return keep_state(O, softmax, p, grid, tile);
  store_lse(softmax, p, tile);
  store_output(O, smem, p, tile);
}

}  // namespace flash::v1
