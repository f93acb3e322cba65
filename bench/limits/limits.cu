// What this GPU gives at most: tensor cores, exponentials, L2 and memory, a JSON line for each.
//
// Every kernel is one wave of CTAs that live as long as it runs, so clocks of the first CTA against
// the time of the launch give the clock rate under exactly this load. Operands are random: zeros
// draw less power and run faster.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "common/ptx.cuh"
#include "v3_hopper/wgmma.cuh"

namespace {

constexpr int kRounds = 7;
constexpr double kRoundMs = 5;
constexpr size_t kHotBytes = size_t(16) << 20;  // fits any L2 of 24 MB and more
constexpr size_t kColdBytes = size_t(1) << 30;  // fits none

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "limits: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Probe {
  unsigned long long clocks;  // that the first CTA lived
  float sink;                 // takes results, so that no compiler drops them
};

struct Arguments {
  int repeats;
  float4* memory;
  size_t count;  // float4 in memory
  Probe* probe;
};

__device__ __forceinline__ uint32_t noise(uint32_t x) {
  x = (x ^ 61) ^ (x >> 16);
  x *= 9;
  x ^= x >> 4;
  x *= 0x27d4eb2d;
  return x ^ (x >> 15);
}

// Two bf16, or four e4m3, of either sign and a size between 1/2 and 2.
__device__ __forceinline__ uint32_t random_pair(uint32_t seed) {
  return (noise(seed) & 0x80ff80ffu) | 0x3f003f00u;
}
[[maybe_unused]] __device__ __forceinline__ uint32_t random_quad(uint32_t seed) {
  return (noise(seed) & 0x8f8f8f8fu) | 0x30303030u;
}

__device__ __forceinline__ void report(const Arguments& args, long long begin) {
  if (blockIdx.x == 0 && threadIdx.x == 0) args.probe->clocks = clock64() - begin;
}

// --- tensor cores

constexpr int kChain = 8;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
  const uint64_t address = flash::shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
#endif

// Two warpgroups, each with one chain of eight m64n128 products in flight while it issues the next.
template <class T>
__global__ void __launch_bounds__(256) wgmma_kernel(Arguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using flash::v3::wgmma;
  extern __shared__ __align__(1024) uint32_t shared[];
  const long long begin = clock64();
  for (int i = threadIdx.x; i < 12 * 1024; i += blockDim.x)
    shared[i] = sizeof(T) == 1 ? random_quad(i) : random_pair(i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint64_t a = descriptor(shared + threadIdx.x / 128 * 2048), b = descriptor(shared + 4096);
  float d[64] = {};
  for (int i = 0; i < args.repeats; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < kChain; ++k) wgmma<128>::ss<T>(d, a + 2 * (k % 4), b + 2 * (k % 4), true);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  float sum = 0;
#pragma unroll
  for (float x : d) sum += x;
  if (sum == 1.25f) args.probe->sink = sum;
  report(args, begin);
#endif
}

// Eight warps, each with eight independent accumulators of m16n8.
__global__ void __launch_bounds__(256) mma_kernel(Arguments args) {
  const long long begin = clock64();
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = random_pair(threadIdx.x * 8 + i);
  for (int i = 0; i < 2; ++i) b[i] = random_pair(threadIdx.x * 8 + 4 + i);
  float d[kChain][4] = {};
  for (int i = 0; i < args.repeats; ++i) {
#pragma unroll
    for (int k = 0; k < kChain; ++k) {
#if __CUDA_ARCH__ >= 800
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[k][0]), "+f"(d[k][1]), "+f"(d[k][2]), "+f"(d[k][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
      for (int half = 0; half < 2; ++half)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[k][0]), "+f"(d[k][1]), "+f"(d[k][2]), "+f"(d[k][3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
    }
  }
  float sum = 0;
  for (auto& row : d)
    for (float x : row) sum += x;
  if (sum == 1.25f) args.probe->sink = sum;
  report(args, begin);
}

// --- exponentials

__global__ void __launch_bounds__(1024) exp2_kernel(Arguments args) {
  const long long begin = clock64();
  float x[kChain];
  for (int k = 0; k < kChain; ++k) x[k] = 1e-3f * (threadIdx.x + k);
  for (int i = 0; i < args.repeats; ++i) {
#pragma unroll
    for (float& value : x) asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(-value));
  }
  float sum = 0;
  for (float value : x) sum += value;
  if (sum == 1.25f) args.probe->sink = sum;
  report(args, begin);
}

// --- L2 and memory

// Each CTA adds to its own 64 KB, as the dQ of a backward pass does.
__global__ void __launch_bounds__(1024) add_kernel(Arguments args) {
  const long long begin = clock64();
  float* mine = reinterpret_cast<float*>(args.memory) + size_t(blockIdx.x) * 16384;
  for (int i = 0; i < args.repeats; ++i) {
#pragma unroll
    for (int k = 0; k < 16; ++k) atomicAdd(mine + k * 1024 + threadIdx.x, 1.0f);
  }
  report(args, begin);
}

__global__ void __launch_bounds__(1024) read_kernel(Arguments args) {
  const long long begin = clock64();
  const size_t threads = size_t(gridDim.x) * blockDim.x;
  const size_t first = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float4 sum = {};
  for (int i = 0; i < args.repeats; ++i) {
#pragma unroll 8
    for (size_t at = first; at < args.count; at += threads) {
      const float4 x = __ldcg(args.memory + at);
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
  }
  if (sum.x + sum.y + sum.z + sum.w == 1.25f) args.probe->sink = sum.x;
  report(args, begin);
}

__global__ void __launch_bounds__(1024) copy_kernel(Arguments args) {
  const long long begin = clock64();
  const size_t threads = size_t(gridDim.x) * blockDim.x, half = args.count / 2;
  const size_t first = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int i = 0; i < args.repeats; ++i) {
#pragma unroll 4
    for (size_t at = first; at < half; at += threads)
      __stcs(args.memory + half + at, __ldcs(args.memory + at));
  }
  report(args, begin);
}

__global__ void fill_kernel(Arguments args) {
  const size_t threads = size_t(gridDim.x) * blockDim.x;
  for (size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x; at < args.count; at += threads)
    args.memory[at] = make_float4(noise(at), noise(at + 1), noise(at + 2), noise(at + 3));
}

__global__ void empty_kernel(Arguments) {}

// --- measuring

struct Limit {
  const char* name;
  const char* unit;
  void (*kernel)(Arguments);
  int threads;
  int shared_bytes;
  double work;  // per CTA and repeat; 0: work on all of memory, counted in bytes
  size_t bytes = kHotBytes;
  int ctas = 1;  // per multiprocessor
};

float launch_ms(const Limit& limit, int grid, const Arguments& args) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin));
  limit.kernel<<<grid, limit.threads, limit.shared_bytes>>>(args);
  check(cudaGetLastError());
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms;
  check(cudaEventElapsedTime(&ms, begin, end));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return ms;
}

void measure(const Limit& limit, int processors, Arguments args) {
  if (limit.shared_bytes) {
    check(cudaFuncSetAttribute(limit.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               limit.shared_bytes));
  }
  const int grid = processors * limit.ctas;
  args.count = limit.bytes / sizeof(float4);
  args.repeats = 1;
  launch_ms(limit, grid, args);
  while (launch_ms(limit, grid, args) < kRoundMs && args.repeats < 1 << 28) args.repeats *= 2;
  std::vector<double> rates, clocks;
  const double work = limit.work ? limit.work * grid : double(limit.bytes);
  for (int round = 0; round < kRounds; ++round) {
    const double seconds = launch_ms(limit, grid, args) / 1e3;
    rates.push_back(work * args.repeats / seconds);
    clocks.push_back(args.probe->clocks / seconds / 1e6);
  }
  std::sort(rates.begin(), rates.end());
  std::sort(clocks.begin(), clocks.end());
  const double rate = rates[kRounds / 2], mhz = clocks[kRounds / 2];
  std::printf(
      "{\"name\": \"%s\", \"unit\": \"%s\", \"rate\": %.5g, \"clock_mhz\": %.0f, "
      "\"per_clock_and_processor\": %.4g}\n",
      limit.name, limit.unit, rate, mhz, rate / processors / (mhz * 1e6));
  std::fflush(stdout);
}

// Kernels of no work, back to back in a stream.
void measure_launch(const Arguments& args) {
  constexpr int kLaunches = 4000;
  const Limit burst = {"", "", empty_kernel, 32, 0, 0};
  launch_ms(burst, 1, args);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin));
  for (int i = 0; i < kLaunches; ++i) empty_kernel<<<1, 32>>>(args);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms;
  check(cudaEventElapsedTime(&ms, begin, end));
  std::printf("{\"name\": \"launch\", \"unit\": \"launch/s\", \"rate\": %.5g}\n",
              kLaunches / (ms / 1e3));
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  const int processors = device.multiProcessorCount;
  Arguments args = {};
  check(cudaMalloc(&args.memory, kColdBytes));
  check(cudaMallocManaged(&args.probe, sizeof(Probe)));
  args.count = kColdBytes / sizeof(float4);
  fill_kernel<<<4 * processors, 1024>>>(args);
  check(cudaDeviceSynchronize());
  // FLOPs of a CTA in one repeat: chain, warps or warpgroups, 2 M N K.
  constexpr double kWgmma = kChain * 2.0 * (2 * 64 * 128), kMma = kChain * 8 * 2.0 * (16 * 8 * 16);
  constexpr int kOperands = 12 * 4096;
  if (device.major == 9) {
    measure({"wgmma bf16", "FLOP/s", wgmma_kernel<flash::bf16>, 256, kOperands, kWgmma * 16},
            processors, args);
    measure({"wgmma e4m3", "FLOP/s", wgmma_kernel<flash::e4m3>, 256, kOperands, kWgmma * 32},
            processors, args);
  }
  measure({"mma.sync", "FLOP/s", mma_kernel, 256, 0, kMma}, processors, args);
  measure({"ex2", "op/s", exp2_kernel, 1024, 0, 1024.0 * kChain}, processors, args);
  measure({"L2 fp32 adds", "op/s", add_kernel, 1024, 0, 16384}, processors, args);
  measure({"L2 read", "B/s", read_kernel, 1024, 0, 0, kHotBytes, 2}, processors, args);
  measure({"memory read", "B/s", read_kernel, 1024, 0, 0, kColdBytes, 2}, processors, args);
  measure({"memory copy", "B/s", copy_kernel, 1024, 0, 0, kColdBytes, 2}, processors, args);
  measure_launch(args);
}
