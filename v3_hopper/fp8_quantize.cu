// Rows are rotated in registers, their largest magnitude becomes the scale, and the same registers
// are rounded: each element is read once and written once.
#include <cfloat>

#include "common/launch.cuh"
#include "v3_hopper/fp8_quantize_tile.cuh"

namespace flash::v3::fp8 {
namespace {

template <int kDim, int kParts>
constexpr int kThreads = kParts * kLines / kWarpLines<kDim> * kWarp;
template <int kDim, int kParts>  // on one multiprocessor, by their registers
constexpr int kCtas = 512 / kThreads<kDim, kParts>;

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
constexpr float kNorm = kDim == 32    ? 0.17677669529663687f
                        : kDim == 64  ? 0.125f
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
template <class T, int kDim, int kParts, Pass kPass>
__global__ void __launch_bounds__(kThreads<kDim, kParts>, kCtas<kDim, kParts>)
    quantize_kernel(const __grid_constant__ Parts parts, bool per_tensor) {
  extern __shared__ uint4 memory[];
  constexpr int kWarps = kThreads<kDim, kParts> / kWarp;
  __shared__ unsigned scratch[2][kWarps];
  __shared__ uint4 signs[kParts * kDim / kUnit];
  if (threadIdx.x < kParts * kDim / 2) {
    reinterpret_cast<uint32_t*>(signs)[threadIdx.x] = kSigns.turned[threadIdx.x];
  }
  __syncthreads();
  constexpr int kShare = kCopies * kWarp, kSlots = kWarps * kShare;
  const Quantizer<T, kDim, kParts> quantizer;
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
      if (infinite) quantizer.clear_infinite(x);
      if (part.tensor.rotate) {
        quantizer.store(x, part, unit, step, inverse);
      } else if (part.tensor.keys_first) {
        quantizer.store_keys_first(x, own + slot * kSlots, part, unit, step, inverse);
      } else {
        quantizer.store_plain(x, part, unit, step, inverse);
      }
    }
    step = next;
    unit = coming;
  }
}

template <class T, int kDim, int kParts, Pass kPass>
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
  const int resident = sms * kCtas<kDim, kParts>;
  const dim3 grid(units < resident ? unsigned(units) : unsigned(resident));
  constexpr int kTiles = 2 * kLines * kParts * kDim * 2;           // two tiles of 16 bits
  constexpr int kBytes = kTiles + (kTiles == 48 * 1024 ? 16 : 0);  // static memory is beside them
  return launch(quantize_kernel<T, kDim, kParts, kPass>, grid, kThreads<kDim, kParts>, kBytes,
                p.stream, parts, p.granularity == Granularity::kTensor);
}

template <class T, int kDim, int kParts = 1>
cudaError_t launch_passes(const QuantizeParams& p) {
  if (p.granularity == Granularity::kBlock) return launch_pass<T, kDim, kParts, Pass::kAll>(p);
  const cudaError_t status = launch_pass<T, kDim, kParts, Pass::kAmax>(p);
  return status != cudaSuccess ? status : launch_pass<T, kDim, kParts, Pass::kRound>(p);
}

template <class T>
cudaError_t launch_dim(const QuantizeParams& p) {
  if (p.dim == 64) return launch_passes<T, 64>(p);
  if (p.dim == 96) return launch_passes<T, 32, 3>(p);
  if (p.dim == 128) return launch_passes<T, 128>(p);
  if (p.dim == 192) return launch_passes<T, 64, 3>(p);
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
