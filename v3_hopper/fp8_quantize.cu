// Rows are rotated in registers, their largest magnitude becomes the scale, and the same registers
// are rounded: each element is read once and written once.
#include <cuda_fp8.h>

#include <cfloat>

#include "common/launch.cuh"
#include "v3_hopper/fp8_quantize_schedule.cuh"
#include "v3_hopper/fp8_rotate.cuh"

namespace flash::v3::fp8 {
namespace {

constexpr float kMaxE4M3 = 448.0f;

template <int kDim>
constexpr int kThreads = kLines / kWarpLines<kDim> * kWarp;
template <int kDim>
constexpr int kCtas = 512 / kThreads<kDim>;  // on one multiprocessor, by their registers
constexpr int kCopies = kHalves * kUnits;    // of 16 bytes each, by every thread for a tile

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0));
}

// What one warp does with its lines of a tile.
template <class T, int kDim>
struct Quantizer {
  static constexpr int kWide = kDim / kUnit;  // units of a line
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  // Neighbouring lines' units swap places, that no two that are read together share banks.
  static __device__ __forceinline__ int place(int line, int unit) {
    return line * kWide + (unit ^ (line & 1));
  }

  // The first of a warp's lines in a tile, from the first row of its unit.
  __device__ __forceinline__ int first_line(const Step& step) const {
    return step.chunk * kLines + warp * kWarpLines<kDim>;
  }

  // Starts copying a warp's lines to its own places in shared memory, whole lines at once.
  __device__ __forceinline__ void fetch(uint4* slots, const Part& part, const Unit& unit,
                                        const Step& step) const {
    constexpr int kTogether = kWarp / kWide;  // lines
    const View& source = part.tensor.source;
    const int line = lane / kWide, column = lane % kWide, at = first_line(step) + line;
    const int64_t head = unit.head_kv * part.group + step.head;
    const T* from = static_cast<const T*>(source.data) + unit.source + at * source.row +
                    head * source.head + column * kUnit;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int to = place(line + i * kTogether, column);
      copy_async(slots + to, from, at + i * kTogether < unit.rows);
      from += kTogether * source.row;
    }
  }

  __device__ __forceinline__ void take(Share& x, const uint4* slots, const uint4* signs,
                                       const Hadamard16<T>& hadamard, bool turn) const {
    uint4 packed[kHalves][kUnits];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Spot<kDim> spot(i / kUnits, i % kUnits);
      packed[i / kUnits][i % kUnits] = slots[place(spot.line, spot.unit)];
    }
    if (turn) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint4 turned = signs[Spot<kDim>(i / kUnits, i % kUnits).unit];
        uint4& own = packed[i / kUnits][i % kUnits];
        own = {own.x ^ turned.x, own.y ^ turned.y, own.z ^ turned.z, own.w ^ turned.w};
      }
      rotate<kDim>(x, packed, hadamard);
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        unpack<T>(x[i / kUnits][i % kUnits], packed[i / kUnits][i % kUnits]);
      }
    }
  }

  // Largest magnitude; with `finite`, of what is not Inf. NaN never counts.
  __device__ __forceinline__ float largest(const Share& x, bool finite) const {
    float found[2] = {};
#pragma unroll
    for (int i = 0; i < kCopies * kUnit; ++i) {
      const float magnitude = fabsf(x[i / kUnit / kUnits][i / kUnit % kUnits][i % kUnit]);
      found[i % 2] = fmaxf(found[i % 2], finite && magnitude == INFINITY ? 0.0f : magnitude);
    }
    return fmaxf(found[0], found[1]);
  }

  static __device__ __forceinline__ uint32_t round_four(const float* x, float inverse,
                                                        bool infinite) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      float2 pair = {x[e] * inverse, x[e + 1] * inverse};
      if (infinite) {
        if (isinf(x[e])) pair.x = NAN;
        if (isinf(x[e + 1])) pair.y = NAN;
      }
      const uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      word |= two << e * 8;
    }
    return word;
  }

  __device__ __forceinline__ void store(const Share& x, const Part& part, const Unit& unit,
                                        const Step& step, float inverse, bool infinite) const {
    const int head = unit.head_kv * part.group + step.head;
#pragma unroll
    for (int i = 0; i < kCopies; i += 2) {
      const Spot<kDim> spot(i / kUnits, i % kUnits);
      const int at = first_line(step) + spot.line;
      if (at >= unit.rows) continue;
      const int64_t line = (unit.stored + at) * part.tensor.heads + head;
      const float *first = x[i / kUnits][i % kUnits], *second = x[i / kUnits][i % kUnits + 1];
      const uint4 packed = {
          round_four(first, inverse, infinite), round_four(first + 4, inverse, infinite),
          round_four(second, inverse, infinite), round_four(second + 4, inverse, infinite)};
      __stcs(static_cast<uint4*>(part.tensor.stored) + (line * kWide + spot.unit) / 2, packed);
    }
  }
};

// The largest of all threads' values, which are not negative and so ordered like their bits.
// `scratch` has one place for each warp, and a neighbour in time has another scratch.
__device__ __forceinline__ float reduce_max(float x, unsigned* scratch) {
  const unsigned found = __reduce_max_sync(~0u, __float_as_uint(x));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = found;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  return __uint_as_float(__reduce_max_sync(~0u, lane < warps ? scratch[lane] : 0));
}

// x H has this factor to be an orthogonal turn.
template <int kDim>
constexpr float kNorm = kDim == 64    ? 0.125f
                        : kDim == 256 ? 0.0625f
                                      : 0.08838834764831845f;

// A unit's scale, written once; returns what its elements, not yet normalized, are multiplied by.
template <int kDim>
__device__ __forceinline__ float settle_scale(const Part& part, const Unit& unit, bool per_block,
                                              float amax) {
  const float descale = amax > 0.0f ? fmaxf(amax / kMaxE4M3, FLT_MIN) : 1.0f;
  const int blocks = per_block ? int(part.blocks.divisor) : 1;
  if (threadIdx.x == 0 && (per_block || unit.block == 0)) {
    const int64_t block = int64_t(unit.batch) * blocks + (per_block ? unit.block : 0);
    const float norm = part.tensor.rotate && amax > 0.0f ? kNorm<kDim> : 1.0f;
    part.tensor.descale[block * part.tensor.heads_kv + unit.head_kv] = descale * norm;
  }
  return 1.0f / descale;
}

// While a tile is worked on, the next one is on its way.
template <class T, int kDim, Pass kPass>
__global__ void __launch_bounds__(kThreads<kDim>, kCtas<kDim>)
    quantize_kernel(const __grid_constant__ Parts parts, bool per_tensor) {
  extern __shared__ uint4 memory[];
  constexpr int kWarps = kThreads<kDim> / kWarp;
  __shared__ unsigned scratch[2][kWarps];
  __shared__ uint4 signs[kDim / kUnit];
  if (threadIdx.x < kDim / 2) {
    reinterpret_cast<uint32_t*>(signs)[threadIdx.x] = kSigns.turned[threadIdx.x];
  }
  __syncthreads();
  constexpr int kShare = kCopies * kWarp, kSlots = kWarps * kShare;
  const Quantizer<T, kDim> quantizer;
  const Hadamard16<T> hadamard;
  uint4* const own = memory + quantizer.warp * kShare;
  Step step = {0, int(blockIdx.x), 0, 0, false};
  step.settle(parts);
  if (!step.valid()) return;
  Unit unit(parts.part[step.part], step.index);
  quantizer.fetch(own, parts.part[step.part], unit, step);
  asm volatile("cp.async.commit_group;");
  float found = 0.0f, inverse = 0.0f;
  int reduced = 0;
  for (int slot = 0; step.valid(); slot ^= 1) {
    const Part& part = parts.part[step.part];
    Step next = step;
    next.template advance<kPass>(parts);
    Unit coming = unit;
    if (next.valid()) {
      const Part& its = parts.part[next.part];
      if (step.last(part)) coming = Unit(its, next.index);
      quantizer.fetch(own + (slot ^ 1) * kSlots, its, coming, next);
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();  // the other lanes' copies have landed as well
    Share x;
    quantizer.take(x, own + slot * kSlots, signs, hadamard, part.tensor.rotate);
    __syncwarp();  // the slot may be filled again
    const float highest = quantizer.largest(x, false);
    const bool infinite = highest == INFINITY;
    const int64_t cell = per_tensor ? 0 : int64_t(unit.batch) * part.tensor.heads_kv + unit.head_kv;
    if (kPass != Pass::kRound && !step.again) {
      found = fmaxf(found, infinite ? quantizer.largest(x, true) : highest);
      if (step.last(part)) {
        const float amax = reduce_max(found, scratch[reduced++ % 2]);
        found = 0.0f;
        if constexpr (kPass == Pass::kAll) inverse = settle_scale<kDim>(part, unit, true, amax);
        if (kPass == Pass::kAmax && threadIdx.x == 0) {
          atomicMax(reinterpret_cast<int*>(part.tensor.amax) + cell, __float_as_int(amax));
        }
      }
    }
    if (kPass == Pass::kRound) {
      inverse = settle_scale<kDim>(part, unit, false, part.tensor.amax[cell]);
    }
    const bool alone = part.group * part.chunks == 1;
    if (kPass == Pass::kRound || (kPass == Pass::kAll && (alone || step.again))) {
      quantizer.store(x, part, unit, step, inverse, infinite);
    }
    step = next;
    unit = coming;
  }
}

template <class T, int kDim, Pass kPass>
cudaError_t launch_pass(const QuantizeParams& p) {
  Parts parts;
  int64_t units = 0;
  for (int i = 0; i < p.count; ++i) {
    const QuantizeTensor& t = p.tensors[i];
    if (t.batch == 0 || t.rows == 0) continue;
    const int blocks = (t.rows + t.block_rows - 1) / t.block_rows;
    units += int64_t(t.batch) * blocks * t.heads_kv;
    if (units > INT32_MAX / 2) return cudaErrorInvalidValue;
    Part& part = parts.part[i];
    part.tensor = t;
    part.heads_kv.prepare(t.heads_kv);
    part.blocks.prepare(blocks);
    part.group = t.heads / t.heads_kv;
    part.chunks = (t.block_rows + kLines - 1) / kLines;
    part.units = t.batch * blocks * t.heads_kv;
  }
  if (units == 0) return cudaSuccess;
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int resident = sms * kCtas<kDim>;
  const dim3 grid(units < resident ? unsigned(units) : unsigned(resident));
  constexpr int kBytes = 2 * kLines * kDim * 2;  // two tiles of 16 bits
  return launch(quantize_kernel<T, kDim, kPass>, grid, kThreads<kDim>, kBytes, p.stream, parts,
                p.granularity == Granularity::kTensor);
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
  if (p.dtype == DType::kBFloat16) return launch_dim<bf16>(p);
  if (p.dtype == DType::kFloat16) return launch_dim<fp16>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flash::v3::fp8
