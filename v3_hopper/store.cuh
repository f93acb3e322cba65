// O and LSE -> global, straight from registers: a quad exchanges columns so that every thread
// writes 16 contiguous bytes. Nothing waits for it, and Q's buffer is free for the next tile.
#pragma once

#include "v3_hopper/softmax.cuh"

namespace flash::v3 {

// Quad transposition: thread c gives word k to thread k and receives word c of every thread.
__device__ __forceinline__ void exchange(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? word[i] : word[i + 1], 1);
    word[i] = odd ? received : word[i];
    word[i + 1] = odd ? word[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, high ? word[i] : word[i + 2], 2);
    word[i] = high ? received : word[i];
    word[i + 2] = high ? word[i + 2] : received;
  }
}

// `row` is the first of this thread's two rows, in the sequence.
template <class Traits>
__device__ __forceinline__ void store_state(const ForwardParams& p, const Work& work, int row,
                                            const float (&o)[Traits::kHeadDimV / 2],
                                            const float (&lse)[2]) {
  const Sequence& sequence = work.sequence;
  const int batch = p.cu_seqlens_q ? 0 : work.batch;
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool inside = row + 8 * half < sequence.seqlen_q;
    const int64_t global_row = sequence.row_q + row + 8 * half;
    auto* gO = static_cast<typename Traits::Output*>(p.o.data) + batch * p.o.batch +
               global_row * p.o.row + work.head * p.o.head;
#pragma unroll
    for (int group = 0; group < Traits::kHeadDimV / 32; ++group) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 16 * group + 4 * i + 2 * half;
        word[i] = pack_pair<typename Traits::Output>(o[at], o[at + 1]);
      }
      exchange(word);
      const int column = 32 * group + 8 * quad_lane;
      if (inside && column < p.head_dim_v) {
        *reinterpret_cast<uint4*>(gO + column) = {word[0], word[1], word[2], word[3]};
      }
    }
    if (inside && quad_lane == 0 && p.lse.data != nullptr) {
      p.lse.data[batch * p.lse.batch + work.head * p.lse.head + global_row] = lse[half];
    }
  }
}

// A tile whose rows see no key: O = 0, lse = -inf. One warp.
template <class Traits>
__device__ __forceinline__ void store_nothing(const ForwardParams& p, const Work& work) {
  const int batch = p.cu_seqlens_q ? 0 : work.batch;
  const int rows = min(Traits::kBlockQ, work.sequence.seqlen_q - work.row);
  const int64_t first_row = work.sequence.row_q + work.row;
  auto* gO = static_cast<typename Traits::Output*>(p.o.data) + batch * p.o.batch +
             first_row * p.o.row + work.head * p.o.head;
  const int vectors = p.head_dim_v / 8;
  for (int i = threadIdx.x % kWarp; i < rows * vectors; i += kWarp) {
    *reinterpret_cast<uint4*>(gO + i / vectors * p.o.row + i % vectors * 8) = {0, 0, 0, 0};
  }
  float* lse = p.lse.data + batch * p.lse.batch + work.head * p.lse.head + first_row;
  for (int i = threadIdx.x % kWarp; i < rows && p.lse.data != nullptr; i += kWarp) {
    lse[i] = -INFINITY;
  }
}

}  // namespace flash::v3
