// Clock reads at role changes: what each role of the first CTA began to do, and when.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace flash::v3 {

// What a role does from a mark on until its next one.
enum Doing : int { kPauses, kWaits, kLoadsK, kLoadsV, kMultiplies, kSoftmaxes, kDrains, kRescales };

constexpr int kMarks = 4096, kRoles = 4;  // the producer, then the consumers

struct Mark {
  unsigned clock;
  int doing;
};

__device__ Mark trace_marks[kRoles][kMarks];

// One thread of a role writes its marks; stores are not waited for.
struct Marker {
  int role;
  int count = 0;

  __device__ __forceinline__ void operator()(Doing doing) {
    if (blockIdx.x != 0 || threadIdx.x % 128 != 0 || count == kMarks) return;
    unsigned clock;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
    trace_marks[role][count++] = {clock, doing};
  }
};

// Writes "role clock doing" lines to the file that FLASH_TRACE_FILE names.
inline void dump_trace(cudaStream_t stream) {
  const char* name = std::getenv("FLASH_TRACE_FILE");
  if (name == nullptr || cudaStreamSynchronize(stream) != cudaSuccess) return;
  std::vector<Mark> marks(kRoles * kMarks);
  const size_t bytes = marks.size() * sizeof(Mark);
  if (cudaMemcpyFromSymbol(marks.data(), trace_marks, bytes) != cudaSuccess) return;
  std::FILE* file = std::fopen(name, "w");
  if (file == nullptr) return;
  for (int i = 0; i < kRoles * kMarks; ++i) {
    if (marks[i].clock != 0)
      std::fprintf(file, "%d %u %d\n", i / kMarks, marks[i].clock, marks[i].doing);
  }
  std::fclose(file);
}

}  // namespace flash::v3
