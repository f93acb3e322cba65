// Softmax over keys that arrive block by block: running reference, running sum, a division per
// visit.
#pragma once

#include <math_constants.h>

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "v1_tiling/schedule.cuh"

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

// The state of the rows of one warp; lanes of a quad share rows.
template <class Traits>
struct Softmax {
  static constexpr float kLog2e = 1.4426950408889634f;
  static constexpr float kLn2 = 0.6931471805599453f;
  // P may exceed 1 by up to 2^kSlack before the reference moves: most blocks then need no rescale.
  static constexpr float kSlack = 8.0f;

  float reference[Traits::kTilesQ][2];  // at least the largest score so far, less the slack
  float row_sum[Traits::kTilesQ][2];    // this lane's share of the sum of P
  float factor[Traits::kTilesQ][2];     // of the last change of reference
  float scale_log2;                     // from scores to powers of two
  bool moved;                           // did the last update change a reference in this warp?
  bool resumed;  // O is still the mean that an earlier visit left, and each lane holds whole sums

  __device__ __forceinline__ explicit Softmax(const ForwardParams& p) {
    scale_log2 = Traits::kFeatured ? kLog2e : p.scale * kLog2e;
  }

  // No key was seen yet.
  __device__ __forceinline__ void start(typename Traits::Output& O) {
    resumed = false;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        reference[m][h] = -CUDART_INF_F;
        row_sum[m][h] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < Traits::kTilesV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) O[m][n][e] = 0.0f;
      }
    }
  }

  // The exponent of the reference; 0 while a row has seen no key.
  __device__ __forceinline__ float offset(int m, int h) const {
    return reference[m][h] == -CUDART_INF_F ? 0.0f : reference[m][h] * scale_log2;
  }

  // S becomes P = exp(scale * S - reference), and the sums grow by it.
  __device__ __forceinline__ void update(typename Traits::Scores& S) {
    move_reference(S);
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
      const float offsets[2] = {offset(m, 0), offset(m, 1)};
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          S[m][n][e] = fast_exp2(fmaf(S[m][n][e], scale_log2, -offsets[e / 2]));
          sum[e / 2] += S[m][n][e];
        }
      }
      row_sum[m][0] += sum[0], row_sum[m][1] += sum[1];
    }
  }

  // O follows the reference.
  __device__ __forceinline__ void rescale(typename Traits::Output& O) const {
    if (!moved) return;
    multiply(O, factor);
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

  // log(sum(exp(scale * S))); -inf for a row that saw no key. Valid after normalize.
  __device__ __forceinline__ float lse(int m, int h) const {
    return row_sum[m][h] == 0.0f ? -CUDART_INF_F : offset(m, h) * kLn2 + logf(row_sum[m][h]);
  }

 private:
  __device__ __forceinline__ void move_reference(const typename Traits::Scores& S) {
    float largest[Traits::kTilesQ][2];
    for (auto& f : factor) f[0] = f[1] = 1.0f;
    bool outgrown = resumed;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest[m][h] = fmaxf(S[m][0][2 * h], S[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < Traits::kTilesKV; ++n) {
          largest[m][h] = fmaxf(largest[m][h], fmaxf(S[m][n][2 * h], S[m][n][2 * h + 1]));
        }
        outgrown |= (largest[m][h] - reference[m][h]) * scale_log2 > kSlack;
      }
    }
    moved = __any_sync(kFullWarp, outgrown);
    if (!moved) return;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float old = reference[m][h];
        reference[m][h] = fmaxf(old, quad_max(largest[m][h]));
        const float shrink = fast_exp2(old * scale_log2 - offset(m, h));
        factor[m][h] = resumed ? row_sum[m][h] * shrink : shrink;
        row_sum[m][h] = resumed && threadIdx.x % 4 != 0 ? 0.0f : row_sum[m][h] * shrink;
      }
    }
    resumed = false;
  }

  static __device__ __forceinline__ void multiply(typename Traits::Output& O,
                                                  const float (&by)[Traits::kTilesQ][2]) {
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

}  // namespace flash::v1
