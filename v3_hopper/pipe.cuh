// A consumer's side of every ring: wait for what TMA brought, give it back, take turns.
#pragma once

#include "v3_hopper/traits.cuh"

namespace flash::v3 {

template <class Traits>
__device__ __forceinline__ void init_pipes(typename Traits::Shared& shared) {
  for (int i = 0; i < Traits::kWorkSlots; ++i) {
    shared.work_full[i].init(1);
    shared.work_empty[i].init(Traits::kWorkReaders);
  }
  for (int i = 0; i < Traits::kStagesQ; ++i) {
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      shared.q_full[i][consumer].init(1);
      shared.q_empty[i][consumer].init(kGroupWarps);
    }
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    shared.k_full[i].init(1);
    shared.k_empty[i].init(Traits::kConsumers * kGroupWarps);
    shared.v_landed[i].init(1);
    shared.v_full[i].init(1 + kGuardWarps);
    shared.v_empty[i].init(Traits::kConsumers);
  }
  fence_barrier_init();
}

// Waits return the address of what has arrived; releases are one arrival per warpgroup, legal once
// the GEMM that read the slot has been waited for.
template <class Traits>
struct Pipes {
  typename Traits::Shared& shared;
  const int consumer;
  Ring<Traits::kWorkSlots> work;
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStages> k, v;

  __device__ __forceinline__ const Work& wait_work() {
    shared.work_full[work.slot].wait(work.parity);
    const Work& next = shared.work[work.slot];
    work.advance();
    return next;
  }
  __device__ __forceinline__ void release_work(const Work& done) const {
    sync();  // every thread has read its last of it
    if (leader()) shared.work_empty[&done - shared.work].arrive();
  }

  __device__ __forceinline__ void wait_q() const { shared.q_full[q.slot][consumer].wait(q.parity); }
  __device__ __forceinline__ unsigned char* tile_q() const { return shared.q[q.slot][consumer]; }
  // The last GEMM that reads this Q is done.
  __device__ __forceinline__ void release_q() const {
    if (warp_leader()) shared.q_empty[q.slot][consumer].arrive();
  }
  __device__ __forceinline__ unsigned char* tile_o() const {
    return shared.o[Traits::kStagesO ? consumer : 0];
  }

  __device__ __forceinline__ const unsigned char* wait_k() {
    shared.k_full[k.slot].wait(k.parity);
    return shared.k[k.slot];
  }
  __device__ __forceinline__ void release_k() {
    if (warp_leader()) shared.k_empty[k.slot].arrive();
    k.advance();
  }

  __device__ __forceinline__ const unsigned char* wait_v() {
    shared.v_full[v.slot].wait(v.parity);
    return shared.v[v.slot];
  }
  __device__ __forceinline__ void release_v() {
    if (leader()) shared.v_empty[v.slot].arrive();
    v.advance();
  }

  // Two consumers issue their GEMMs in turn, so that the softmax of one runs under the GEMMs of the
  // other.
  __device__ __forceinline__ void first_turn() const {
    if (Traits::kTakesTurns && consumer == Traits::kConsumers - 1)
      named_arrive(kTurn, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void take_turn() const {
    if (Traits::kTakesTurns) named_sync(kTurn + consumer, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void give_turn() const {
    if (Traits::kTakesTurns)
      named_arrive(kTurn + (consumer + 1) % Traits::kConsumers, 2 * kGroupThreads);
  }

  // Waits for the other threads of this warpgroup.
  __device__ __forceinline__ void sync() const { named_sync(kDone + consumer, kGroupThreads); }

 private:
  __device__ __forceinline__ bool warp_leader() const { return threadIdx.x % kWarp == 0; }
  __device__ __forceinline__ bool leader() const { return threadIdx.x % kGroupThreads == 0; }
};

}  // namespace flash::v3
