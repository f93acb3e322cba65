// O and LSE to global memory, once per Q block.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "v2_parallel/load.cuh"
#include "v2_parallel/softmax.cuh"

namespace flash::v2 {

// NaN and infinities that wait_kv took out of V, added to the rows that do see their keys.
template <class Traits>
__device__ __forceinline__ void restore_non_finite(typename Traits::Output& O,
                                                   const ForwardParams& p,
                                                   const Tile<Traits>& tile) {
  using Element = typename Traits::Element;
  const Team<Traits> team;
  const int lane = threadIdx.x % 32;
  const auto* gV = static_cast<const uint16_t*>(p.v.data) + tile.batch * p.v.batch +
                   tile.head_kv * p.v.head + tile.sequence.row_k * p.v.row;  // (seqlen_k, dim)
#pragma unroll 1
  for (int key = tile.blocks.begin * Traits::kBlockKV; key < tile.last_key; ++key) {
    if (tile.clean.holds(key / Traits::kBlockKV)) continue;
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n) {
      const int column = team.column_tile(n) * 8 + lane % 4 * 2;
      if (column >= p.head_dim_v) continue;
      const uint16_t* pair = gV + key * p.v.row + column;
#pragma unroll
      for (int e = 0; e < 4 * Traits::kTilesQ; ++e) {
        const uint32_t value = pair[e % 2];
        const int row = tile.warp_row + e / 2 * 8 + lane / 4;
        if (any_non_finite<Element>(value) && tile.sequence.visible(row, key)) {
          O[e / 4][n][e % 4] += unpack<Element>(value).x;
        }
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_lse(const Softmax<Traits>& softmax, const ForwardParams& p,
                                          const Tile<Traits>& tile) {
  const int lane = threadIdx.x % 32;
  if (p.lse.data == nullptr || lane % 4 != 0 || softmax.team.part != 0) return;
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

// Where O passes through shared memory, so that whole rows leave at once: over the warp's own rows
// of Q, or, where those are already the next tile's, over its part of P, which holds fewer columns.
template <class Traits>
struct Staging {
  using Element = typename Traits::Element;
  using Rows = std::conditional_t<Traits::kPersistent, typename Traits::WeightRows,
                                  typename Traits::ValueRows>;
  static constexpr int kAtOnce = Traits::kPersistent ? Traits::kTilesKV : Traits::kTilesV;
  const Team<Traits>& team;
  const uint32_t rows;
  const int lane = threadIdx.x % 32;

  __device__ __forceinline__ Staging(const Shared<Traits>& smem, const Team<Traits>& team)
      : team(team),
        rows(Traits::kPersistent ? smem.p() + team.first_row * Rows::kRowBytes
                                 : smem.q + team.first_row * Traits::QueryRows::kRowBytes) {}

  __device__ __forceinline__ uint32_t address(int row, int n) const {
    const bool parted = Traits::kPersistent;
    return rows +
           Rows::offset(row, parted ? team.part * kAtOnce + n % kAtOnce : team.column_tile(n));
  }
  // Tiles [first, end) of O, of this lane.
  __device__ __forceinline__ void write(const typename Traits::Output& O, int first,
                                        int end) const {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = first; n < end; ++n) {
          store_shared_4(address(m * 16 + h * 8 + lane / 4, n) + lane % 4 * 4,
                         pack<Element>(O[m][n][2 * h], O[m][n][2 * h + 1]));
        }
      }
    }
  }
};

// Eight elements, one by one where rows are not 16-byte aligned.
template <class Element>
__device__ __forceinline__ void store_chunk(Element* to, const uint32_t (&words)[4], bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  auto* halves = reinterpret_cast<uint16_t*>(to);
#pragma unroll
  for (int w = 0; w < 8; ++w) halves[w] = uint16_t(words[w / 2] >> (w % 2 * 16));
}

template <class Traits>
__device__ __forceinline__ void store_state(const typename Traits::Output& O,
                                            const Softmax<Traits>& softmax,
                                            const Shared<Traits>& smem, const ForwardParams& p,
                                            const Tile<Traits>& tile) {
  using Element = typename Traits::Element;
  constexpr int kTiles = Traits::kTilesV, kAtOnce = Staging<Traits>::kAtOnce;
  store_lse(softmax, p, tile);
  const Team<Traits>& team = softmax.team;
  const Staging<Traits> staging(smem, team);
  Element* gO = static_cast<Element*>(p.o.data) + tile.batch * p.o.batch + tile.head * p.o.head +
                (tile.sequence.row_q + tile.warp_row) * p.o.row;  // (kRowsPerWarp, kHeadDimV)
  const int rows = tile.sequence.seqlen_q - tile.warp_row;
  bool aligned = true;
  if constexpr (Traits::kFeatured) {
    aligned = (reinterpret_cast<uint64_t>(gO) % 16 == 0) && p.o.row % 8 == 0;
  }
  if constexpr (Traits::kPersistent) team.sync();  // the other warp has read P
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    const int end = first + kAtOnce < kTiles ? first + kAtOnce : kTiles;
    const int tiles = end - first;
    staging.write(O, first, end);
    __syncwarp();  // the warp's part of O is complete in shared memory
#pragma unroll 4
    for (int i = staging.lane; i < Traits::kRowsPerWarp * tiles; i += 32) {
      const int row = i / tiles, n = first + i % tiles;
      const int chunk = team.column_tile(n);
      if (row >= rows || chunk * 8 >= p.head_dim_v) continue;
      uint32_t words[4];
      load_shared_16(words, staging.address(row, n));
      store_chunk(gO + row * p.o.row + chunk * 8, words, aligned);
    }
    if constexpr (Traits::kPersistent) __syncwarp();  // all of it was read
  }
}

}  // namespace flash::v2
