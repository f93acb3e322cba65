// The two short kernels around the backward pass: row statistics before it, dQ's rounding after it.
#pragma once

#include "common/ptx.cuh"
#include "v3_hopper/schedule_backward.cuh"
#include "v3_hopper/softmax_backward.cuh"

namespace flash::v3 {

inline constexpr int kRowThreads = 256;

// The 64 query rows of one block: where they lie in tensors and in scratch memory.
struct RowBlock {
  int batch, head;
  int row, rows;  // first row in the sequence; valid rows, maybe none
  int64_t packed_row;
  int64_t index;  // of the block, all heads counted
  bool sees_keys;

  // One dimension of the grid; heads vary first, since their rows mostly lie side by side.
  __device__ __forceinline__ RowBlock(const BackwardParams& p, const Scratch& scratch)
      : RowBlock(p, scratch, blockIdx.x / p.heads_q / int(blocks_of(p.seqlen_q)),
                 blockIdx.x % p.heads_q, blockIdx.x / p.heads_q % int(blocks_of(p.seqlen_q))) {}

  __device__ __forceinline__ RowBlock(const BackwardParams& p, const Scratch& scratch, int batch,
                                      int head, int block)
      : batch(batch), head(head) {
    const Sequence sequence(p, batch);
    row = block * kGradientRows;
    rows = min(kGradientRows, sequence.seqlen_q - row);
    packed_row = sequence.row_q + row;
    const Range keys = sequence.keys(row, kGradientRows);
    sees_keys = keys.begin < keys.end;
    index = head * scratch.blocks + first_block(p, sequence, batch) + block;
  }
  template <class Element>
  __device__ __forceinline__ Element* of(const View& view) const {
    return static_cast<Element*>(view.data) + batch * view.batch + head * view.head +
           packed_row * view.row;
  }
  // Of a statistic of all rows, this block's.
  __device__ __forceinline__ const float* of(const RowStats& stats) const {
    return stats.data + batch * stats.batch + head * stats.head + packed_row;
  }
};

inline dim3 row_blocks(const Problem& p) {
  return dim3(unsigned(blocks_of(p.seqlen_q) * p.heads_q * p.batch));
}

// Sum of the products of 8 pairs of 16-bit elements.
template <class Element>
__device__ __forceinline__ float dot8(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w};
  const uint32_t y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack<Element>(x[i]);
    const float2 v = unpack<Element>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// Finds the places of a packed sequence's tiles, of keys or of rows, among those of all: sequences
// with the longest loops first.
template <bool kOfRows>
__device__ __forceinline__ void order_tiles(const BackwardParams& p, const Scratch& scratch,
                                            int batch) {
  __shared__ int before, all;
  if (threadIdx.x == 0) before = all = 0;
  __syncthreads();
  auto length_of = [&](int i) {
    return kOfRows ? p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i]
                   : p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i];
  };
  auto block_of = [&] { return kOfRows ? scratch.block_q : scratch.block_kv; };
  auto tiles_of = [&](int i) {
    const int* first = kOfRows ? p.cu_seqlens_q + i : p.cu_seqlens_k + i;
    return (first[1] - first[0] + block_of() - 1) / block_of();
  };
  const int length = length_of(batch);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.batch; i += kRowThreads) {
    const int other = length_of(i);
    const int tiles = tiles_of(i);
    atomicAdd(&all, tiles);
    if (other > length || (other == length && i < batch)) atomicAdd(&before, tiles);
  }
  __syncthreads();
  const int tiles = tiles_of(batch);
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles; i += kRowThreads) {
    const bool last_first = kOfRows ? p.window_right != kUnlimited : KeyTile::last_first(p);
    (kOfRows ? scratch.order_rows : scratch.order)[before + i] = {batch,
                                                                  last_first ? tiles - 1 - i : i};
  }
  if (batch > 0) return;
#pragma unroll 1
  for (int i = all + threadIdx.x; i < (kOfRows ? scratch.row_tiles : scratch.tiles_per_head);
       i += kRowThreads) {
    (kOfRows ? scratch.order_rows : scratch.order)[i] = {0, 1 << 20};  // behind all rows
  }
}

// delta = rowsum(dO * O) - dLSE, LSE in the unit that scores start with (softcap: base 2), and
// turns at zero. Both are stored negated.
template <class Element, int kDim, bool kSumsDQ>
__global__ __launch_bounds__(kRowThreads,
                             8) void prepare_rows(const __grid_constant__ BackwardParams p,
                                                  const __grid_constant__ Scratch scratch) {
  constexpr int kLanes = kDim <= 64 ? 8 : kDim <= 128 ? 16 : 32;  // per row
  if (kSumsDQ && blockIdx.x == 0 && threadIdx.x == 0) {
    *scratch.next_tile = 0;
    *scratch.next_share = 0;
  }
  const RowBlock block(p, scratch);
  const int group = p.heads_q / p.heads_kv;
  if (kSumsDQ && block.row == 0 && block.head % group == 0 && threadIdx.x == 0) {
    scratch.done[block.batch * p.heads_kv + block.head / group] = 0;
  }
  if (scratch.order != nullptr && block.row == 0 && block.head == 0) {
    order_tiles<false>(p, scratch, block.batch);
    if constexpr (!kSumsDQ) order_tiles<true>(p, scratch, block.batch);
  }
  if (block.rows <= 0) return;
  const int lane = threadIdx.x % kLanes;
  const Element* out = block.of<const Element>(p.o);
  const Element* dout = block.of<const Element>(p.dout);
#pragma unroll
  for (int row = threadIdx.x / kLanes; row < kGradientRows; row += kRowThreads / kLanes) {
    float sum = 0.0f;
    if (row < block.rows && lane * 8 < p.head_dim_v) {
      sum = dot8<Element>(*reinterpret_cast<const uint4*>(out + row * p.o.row + lane * 8),
                          *reinterpret_cast<const uint4*>(dout + row * p.dout.row + lane * 8));
    }
#pragma unroll
    for (int i = kLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (lane != 0) continue;
    // Rows without keys: P is 0 whatever the scores.
    const float unit = p.softcap > 0.0f ? kLog2E : 1.0f / Exponent::start_scale(p);
    float lse = -INFINITY * unit;
    float delta = 0.0f;
    if (row < block.rows) {
      const float natural = block.of(p.lse)[row];
      if (natural != -INFINITY) {
        lse = -natural * unit;
        delta = -sum;
        if (p.dlse.data != nullptr) delta += block.of(p.dlse)[row];
      }
    }
    scratch.lse[block.index * kGradientRows + row] = lse;
    scratch.delta[block.index * kGradientRows + row] = delta;
  }
  if (kSumsDQ && threadIdx.x < 2) scratch.turn[block.index * 2 + threadIdx.x] = 0;
  if (kSumsDQ && scratch.zeroed) {
    auto* sums = reinterpret_cast<float4*>(scratch.dq + block.index * (kGradientRows * kDim));
    for (int i = threadIdx.x; i < kGradientRows * kDim / 4; i += kRowThreads) sums[i] = float4{};
  }
}

// Rounds sums of a block of dQ, N / 8 columns for each thread of a warpgroup in the order of the
// accumulators, into rows of `kStride` elements. `rows` is the first of its columns.
template <int kStride, class Element, int N>
__device__ __forceinline__ void round_sums(Element* rows, const float4 (&sums)[N], float scale) {
  const int thread = threadIdx.x % kWarpgroup;
  auto* mine = rows + (thread / 32 * 16 + thread % 32 / 4) * kStride + thread % 4 * 2;
  auto put = [&](int at, float low, float high) {
    *reinterpret_cast<uint32_t*>(mine + at) = flash::pack<Element>(low * scale, high * scale);
  };
#pragma unroll
  for (int i = 0; i < N; ++i) {
    put(8 * i, sums[i].x, sums[i].y);
    put(8 * kStride + 8 * i, sums[i].z, sums[i].w);
  }
}

// dQ = scale * its fp32 sums. Each of two warpgroups takes half of the columns.
template <class Element, int kDim>
__global__ __launch_bounds__(kRowThreads) void round_dq(const __grid_constant__ BackwardParams p,
                                                        const __grid_constant__ Scratch scratch) {
  constexpr int kStride = kDim + 8;  // elements; spreads rows over banks
  __shared__ alignas(16) Element rows[kGradientRows * kStride];
  const RowBlock block(p, scratch);
  if (block.rows <= 0) return;
  const auto* dq =
      reinterpret_cast<const float4*>(scratch.dq + block.index * (kGradientRows * kDim) +
                                      threadIdx.x / kWarpgroup * (kGradientRows * kDim / 2));
  float4 sums[kDim / 16];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    // Of rows that see no keys nothing was summed.
    sums[i] = block.sees_keys ? __ldcs(dq + i * kWarpgroup + threadIdx.x % kWarpgroup) : float4{};
  }
  round_sums<kStride>(rows + threadIdx.x / kWarpgroup * (kDim / 2), sums, p.scale);
  __syncthreads();
  Element* target = block.of<Element>(p.dq);
#pragma unroll
  for (int i = threadIdx.x; i < kGradientRows * kDim / 8; i += kRowThreads) {
    const int to = i / (kDim / 8);
    const int piece = i % (kDim / 8) * 8;
    if (to >= block.rows || piece >= p.head_dim) continue;
    *reinterpret_cast<uint4*>(target + to * p.dq.row + piece) =
        *reinterpret_cast<const uint4*>(rows + to * kStride + piece);
  }
}

// dQ where there are no keys at all: zero.
template <class Element>
__global__ __launch_bounds__(kRowThreads) void clear_dq(const __grid_constant__ BackwardParams p,
                                                        const __grid_constant__ Scratch scratch) {
  const RowBlock block(p, scratch);
  const int pieces = p.head_dim / 8;
  Element* target = block.of<Element>(p.dq);
  for (int i = threadIdx.x; i < block.rows * pieces; i += kRowThreads) {
    *reinterpret_cast<uint4*>(target + i / pieces * p.dq.row + i % pieces * 8) = uint4{0, 0, 0, 0};
  }
}

}  // namespace flash::v3
