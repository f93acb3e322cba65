// fp32 products from fp16 matrix instructions: a row is a power of two times the sum of two rows of
// fp16, which together hold its 22 leading bits.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace flash::v1 {

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address) : "memory");
  return r;
}

// The inverse of a power of 2.
__device__ __forceinline__ float inverse_of(uint32_t bits) {
  return __uint_as_float(0x7f000000u - bits);
}

// The power of 2 that brings a value into [2^14, 2^15), for values from 2^-112 on; those below
// are then exact multiples of what fp16 can hold.
__device__ __forceinline__ float split_scale(float largest) {
  const uint32_t exponent = __float_as_uint(largest) & 0x7f800000u;
  return __uint_as_float((127u + 127 + 14 << 23) - max(exponent, 15u << 23));
}

// x and y as sums of two fp16 each, both rounded.
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack<__half>(x, y);
  const float2 part = unpack<__half>(high);
  low = pack<__half>(x - part.x, y - part.y);
}

// Matrix instructions cut the sum where fp32 would round it, so a long chain of them drifts towards
// zero. Hence short chains, each begun from zero: one for the leading products, one for the rest,
// whose cuts do not count; total() rounds. The product of two low parts is below the last bit.
template <int kTiles>
struct SplitSums {
  float leading[kTiles][4] = {}, rest[kTiles][4] = {};

  // Tiles [first, first + 2) get A (16, 16) times B (16, 8); words 2 n, 2 n + 1 of B are tile n's.
  __device__ __forceinline__ void add(int first, const uint32_t (&a_high)[4],
                                      const uint32_t (&a_low)[4], const uint32_t (&b_high)[4],
                                      const uint32_t (&b_low)[4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma_m16n8k16<__half>(rest[first + n], a_low, b_high[2 * n], b_high[2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma_m16n8k16<__half>(leading[first + n], a_high, b_high[2 * n], b_high[2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma_m16n8k16<__half>(rest[first + n], a_high, b_low[2 * n], b_low[2 * n + 1]);
    }
  }
  __device__ __forceinline__ float total(int n, int e) const { return leading[n][e] + rest[n][e]; }
  // x += total * unit. One after the other, which needs no register besides.
  __device__ __forceinline__ void add_to(float& x, int n, int e, float unit = 1.0f) const {
    x = fmaf(rest[n][e], unit, x);
    x = fmaf(leading[n][e], unit, x);
  }
};

// Rows of which `lanes` neighbouring lanes have 4 values each, several at once.
template <int kRows>
struct SplitRows {
  float x[kRows][4];
  uint2 high[kRows], low[kRows];
  float unit[kRows];  // what the parts are to be multiplied with

  // The largest value of a row comes to lie in [2^14, 2^15): what is up to 2^28 times smaller is
  // split to its last bits. Values that are not finite stay so in the high part.
  __device__ __forceinline__ void split_all(int lanes) {
    float largest[kRows];
    find_largest(largest, lanes, [](float x) { return fabsf(x); });
    bool infinite = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) infinite |= isinf(largest[i]);
    if (__any_sync(kFullWarp, infinite)) {
      find_largest(largest, lanes, [](float x) { return isfinite(x) ? fabsf(x) : 0.0f; });
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float scale = split_scale(largest[i]);
      unit[i] = inverse_of(__float_as_uint(scale));
      split(x[i][0] * scale, x[i][1] * scale, high[i].x, low[i].x);
      split(x[i][2] * scale, x[i][3] * scale, high[i].y, low[i].y);
    }
  }

 private:
  // Of magnitude(x), over all lanes that share a row.
  template <class Magnitude>
  __device__ __forceinline__ void find_largest(float (&largest)[kRows], int lanes,
                                               Magnitude magnitude) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      largest[i] = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[i] = fmaxf(largest[i], magnitude(x[i][e]));
    }
#pragma unroll
    for (int offset = 1; offset < lanes; offset *= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], offset));
      }
    }
  }
};

__device__ __forceinline__ void store_shared_8(uint32_t address, uint2 r) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(r.x), "r"(r.y) : "memory");
}

// What rows g and g + 8 of a left operand are multiplied with before they are split: powers of 2.
// Rows meet nothing but their own sums, so each may have its own, and sums are in units of its
// inverse. `largest` of the values that a lane has; those of its quad count.
struct SplitScale {
  float scale[2], unit[2];

  __device__ __forceinline__ explicit SplitScale(const float (&largest)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = split_scale(quad_max(largest[h]));
      unit[h] = inverse_of(__float_as_uint(scale[h]));
    }
  }
};

// The largest values of rows g and g + 8 that this lane has.
template <int kTiles>
__device__ __forceinline__ void find_largest(float (&largest)[2], const float (&x)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], fabsf(x[n][e]));
  }
}

// A left operand as accumulator tiles hold it, in parts.
template <int kTiles>
struct SplitLeft {
  uint32_t high[kTiles / 2][4], low[kTiles / 2][4];

  __device__ __forceinline__ SplitLeft(const float (&x)[kTiles][4], const SplitScale& by) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = n % 2 * 2 + h;
        split(x[n][2 * h] * by.scale[h], x[n][2 * h + 1] * by.scale[h], high[n / 2][i],
              low[n / 2][i]);
      }
    }
  }
};

template <int kTiles>
__device__ __forceinline__ SplitScale scale_of(const float (&x)[kTiles][4]) {
  float largest[2] = {};
  find_largest(largest, x);
  return SplitScale(largest);
}

// Is there anything but zeros in the warp's tiles?
template <int kTiles>
__device__ __forceinline__ bool any_but_zero(const float (&x)[kTiles][4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) bits |= __float_as_uint(x[n][e]);
  }
  return __any_sync(kFullWarp, bits << 1 != 0);
}

// The powers of two of neighbouring split rows, a row for each thread; 0 where there is none.
template <bool kSplit, int kRows>
__device__ __forceinline__ void load_scales(uint32_t target, const Descale& scales, int batch,
                                            int head, int64_t row, int rows, int thread) {
  if constexpr (kSplit) {
    if (thread >= kRows) return;
    const float* from = scales.data + batch * scales.batch + head * scales.head + row + thread;
    const bool in_range = thread < rows;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target + 4 * thread),
                 "l"(in_range ? from : scales.data), "r"(in_range ? 4 : 0)
                 : "memory");
  }
}

// One tensor to split: its rows in order of heads, kHeadDim wide in the workspace whatever the
// width that was given, and the power of two of each row.
struct SplitTensor {
  View from, to;
  float* descale;
  int heads, dim;
  int64_t rows, sequence;  // of a head in all, and of one batch
};

struct SplitTensors {
  SplitTensor tensor[4];
};

inline constexpr int kSplitThreads = 256;
inline constexpr int kSplitRows = 4;  // of a thread, all under way at once

// 4 neighbouring values of one row.
__device__ __forceinline__ void load_values(float (&x)[4], const SplitTensor& t, int row,
                                            int column) {
  x[0] = x[1] = x[2] = x[3] = 0.0f;
  if (row >= t.rows || column >= t.dim) return;
  const int batch = row / int(t.sequence);
  const float* from = static_cast<const float*>(t.from.data) + batch * t.from.batch +
                      int(blockIdx.y) * t.from.head + (row - batch * t.sequence) * t.from.row +
                      column;
  if (reinterpret_cast<uint64_t>(from) % 16 == 0) {
    const float4 chunk = *reinterpret_cast<const float4*>(from);
    x[0] = chunk.x, x[1] = chunk.y, x[2] = chunk.z, x[3] = chunk.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = from[e];
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kSplitThreads)
    split_kernel(const __grid_constant__ SplitTensors s) {
  constexpr int kLanes = kHeadDim / 4, kRows = kSplitThreads / kLanes;
  const SplitTensor& t = s.tensor[blockIdx.z];
  if (blockIdx.y >= t.heads) return;
  const int column = threadIdx.x % kLanes * 4;
  const int first = blockIdx.x * (kRows * kSplitRows) + threadIdx.x / kLanes;
  SplitRows<kSplitRows> rows;
#pragma unroll
  for (int i = 0; i < kSplitRows; ++i) load_values(rows.x[i], t, first + i * kRows, column);
  rows.split_all(kLanes);
#pragma unroll
  for (int i = 0; i < kSplitRows; ++i) {
    const int row = first + i * kRows;
    if (row >= t.rows) return;
    const int64_t index = blockIdx.y * t.rows + row;
    char* to = static_cast<char*>(t.to.data) + index * kHeadDim * 4 + column * 2;
    *reinterpret_cast<uint2*>(to) = rows.high[i];
    *reinterpret_cast<uint2*>(to + kHeadDim * 2) = rows.low[i];
    if (column == 0) t.descale[index] = rows.unit[i];
  }
}

// The parts of several tensors, one after another in the workspace.
template <int kHeadDim>
class SplitPass {
 public:
  explicit SplitPass(void* workspace) : next_(static_cast<char*>(workspace)) {}

  static int64_t bytes(int64_t rows) { return rows * kHeadDim * 4 + bytes_of_scales(rows); }

  // The view becomes that of the parts; total rows of a head, `sequence` of them in a batch.
  void add(View& view, Descale& descale, int heads, int dim, int64_t total, int64_t sequence) {
    auto* scales = reinterpret_cast<float*>(next_);
    const int64_t batch = sequence == total ? 0 : sequence;  // packed, or but one
    const View parts = {next_ + bytes_of_scales(total * heads), batch * kHeadDim, kHeadDim,
                        total * kHeadDim};
    tensors_.tensor[count_++] = {view, parts, scales, heads, dim, total, sequence};
    most_rows_ = std::max(most_rows_, total);
    most_heads_ = std::max(most_heads_, heads);
    view = parts;
    descale = {scales, batch, 1, total, 1};
    next_ += bytes(total * heads);
  }

  cudaError_t run(cudaStream_t stream) const {
    constexpr int kRows = kSplitThreads / (kHeadDim / 4) * kSplitRows;
    const dim3 grid(unsigned((most_rows_ + kRows - 1) / kRows), most_heads_, count_);
    return launch(split_kernel<kHeadDim>, grid, kSplitThreads, 0, stream, tensors_);
  }

 private:
  static int64_t bytes_of_scales(int64_t rows) { return (rows * 4 + 255) / 256 * 256; }

  SplitTensors tensors_ = {};
  int count_ = 0, most_heads_ = 0;
  int64_t most_rows_ = 0;
  char* next_;
};

}  // namespace flash::v1
