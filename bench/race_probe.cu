// What the sanitizer follows: one warp hands shared memory to another by an mbarrier, or two warps
// meet at a named barrier from two branches. Each is right by PTX's model but where nobody meets.
#include <cuda_runtime.h>

#include <cstdio>

namespace flash::probe {

constexpr int kRounds = 4;  // times the memory changes hands

__device__ unsigned address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}
__device__ void init(unsigned long long& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(count)
               : "memory");
}
__device__ void arrive(unsigned long long& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&barrier)) : "memory");
}
__device__ void wait(unsigned long long& barrier, unsigned parity) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address(&barrier)), "r"(parity)
        : "memory");
  }
}

enum class Idiom { kEveryLane, kOneLane, kNobodyMeets };

// Warp 0 writes a row, warp 1 reads it and gives it back, a few times over.
template <Idiom kIdiom>
__device__ void pass(int* result) {
  __shared__ int row[32];
  __shared__ alignas(8) unsigned long long full, empty;
  constexpr bool kEvery = kIdiom == Idiom::kEveryLane;
  const int lane = threadIdx.x % 32, other = (lane + 5) % 32;
  if (threadIdx.x == 0) {
    init(full, kEvery ? 32 : 1);
    init(empty, kEvery ? 32 : 1);
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (threadIdx.x < 32) {
      wait(empty, (round & 1) ^ 1);
      row[lane] = lane + round;
      if (kIdiom != Idiom::kNobodyMeets) __syncwarp();
      if (kEvery || lane == 0) arrive(full);
    } else {
      wait(full, round & 1);
      sum += row[other];
      if (kIdiom != Idiom::kNobodyMeets) __syncwarp();
      if (kEvery || lane == 0) arrive(empty);
    }
  }
  if (threadIdx.x >= 32) result[lane] = sum;
}

__global__ void every_lane_arrives(int* result) { pass<Idiom::kEveryLane>(result); }
__global__ void one_lane_arrives(int* result) { pass<Idiom::kOneLane>(result); }
__global__ void nobody_meets(int* result) { pass<Idiom::kNobodyMeets>(result); }

__global__ void one_barrier_from_two_branches(int* result) {
  __shared__ int row[64];
  row[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64; // first branch" ::: "memory");
    result[threadIdx.x] = row[63 - threadIdx.x];
  } else {
    asm volatile("bar.sync 1, 64; // second branch" ::: "memory");
    result[threadIdx.x] = 2 * row[63 - threadIdx.x];
  }
}

}  // namespace flash::probe

int main() {
  int* result = nullptr;
  cudaMalloc(&result, 64 * sizeof(int));
  for (auto* kernel : {flash::probe::every_lane_arrives, flash::probe::one_lane_arrives,
                       flash::probe::nobody_meets, flash::probe::one_barrier_from_two_branches}) {
    kernel<<<1, 64>>>(result);
  }
  int first = 0;
  cudaMemcpy(&first, result, sizeof(first), cudaMemcpyDeviceToHost);
  std::printf("%s, %d\n", cudaGetErrorString(cudaDeviceSynchronize()), first);
  return 0;
}
