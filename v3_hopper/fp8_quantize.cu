// Rows are rotated in registers, their largest magnitude becomes the scale, and the same registers
// are rounded: each element is read once and written once.
#include <cfloat>

#include "common/launch.cuh"
#include "v3_hopper/fp8_quantize.h"
#include "v3_hopper/fp8_rotate.cuh"

namespace flash::v3::fp8 {
namespace {

constexpr int kLinesPerThread = 2;
constexpr int kLines = 128;  // of a tile; a line is one row of one head
constexpr float kMaxE4M3 = 448.0f;

template <int kDim>
constexpr int kThreads = kLines / kLinesPerThread * kLanes<kDim>;
template <int kDim>
constexpr int kCtas = 512 / kThreads<kDim>;  // on one multiprocessor, by their registers

// What a launch does: everything, only the largest magnitudes, or only the rounding.
enum class Pass { kAll, kAmax, kRound };

// The lines that share one scale: rows [first_row, first_row + rows) of a K/V head's query heads.
struct Unit {
  int batch, head_kv, block, first_row, lines, group;
  int64_t source, stored;  // elements to the first row of the sequence, and its number

  __device__ __forceinline__ Unit(const QuantizeParams& p, int index) {
    const int blocks = (p.rows + p.block_rows - 1) / p.block_rows;
    head_kv = index % p.heads_kv;
    block = index / p.heads_kv % blocks;
    batch = index / p.heads_kv / blocks;
    group = p.heads / p.heads_kv;
    first_row = block * p.block_rows;
    const bool packed = p.cu_seqlens != nullptr;
    stored = packed ? p.cu_seqlens[batch] : int64_t(batch) * p.rows;
    source = packed ? stored * p.source.row : batch * p.source.batch;
    const int rows = packed ? p.cu_seqlens[batch + 1] - int(stored) : p.rows;
    lines = max(min(p.block_rows, rows - first_row), 0) * group;
  }
  __device__ __forceinline__ int tiles() const { return max((lines + kLines - 1) / kLines, 1); }
};

// One tile of one unit. A unit of several tiles is walked twice: for its scale, then to be rounded.
struct Step {
  int unit, tile;
  bool again;

  template <Pass kPass>
  __device__ __forceinline__ void advance(int tiles) {
    if (++tile < tiles) return;
    tile = 0;
    again = kPass == Pass::kAll && tiles > 1 && !again;
    if (!again) unit += gridDim.x;
  }
};

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0));
}

template <class T, int kDim>
struct Quantizer {
  const QuantizeParams& p;
  const int lane = threadIdx.x % kLanes<kDim>;

  // The line that this thread works on, or one behind the last.
  __device__ __forceinline__ int line(int tile, int i) const {
    return tile * kLines + i * (kLines / kLinesPerThread) + int(threadIdx.x) / kLanes<kDim>;
  }

  // Starts copying what this thread will need of a tile to its own places in shared memory.
  __device__ __forceinline__ void fetch(uint4* slots, const Unit& unit, int tile) const {
#pragma unroll
    for (int i = 0; i < kLinesPerThread; ++i) {
      const int at = line(tile, i);
      const bool inside = at < unit.lines;
      const int row = inside ? unit.first_row + at / unit.group : 0;
      const int head = unit.head_kv * unit.group + at % unit.group;
      const auto* source = reinterpret_cast<const uint4*>(
          static_cast<const T*>(p.source.data) + (inside ? unit.source : 0) + row * p.source.row +
          head * p.source.head);
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        copy_async(slots + (i * kUnits + k) * kThreads<kDim> + threadIdx.x,
                   source + k * kLanes<kDim> + lane, inside);
      }
    }
  }

  __device__ __forceinline__ void take(Line (&x)[kLinesPerThread], const uint4* slots,
                                       const uint4* signs) const {
#pragma unroll
    for (int i = 0; i < kLinesPerThread; ++i) {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        uint4 packed = slots[(i * kUnits + k) * kThreads<kDim> + threadIdx.x];
        if (p.rotate) {
          const uint4 turned = signs[k * kLanes<kDim> + lane];
          packed = {packed.x ^ turned.x, packed.y ^ turned.y, packed.z ^ turned.z,
                    packed.w ^ turned.w};
        }
        unpack<T>(x[i][k], packed);
      }
      if (p.rotate) rotate<kDim>(x[i], lane);
    }
  }

  // Largest magnitude; with `finite`, of what is not Inf. NaN never counts.
  __device__ __forceinline__ float largest(const Line (&x)[kLinesPerThread], bool finite) const {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < kLinesPerThread; ++i) {
#pragma unroll
      for (int e = 0; e < kUnits * kUnit; ++e) {
        const float magnitude = fabsf(x[i][e / kUnit][e % kUnit]);
        found = fmaxf(found, finite && magnitude == INFINITY ? 0.0f : magnitude);
      }
    }
    return found;
  }

  __device__ __forceinline__ void store(const Line (&x)[kLinesPerThread], const Unit& unit,
                                        int tile, float inverse, bool infinite) const {
#pragma unroll
    for (int i = 0; i < kLinesPerThread; ++i) {
      const int at = line(tile, i);
      if (at >= unit.lines) break;
      const int64_t row = unit.stored + unit.first_row + at / unit.group;
      const int head = unit.head_kv * unit.group + at % unit.group;
      auto* stored = static_cast<uint2*>(p.stored) + (row * p.heads + head) * (kDim / kUnit);
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        uint32_t words[2] = {};
#pragma unroll
        for (int e = 0; e < kUnit; e += 2) {
          float2 pair = {x[i][k][e] * inverse, x[i][k][e + 1] * inverse};
          if (infinite) {
            if (isinf(x[i][k][e])) pair.x = NAN;
            if (isinf(x[i][k][e + 1])) pair.y = NAN;
          }
          const uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
          words[e / 4] |= two << e % 4 * 8;
        }
        __stcs(stored + k * kLanes<kDim> + lane, uint2{words[0], words[1]});
      }
    }
  }
};

// The largest value of all threads; `scratch` has one place for each warp.
__device__ __forceinline__ float reduce_max(float x, float* scratch) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();  // an earlier result has been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  x = lane < warps ? scratch[lane] : 0.0f;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// A unit's scale, written once; returns its inverse.
__device__ __forceinline__ float settle_scale(const QuantizeParams& p, const Unit& unit,
                                              float amax) {
  const float descale = amax > 0.0f ? fmaxf(amax / kMaxE4M3, FLT_MIN) : 1.0f;
  const bool per_block = p.granularity == Granularity::kBlock;
  const int blocks = per_block ? (p.rows + p.block_rows - 1) / p.block_rows : 1;
  if (threadIdx.x == 0 && (per_block || unit.block == 0)) {
    const int64_t block = int64_t(unit.batch) * blocks + (per_block ? unit.block : 0);
    p.descale[block * p.heads_kv + unit.head_kv] = descale;
  }
  return 1.0f / descale;
}

// While a tile is worked on, the next one is on its way.
template <class T, int kDim, Pass kPass>
__global__ void __launch_bounds__(kThreads<kDim>, kCtas<kDim>)
    quantize_kernel(const QuantizeParams p, int units) {
  extern __shared__ uint4 memory[];
  __shared__ float scratch[kThreads<kDim> / kWarp];
  __shared__ uint4 signs[kDim / kUnit];
  if (threadIdx.x < kDim / 2) {
    reinterpret_cast<uint32_t*>(signs)[threadIdx.x] = kSigns.turned[threadIdx.x];
  }
  __syncthreads();
  constexpr int kSlots = kLinesPerThread * kUnits * kThreads<kDim>;
  const Quantizer<T, kDim> quantizer{p};
  Step step = {int(blockIdx.x), 0, false};
  float found = 0.0f, inverse = 0.0f;
  if (step.unit < units) quantizer.fetch(memory, Unit(p, step.unit), 0);
  asm volatile("cp.async.commit_group;");
  for (int slot = 0; step.unit < units; slot ^= 1) {
    const Unit unit(p, step.unit);
    const int tiles = unit.tiles();
    Step next = step;
    next.template advance<kPass>(tiles);
    if (next.unit < units) {
      quantizer.fetch(memory + (slot ^ 1) * kSlots, Unit(p, next.unit), next.tile);
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    Line x[kLinesPerThread];
    quantizer.take(x, memory + slot * kSlots, signs);
    const float highest = quantizer.largest(x, false);
    const bool infinite = highest == INFINITY;
    const int64_t cell =
        p.granularity == Granularity::kTensor ? 0 : int64_t(unit.batch) * p.heads_kv + unit.head_kv;
    if (kPass != Pass::kRound && !step.again) {
      found = fmaxf(found, infinite ? quantizer.largest(x, true) : highest);
      if (step.tile + 1 == tiles) {
        const float amax = reduce_max(found, scratch);
        found = 0.0f;
        if constexpr (kPass == Pass::kAll) inverse = settle_scale(p, unit, amax);
        if (kPass == Pass::kAmax && threadIdx.x == 0) {  // ordered like their bits
          atomicMax(reinterpret_cast<int*>(p.amax) + cell, __float_as_int(amax));
        }
      }
    }
    if (kPass == Pass::kRound) inverse = settle_scale(p, unit, p.amax[cell]);
    if (kPass == Pass::kRound || (kPass == Pass::kAll && (tiles == 1 || step.again))) {
      quantizer.store(x, unit, step.tile, inverse, infinite);
    }
    step = next;
  }
}

template <class T, int kDim, Pass kPass>
cudaError_t launch_pass(const QuantizeParams& p) {
  const int64_t blocks = (p.rows + p.block_rows - 1) / p.block_rows;
  const int64_t units = p.batch * blocks * p.heads_kv;
  if (units > INT32_MAX / 2) return cudaErrorInvalidValue;
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int resident = sms * kCtas<kDim>;
  const dim3 grid(units < resident ? unsigned(units) : unsigned(resident));
  constexpr int kBytes = 2 * kLinesPerThread * kUnits * kThreads<kDim> * 16;
  return launch(quantize_kernel<T, kDim, kPass>, grid, kThreads<kDim>, kBytes, p.stream, p,
                int(units));
}

template <class T, int kDim>
cudaError_t launch_passes(const QuantizeParams& p) {
  if (p.granularity == Granularity::kBlock) return launch_pass<T, kDim, Pass::kAll>(p);
  const cudaError_t status = launch_pass<T, kDim, Pass::kAmax>(p);
  return status != cudaSuccess ? status : launch_pass<T, kDim, Pass::kRound>(p);
}

template <class T>
cudaError_t launch_dim(const QuantizeParams& p) {
  if (p.dim == 64) return launch_passes<T, 64>(p);
  if (p.dim == 128) return launch_passes<T, 128>(p);
  if (p.dim == 256) return launch_passes<T, 256>(p);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t quantize(const QuantizeParams& p) {
  if (p.batch == 0 || p.rows == 0) return cudaSuccess;
  if (p.dtype == DType::kBFloat16) return launch_dim<bf16>(p);
  if (p.dtype == DType::kFloat16) return launch_dim<fp16>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flash::v3::fp8
