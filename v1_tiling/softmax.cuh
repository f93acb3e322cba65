// Softmax over keys that arrive block by block: running reference, running sum, a division per
// visit.
#pragma once

#include <math_constants.h>

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "v1_tiling/schedule.cuh"
#include "v1_tiling/split.cuh"

namespace flash::v1 {

// S becomes softcap * tanh(scale * S / softcap), or scale * S. Only featured kernels need it.
template <class Traits>
__device__ __forceinline__ void cap(typename Traits::Scores& S, const ForwardParams& p) {
  if constexpr (Traits::kFeatured) {
    const bool capped = p.softcap != 0.0f;
    const float scale = capped ? p.scale / p.softcap : p.scale;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = S[m][n][e] * scale;
          S[m][n][e] = capped ? p.softcap * tanhf(x) : x;
        }
      }
    }
  }
}

// After a product of split rows: S becomes what whole rows would have given.
template <class Traits>
__device__ __forceinline__ void join(typename Traits::Scores& S, const Shared<Traits>& smem,
                                     int j) {
  const int lane = threadIdx.x % 32;
  float of_q[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    of_q[h] = __uint_as_float(load_shared_4(smem.q_scales() + (h * 8 + lane / 4) * 4));
  }
#pragma unroll
  for (int n = 0; n < Traits::kTilesKV; ++n) {
    const float2 of_k = load_shared_pair(smem.k_scales(j) + (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // First the product of scales: S times one of them may not exist where the score does.
      S[0][n][e] *= (e % 2 == 0 ? of_k.x : of_k.y) * of_q[e / 2];
    }
  }
}

// Scores outside the mask become -inf. Call for blocks that are not visible as a whole.
template <class Traits>
__device__ __forceinline__ void mask(typename Traits::Scores& S, const Tile<Traits>& tile, int j) {
  const Sequence& sequence = tile.sequence;
  const int lane = threadIdx.x % 32;
  const int lane_key = j * Traits::kBlockKV + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = tile.warp_row + m * 16 + e / 2 * 8 + lane / 4;
      const int first = row + sequence.first - lane_key - e % 2;
      const int last = min(row + sequence.last, sequence.seqlen_k - 1) - lane_key - e % 2;
#pragma unroll
      for (int n = 0; n < Traits::kTilesKV; ++n) {
        if (n * 8 < first || n * 8 > last) S[m][n][e] = -CUDART_INF_F;
      }
    }
  }
}

// The state of the rows of one warp; lanes of a quad share rows. Everything here is in powers of 2.
template <class Traits>
struct Softmax {
  static constexpr float kLog2e = 1.4426950408889634f;
  static constexpr float kLn2 = 0.6931471805599453f;
  static constexpr float kNothingSeen = -1e30f;
  // P may exceed 1 by up to 2^kSlack before the reference moves: most blocks then need no rescale.
  static constexpr float kSlack = 8.0f;
  using RowValues = float[Traits::kTilesQ][2];

  RowValues reference;  // what P is relative to: the largest exponent so far, or up to kSlack less
  RowValues row_sum;    // this lane's share of the sum of P; see resume()
  RowValues factor;     // by which O follows
  bool moved;           // did the last update move a reference of this warp?
  float scale;          // from scores to exponents

  __device__ __forceinline__ explicit Softmax(const ForwardParams& p)
      : scale(Traits::kFeatured ? kLog2e : p.scale * kLog2e) {}

  // At the first visit: no key was seen.
  __device__ __forceinline__ void start(typename Traits::Output& O) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        reference[m][h] = kNothingSeen;
        row_sum[m][h] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < Traits::kTilesV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) O[m][n][e] = 0.0f;
      }
    }
  }

  // At a later visit: O is the mean that the last one left, and row_sum, until the first update,
  // the whole sum, with a minus that says so.
  __device__ __forceinline__ void resume(int m, int h, float old_reference, float sum) {
    reference[m][h] = old_reference;
    row_sum[m][h] = __uint_as_float(opaque(__float_as_uint(sum) | 0x80000000u));  // NaN, too
  }
  __device__ __forceinline__ bool resumed() const { return __float_as_int(row_sum[0][0]) < 0; }

  // The references move to the largest scores, once these outgrow them in any row of the warp.
  __device__ __forceinline__ void update(const typename Traits::Scores& S) {
    RowValues largest;
    const bool first = resumed();
    bool outgrown = first;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[m][h] = 1.0f;
        largest[m][h] = fmaxf(S[m][0][2 * h], S[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < Traits::kTilesKV; ++n) {
          largest[m][h] = fmaxf(largest[m][h], fmaxf(S[m][n][2 * h], S[m][n][2 * h + 1]));
        }
        outgrown |= fmaf(largest[m][h], scale, -reference[m][h]) > kSlack;
      }
    }
    moved = __any_sync(kFullWarp, outgrown);
    if (!moved) return;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float old = reference[m][h];
        reference[m][h] = fmaxf(old, quad_max(largest[m][h]) * scale);
        factor[m][h] = fast_exp2(old - reference[m][h]);
        const float sum = fabsf(row_sum[m][h]) * factor[m][h];
        if (first) factor[m][h] = sum;  // makes O a sum again
        row_sum[m][h] = first && threadIdx.x % 4 != 0 ? 0.0f : sum;
      }
    }
  }

  // O follows the reference.
  __device__ __forceinline__ void rescale(typename Traits::Output& O) const {
    if (moved) multiply(O, factor);
  }

  // P = exp(S - reference) of one element.
  __device__ __forceinline__ float probability(float S, int m, int h) const {
    return fast_exp2(fmaf(S, scale, -reference[m][h]));
  }

  // O becomes the weighted mean of V over all keys so far: a division at the end of every visit.
  __device__ __forceinline__ void normalize(typename Traits::Output& O) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_sum[m][h] = quad_sum(row_sum[m][h]);
        factor[m][h] = row_sum[m][h] == 0.0f ? 0.0f : 1.0f / row_sum[m][h];
      }
    }
    multiply(O, factor);
  }

  // log(sum(exp(S))); -inf for a row that saw no key. Valid after normalize.
  __device__ __forceinline__ float lse(int m, int h) const {
    return row_sum[m][h] == 0.0f ? -CUDART_INF_F : fmaf(reference[m][h], kLn2, logf(row_sum[m][h]));
  }

 private:
  static __device__ __forceinline__ void multiply(typename Traits::Output& O, const RowValues& by) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTilesV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) multiply_here(O[m][n][e], by[m][e / 2]);
      }
    }
  }
};

// P as operands of the second product, 16 keys at a time: the accumulator layout of S is the
// operand layout of P. P of the next 16 keys is formed between the products of this one, so that
// both units work.
template <class Traits>
struct Weights {
  static constexpr int kOperands = 4 * Traits::kTilesQ;  // registers of P for 16 keys
  using Scores = typename Traits::Scores;

  uint32_t rP[2][Traits::kTilesQ][4];  // (kRowsPerWarp, 16), this step and the next

  __device__ __forceinline__ Weights(const Scores& S, Softmax<Traits>& softmax) {
    prepare(S, softmax, 0, 0, kOperands);
  }

  // Part `now` of `parts` of the work towards the operands of `step`.
  __device__ __forceinline__ void advance(const Scores& S, Softmax<Traits>& softmax, int step,
                                          int now, int parts) {
    if (step == Traits::kStepsPV) return;
    prepare(S, softmax, step, now * kOperands / parts, (now + 1) * kOperands / parts);
  }

 private:
  __device__ __forceinline__ void prepare(const Scores& S, Softmax<Traits>& softmax, int step,
                                          int begin, int end) {
#pragma unroll
    for (int k = begin; k < end; ++k) {
      const int m = k / 4, i = k % 4, h = i % 2;
      const float (&pair)[4] = S[m][2 * step + i / 2];
      const float low = softmax.probability(pair[2 * h], m, h);
      const float high = softmax.probability(pair[2 * h + 1], m, h);
      softmax.row_sum[m][h] += low;
      softmax.row_sum[m][h] += high;
      rP[step % 2][m][i] = pack<typename Traits::Element>(low, high);
    }
  }
};

// P of fp32 for the second product, with what V's rows were divided by.
template <class Traits>
__device__ __forceinline__ void weigh(float (&P)[Traits::kTilesKV][4],
                                      const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                      uint32_t v_scales) {
  v_scales += threadIdx.x % 4 * 8;
#pragma unroll
  for (int n = 0; n < Traits::kTilesKV; ++n) {
    const float2 of_v = load_shared_pair(v_scales + n * 32);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = softmax.probability(S[0][n][e], 0, e / 2);
      softmax.row_sum[0][e / 2] += x;
      P[n][e] = x * (e % 2 == 0 ? of_v.x : of_v.y);
    }
  }
}

}  // namespace flash::v1
