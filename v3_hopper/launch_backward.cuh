// The backward pass on the host: tensor maps, scratch memory, and the launch of three kernels.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "v3_hopper/backward.cuh"
#include "v3_hopper/backward_keys.cuh"
#include "v3_hopper/backward_narrow.cuh"
#include "v3_hopper/backward_queries.cuh"
#include "v3_hopper/rows_backward.cuh"

namespace flash::v3 {

inline constexpr int kLeastKeys = 64;  // of a tile of any kernel
inline constexpr int kRowsOfDQ = 128;  // of a tile of the kernel that sums dQ alone

// Bytes of scratch memory in the order of its parts, each 256-byte aligned.
struct ScratchLayout {
  int64_t blocks, dq, stats;
  int64_t turns;  // behind them next tile and share, heads done
  int64_t order, order_rows;

  ScratchLayout(const Problem& p, int dim, bool varlen) {
    const int64_t uniform = p.batch * blocks_of(p.seqlen_q);
    const int64_t packed = p.total_q / kGradientRows + p.batch;
    blocks = varlen ? packed : uniform;
    dq = p.heads_q * blocks * kGradientRows * dim * int64_t(sizeof(float));
    stats = p.heads_q * blocks * kGradientRows * int64_t(sizeof(float));
    const int64_t heads = int64_t(p.batch) * p.heads_kv;
    turns = ((p.heads_q * blocks * 2 + 2 + heads) * int64_t(sizeof(int)) + 255) / 256 * 256;
    order_rows = p.total_k / kLeastKeys + p.batch;
    order = varlen ? (order_rows + p.total_q / kRowsOfDQ + p.batch) * int64_t(sizeof(int2)) : 0;
  }
  int64_t bytes() const { return dq + 2 * stats + turns + order; }
};

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Heads whose key tiles run side by side: one when every tile is as long as the next, else as
// many as leave Q, dO and the fp32 dQ of all of them in L2 (of a group the query head that its
// tiles are at), so few that a head's tiles still meet. All of them where there are few tiles: an
// uneven end costs most there.
inline int heads_at_once(const Problem& p, int64_t heads, int tiles_per_head, bool alike) {
  if (alike) return 1;
  if (heads * tiles_per_head <= 4 * multiprocessors()) return std::max(int(heads), 1);
  const int64_t bytes_per_head = int64_t(p.seqlen_q) * p.head_dim * int64_t(2 + 2 + 4);
  constexpr int64_t kL2Share = 32 << 20;
  constexpr int64_t kMost = 16;
  const int64_t in_l2 = kL2Share / std::max<int64_t>(bytes_per_head, 1);
  const int64_t fit = std::max<int64_t>(std::min(in_l2, kMost), 1);
  // All rounds alike: a short last one would end with long tiles on few multiprocessors. Up to half
  // as many heads again are taken for that.
  int64_t best = 1, last_of_best = 0;
  for (int64_t i = std::min(fit, heads); i <= std::min(fit + fit / 2, heads); ++i) {
    const int64_t last = (heads - 1) % i + 1;  // heads of the last round, of i
    if (last * best >= last_of_best * i) best = i, last_of_best = last;
  }
  return int(best);
}

inline Scratch make_scratch(const BackwardParams& p, int dim, int block_kv) {
  const ScratchLayout layout(p, dim, p.cu_seqlens_q != nullptr);
  auto* base = static_cast<char*>(p.workspace);
  Scratch scratch;
  scratch.dq = reinterpret_cast<float*>(base);
  scratch.lse = reinterpret_cast<float*>(base + layout.dq);
  scratch.delta = reinterpret_cast<float*>(base + layout.dq + layout.stats);
  scratch.turn = reinterpret_cast<int*>(base + layout.dq + 2 * layout.stats);
  scratch.next_tile = scratch.turn + p.heads_q * layout.blocks * 2;
  scratch.next_share = scratch.next_tile + 1;
  scratch.done = scratch.next_share + 1;
  scratch.blocks = layout.blocks;
  scratch.block_kv = block_kv;
  scratch.tiles_per_head = (p.seqlen_k + block_kv - 1) / block_kv;
  scratch.shares = 0;
  scratch.tiles = scratch.tiles_per_head * p.heads_kv * p.batch;
  const bool alike = p.window_left == kUnlimited && p.window_right == kUnlimited;
  scratch.heads_at_once =
      heads_at_once(p, int64_t(p.batch) * p.heads_kv, scratch.tiles_per_head, alike);
  scratch.order = scratch.order_rows = nullptr;
  scratch.zeroed = false;
  return scratch;
}

// Packed sequences: their key tiles, as many as there may be, in an order that the device finds.
// The tiles of all sequences count as those of one head.
inline void order_packed(Scratch& scratch, const BackwardParams& p, int dim) {
  const bool packed = p.cu_seqlens_q != nullptr && p.cu_seqlens_k != nullptr;
  if (!packed || p.seqlen_q == 0 || p.seqlen_k == 0) return;
  const ScratchLayout layout(p, dim, true);
  scratch.order = reinterpret_cast<int2*>(reinterpret_cast<char*>(scratch.turn) + layout.turns);
  scratch.order_rows = scratch.order + layout.order_rows;
  scratch.tiles_per_head = int(std::min<int64_t>(int64_t(scratch.tiles_per_head) * p.batch,
                                                 p.total_k / scratch.block_kv + p.batch));
  scratch.tiles = scratch.tiles_per_head * p.heads_kv;
  scratch.heads_at_once = heads_at_once(p, p.heads_kv, scratch.tiles_per_head, false);
}

template <class Element>
cudaError_t make_backward_maps(BackwardMaps& maps, const BackwardParams& p, int rows_q,
                               int rows_kv) {
  const bool varlen_q = p.cu_seqlens_q != nullptr;
  const bool varlen_k = p.cu_seqlens_k != nullptr;
  auto shape = [&](int64_t dim, bool is_q) {
    const bool varlen = is_q ? varlen_q : varlen_k;
    const int64_t rows =
        is_q ? (varlen ? p.total_q : p.seqlen_q) : (varlen ? p.total_k : p.seqlen_k);
    return MapShape{kMapType<Element>,
                    int(sizeof(Element)),
                    dim,
                    rows,
                    is_q ? p.heads_q : p.heads_kv,
                    varlen ? 1 : p.batch,
                    kChunkColumns,
                    is_q ? rows_q : rows_kv};
  };
  cudaError_t status = make_map(maps.q, p.q, shape(p.head_dim, true));
  if (status == cudaSuccess) status = make_map(maps.k, p.k, shape(p.head_dim, false));
  if (status == cudaSuccess) status = make_map(maps.v, p.v, shape(p.head_dim_v, false));
  if (status == cudaSuccess) status = make_map(maps.dout, p.dout, shape(p.head_dim_v, true));
  return status;
}

// Whether dQ is zeroed beforehand. Else the first key tile of a block stores it, and all others
// keep its pace: where a group's heads let all key tiles of a head go side by side to the end, that
// costs more than zeros.
inline bool zeroes_dq(const BackwardParams& p) {
  constexpr int kLongKeys = 4096;
  return p.heads_q > p.heads_kv && p.seqlen_k >= kLongKeys && p.window_left == kUnlimited &&
         !p.deterministic;
}

// Shares of dQ that the kernel of key tiles rounds itself, all or none: where all tiles are alike
// and long, and the last ones leave multiprocessors idle for long enough. A block takes a quarter
// of a step.
inline int shares_of_dq(const BackwardParams& p, const Scratch& scratch) {
  constexpr int kLongRows = 2048;
  const bool alike = p.seqlen_q >= kLongRows && p.window_left == kUnlimited &&
                     p.window_right == kUnlimited && p.cu_seqlens_q == nullptr &&
                     p.cu_seqlens_k == nullptr;
  const int grid = multiprocessors();
  const int64_t idle = (grid - scratch.tiles % grid) % grid;
  const int64_t heads = int64_t(p.batch) * p.heads_kv;
  return alike && 4 * idle >= heads ? shares_per_head(p) * int(heads) : 0;
}

// 97 to 128 dims: one kernel for all gradients, between two short ones; or none behind it.
template <class Traits>
cudaError_t launch_medium(const BackwardParams& p) {
  using Element = typename Traits::Element;
  BackwardMaps maps;
  cudaError_t status = make_backward_maps<Element>(maps, p, Traits::kBlockQ, Traits::kBlockKV);
  if (status != cudaSuccess) return status;
  constexpr int kDim = Traits::kHeadDim;
  Scratch scratch = make_scratch(p, kDim, Traits::kBlockKV);
  order_packed(scratch, p, kDim);
  scratch.zeroed = zeroes_dq(p);
  scratch.shares = shares_of_dq(p, scratch);
  const dim3 rows = row_blocks(p);
  const dim3 grid(scratch.tiles + scratch.shares);
  if (rows.x > 0) {
    status = launch(prepare_rows<Element, kDim, true>, rows, kRowThreads, 0, p.stream, p, scratch);
  }
  if (status == cudaSuccess && grid.x > 0) {
    status = launch(backward<Traits>, grid, Traits::kThreads, Traits::kSharedBytes, p.stream, p,
                    maps, scratch);
  }
  if (status == cudaSuccess && rows.x > 0 && scratch.shares == 0) {
    status = launch(round_dq<Element, kDim>, rows, kRowThreads, 0, p.stream, p, scratch);
  }
  return status;
}

// Up to 96 dims: the same with CTAs that stay, one per multiprocessor. Up to 64 they also round dQ.
template <class Traits>
cudaError_t launch_narrow(const BackwardParams& p) {
  using Element = typename Traits::Element;
  BackwardMaps maps;
  cudaError_t status = make_backward_maps<Element>(maps, p, Traits::kBlockQ, Traits::kBlockKV);
  if (status != cudaSuccess) return status;
  constexpr int kDim = Traits::kDimDQ;
  Scratch scratch = make_scratch(p, kDim, Traits::kBlockKV);
  const int64_t most = int64_t(scratch.tiles_per_head) * p.heads_kv * p.batch;
  if (most > (1 << 30)) return cudaErrorInvalidValue;  // tiles are counted in 32 bits
  order_packed(scratch, p, kDim);
  const int tiles = scratch.tiles;
  const dim3 rows = row_blocks(p);
  if (Traits::kFinishes) scratch.shares = narrow_shares(p);
  if (rows.x > 0) {
    status = launch(prepare_rows<Element, kDim, true>, rows, kRowThreads, 0, p.stream, p, scratch);
  } else {
    status = cudaMemsetAsync(scratch.next_tile, 0, 2 * sizeof(int), p.stream);  // and the share
  }
  if (status == cudaSuccess && tiles > 0) {
    const dim3 grid(unsigned(std::min(tiles, multiprocessors())));
    status = launch(backward_narrow<Traits>, grid, Traits::kThreads, Traits::kSharedBytes, p.stream,
                    p, maps, scratch, tiles);
  }
  if (status == cudaSuccess && rows.x > 0) {
    if (tiles == 0) {
      status = launch(clear_dq<Element>, rows, kRowThreads, 0, p.stream, p, scratch);
    } else if constexpr (!Traits::kFinishes) {
      status = launch(round_dq<Element, kDim>, rows, kRowThreads, 0, p.stream, p, scratch);
    }
  }
  return status;
}

// Wider: dK and dV of all keys, then dQ of all rows.
template <class Keys, class Queries>
cudaError_t launch_wide(const BackwardParams& p) {
  using Element = typename Keys::Element;
  BackwardMaps keys_maps, queries_maps;
  cudaError_t status = make_backward_maps<Element>(keys_maps, p, Keys::kBlockQ, Keys::kBlockKV);
  if (status == cudaSuccess) {
    status = make_backward_maps<Element>(queries_maps, p, Queries::kBlockQ, Queries::kBlockKV);
  }
  if (status != cudaSuccess) return status;
  Scratch scratch = make_scratch(p, 0, Keys::kBlockKV);
  order_packed(scratch, p, 0);
  scratch.block_q = kRowsOfDQ;
  static_assert(kRowsOfDQ == Queries::kBlockQ);
  scratch.row_tiles = (p.seqlen_q + kRowsOfDQ - 1) / kRowsOfDQ * p.batch;
  if (scratch.order != nullptr) {
    scratch.row_tiles = int(std::min<int64_t>(scratch.row_tiles, p.total_q / kRowsOfDQ + p.batch));
  }
  const dim3 rows = row_blocks(p);
  const dim3 key_tiles(scratch.tiles);
  const dim3 row_tiles(scratch.row_tiles * p.heads_q);
  if (rows.x > 0) {
    status = launch(prepare_rows<Element, Keys::kHeadDimV, false>, rows, kRowThreads, 0, p.stream,
                    p, scratch);
  }
  if (status == cudaSuccess && key_tiles.x > 0) {
    status = launch(backward_keys<Keys>, key_tiles, Keys::kThreads, Keys::kSharedBytes, p.stream, p,
                    keys_maps, scratch);
  }
  if (status == cudaSuccess && row_tiles.x > 0) {
    status = launch(backward_queries<Queries>, row_tiles, Queries::kThreads, Queries::kSharedBytes,
                    p.stream, p, queries_maps, scratch);
  }
  return status;
}

template <class Instance>
inline constexpr bool kWide = Instance::kHeadDim > 128 || Instance::kHeadDimV > 128;
template <class Instance>
inline constexpr bool kNarrow = Instance::kHeadDim <= 96 && Instance::kHeadDimV <= 96;

template <class Instance>
cudaError_t launch_backward(const BackwardParams& p) {
  if constexpr (kWide<Instance>) {
    return p.softcap > 0.0f
               ? launch_wide<KeysTraits<Instance, true>, QueriesTraits<Instance, true>>(p)
               : launch_wide<KeysTraits<Instance, false>, QueriesTraits<Instance, false>>(p);
  } else if constexpr (kNarrow<Instance>) {
    return p.softcap > 0.0f ? launch_narrow<NarrowTraits<Instance, true>>(p)
                            : launch_narrow<NarrowTraits<Instance, false>>(p);
  } else {
    return p.softcap > 0.0f ? launch_medium<BackwardTraits<Instance, true>>(p)
                            : launch_medium<BackwardTraits<Instance, false>>(p);
  }
}

template <class Traits>
Plan plan_of(const Problem& p, int scratch_dim) {
  Plan plan;
  plan.block_q = Traits::kBlockQ;
  plan.block_kv = Traits::kBlockKV;
  plan.stages = Traits::kStagesQ;
  plan.threads = Traits::kThreads;
  plan.grid =
      int64_t((p.seqlen_k + Traits::kBlockKV - 1) / Traits::kBlockKV) * p.heads_kv * p.batch;
  plan.shared_bytes = Traits::kSharedBytes;
  const int64_t dense = ScratchLayout(p, scratch_dim, false).bytes();
  const int64_t varlen = ScratchLayout(p, scratch_dim, true).bytes();
  plan.workspace_bytes = dense > varlen ? dense : varlen;
  return plan;
}

template <class Instance>
Plan plan_backward(const Problem& p) {
  if constexpr (kWide<Instance>) {
    return plan_of<KeysTraits<Instance, false>>(p, 0);
  } else if constexpr (kNarrow<Instance>) {
    using Traits = NarrowTraits<Instance, false>;
    Plan plan = plan_of<Traits>(p, Traits::kDimDQ);
    plan.grid = std::min<int64_t>(plan.grid, multiprocessors());
    return plan;
  } else {
    using Traits = BackwardTraits<Instance, false>;
    return plan_of<Traits>(p, Traits::kHeadDim);
  }
}

}  // namespace flash::v3
