// Softmax over keys that arrive block by block: running reference, running sum, one division.
#pragma once

#include <math_constants.h>

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "v2_parallel/schedule.cuh"

namespace flash::v2 {

// Scores that one factor cannot express: softcap * tanh(scale * S / softcap), or a scale of any
// sign. They arrive scaled.
template <class Traits>
__device__ __forceinline__ void cap(typename Traits::Scores& S, const ForwardParams& p) {
  if constexpr (Traits::kFeatured) {
    const float inner = p.softcap == 0.0f ? p.scale : p.scale / p.softcap;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          S[m][n][e] *= inner;
          if (p.softcap != 0.0f) S[m][n][e] = p.softcap * fast_tanh(S[m][n][e]);
        }
      }
    }
  }
}

// Scores outside the mask become -inf.
template <class Traits>
__device__ __forceinline__ void mask(typename Traits::Scores& S, const Tile<Traits>& tile, int j) {
  if (tile.warp_sees_all(j)) return;
  const Sequence& sequence = tile.sequence;
  const int lane = threadIdx.x % 32;
  const Team<Traits> team;
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
        const int key = team.column_tile(n) * 8;
        if (key < first || key > last) S[m][n][e] = -CUDART_INF_F;
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
  RowValues row_sum;    // this lane's share of the sum of P
  RowValues factor;     // by which O follows
  bool moved;           // did the last update move a reference of this warp?
  float scale;          // from scores to exponents
  uint32_t sValues;     // where the warps of a team exchange values of rows
  Team<Traits> team;

  __device__ __forceinline__ Softmax(const ForwardParams& p, const Shared<Traits>& smem)
      : scale(Traits::kFeatured ? kLog2e : p.scale * kLog2e), sValues(smem.row_values()) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        reference[m][h] = kNothingSeen;
        row_sum[m][h] = 0.0f;
      }
    }
  }

  // The references move to the largest scores, once these outgrow them in any row of the warp.
  __device__ __forceinline__ void update(const typename Traits::Scores& S) {
    RowValues largest;
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest[m][h] = fmaxf(S[m][0][2 * h], S[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < Traits::kTilesKV; ++n) {
          largest[m][h] = fmaxf(largest[m][h], fmaxf(S[m][n][2 * h], S[m][n][2 * h + 1]));
        }
        outgrown |= fmaf(largest[m][h], scale, -reference[m][h]) > kSlack;
      }
    }
    moved = team.any(outgrown);
    if (__builtin_expect(!moved, true)) return;
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) largest[m][h] = quad_max(largest[m][h]);
    }
    exchange(largest, [](float& mine, float other) { mine = fmaxf(mine, other); });
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float old = reference[m][h];
        reference[m][h] = fmaxf(old, largest[m][h] * scale);
        factor[m][h] = fast_exp2(old - reference[m][h]);
        row_sum[m][h] *= factor[m][h];
      }
    }
  }

  // O follows the reference.
  __device__ __forceinline__ void rescale(typename Traits::Output& O) const {
    if (__builtin_expect(moved, false)) multiply(O, factor);
  }

  // P = exp(S - reference) of one row and two neighbouring keys, added to the sum of the row and
  // rounded to an operand of the next product.
  __device__ __forceinline__ uint32_t probability(const float (&S)[4], int m, int h) {
    const float low = fast_exp2(fmaf(S[2 * h], scale, -reference[m][h]));
    const float high = fast_exp2(fmaf(S[2 * h + 1], scale, -reference[m][h]));
    row_sum[m][h] += low;
    row_sum[m][h] += high;
    return pack<typename Traits::Element>(low, high);
  }

  // O becomes the weighted mean of V: the one division, after the last block.
  __device__ __forceinline__ void normalize(typename Traits::Output& O) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) row_sum[m][h] = quad_sum(row_sum[m][h]);
    }
    exchange(row_sum, [](float& mine, float other) { mine += other; });
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[m][h] = row_sum[m][h] == 0.0f ? 0.0f : __fdividef(1.0f, row_sum[m][h]);
      }
    }
    multiply(O, factor);
  }

  // log(sum(exp(S))); -inf for a row that saw no key. Valid after normalize.
  __device__ __forceinline__ float lse(int m, int h) const {
    return row_sum[m][h] == 0.0f ? -CUDART_INF_F : fmaf(reference[m][h], kLn2, logf(row_sum[m][h]));
  }

 private:
  // Combines values that every lane of a quad holds with those of the other warp of the team.
  // The barriers of a block lie between two exchanges.
  template <class Combine>
  __device__ __forceinline__ void exchange(RowValues& values, Combine combine) const {
    if constexpr (Traits::kTeam > 1) {
      const int lane = threadIdx.x % 32;
      auto address = [&](int part, int m, int h) {
        const int row = team.first_row + m * 16 + h * 8 + lane / 4;
        return sValues + uint32_t(part * Traits::kBlockQ + row) * 4;
      };
#pragma unroll
      for (int i = 0; i < 2 * Traits::kTilesQ; ++i) {
        store_shared_4(address(team.part, i / 2, i % 2), __float_as_uint(values[i / 2][i % 2]));
      }
      team.sync();  // the other warp's values are in shared memory
#pragma unroll
      for (int i = 0; i < 2 * Traits::kTilesQ; ++i) {
        combine(values[i / 2][i % 2],
                __uint_as_float(load_shared_4(address(1 - team.part, i / 2, i % 2))));
      }
    }
  }

  static __device__ __forceinline__ void multiply(typename Traits::Output& O, const RowValues& by) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTilesV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) O[m][n][e] *= by[m][e / 2];
      }
    }
  }
};

// P as operands of the second product, 16 keys at a time. A warp alone forms them in registers: the
// accumulator layout of S is the operand layout of P. P of the next 16 keys is formed between the
// products of this one, so that both units work. A team exchanges them through shared memory.
template <class Traits, int kParts>
struct Weights {
  static constexpr int kOperands = 4 * Traits::kTilesQ;            // registers of P for 16 keys
  static constexpr int kOwnSteps = Traits::kTilesKV / 2 / kParts;  // of 16 keys
  using Rows = typename Traits::WeightRows;
  using Scores = typename Traits::Scores;

  uint32_t rP[2][Traits::kTilesQ][4];  // (kRowsPerWarp, 16), this step and the next
  uint32_t address;

  __device__ __forceinline__ Weights(const Scores& S, Softmax<Traits>& softmax,
                                     const Shared<Traits>& smem) {
    if constexpr (Traits::kTeam == 1) {
      prepare(S, softmax, 0, 0, kOperands);
    } else {
      const int lane = threadIdx.x % 32;
      const uint32_t sP = smem.p() + softmax.team.first_row * Rows::kRowBytes;
      const uint32_t own =
          opaque(sP + Rows::offset(lane / 4, softmax.team.part * 2) + lane % 4 * 4);
#pragma unroll
      for (int step = 0; step < kOwnSteps; ++step) {
        prepare(S, softmax, step, 0, kOperands);
#pragma unroll
        for (int k = 0; k < kOperands; ++k) {
          const int row = k / 4 * 16 + k % 2 * 8;
          store_shared_4(
              Rows::advance(own, step * 2 * Traits::kTeam + k % 4 / 2) + row * Rows::kRowBytes,
              rP[step % 2][k / 4][k % 4]);
        }
      }
      softmax.team.sync();  // P of all keys of the block is in shared memory
      address = sP + Rows::offset(lane % 16, lane / 16);
      fetch(0);
    }
  }

  // Part `now` of `parts` of the work towards the operands of `step`.
  __device__ __forceinline__ void advance(const Scores& S, Softmax<Traits>& softmax, int step,
                                          int now, int parts) {
    if (step == Traits::kStepsPV / kParts) return;
    if constexpr (Traits::kTeam == 1) {
      prepare(S, softmax, step, now * kOperands / parts, (now + 1) * kOperands / parts);
    } else {
      if (now == 0) fetch(step);
    }
  }

 private:
  __device__ __forceinline__ void prepare(const Scores& S, Softmax<Traits>& softmax, int step,
                                          int begin, int end) {
#pragma unroll
    for (int k = begin; k < end; ++k) {
      const int m = k / 4, i = k % 4;
      rP[step % 2][m][i] = softmax.probability(S[m][2 * step + i / 2], m, i % 2);
    }
  }
  __device__ __forceinline__ void fetch(int step) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
      ldmatrix_x4(rP[step % 2][m], Rows::advance(address, 2 * step) + m * 16 * Rows::kRowBytes);
    }
  }
};

}  // namespace flash::v2
