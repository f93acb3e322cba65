// Backward, in registers: P from S and the saved LSE, dS from P and dP.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"

namespace flash {

inline constexpr float kLog2e = 1.4426950408889634f;

// Where an accumulator element lies in the block of scores. Accumulator rows are keys in the main
// kernel (S^T) and query rows in the deterministic dQ kernel (S).
struct KeysByRows {
  static __device__ __forceinline__ int key(int m, int n, int e, int lane) {
    return m * 16 + lane / 4 + e / 2 * 8;
  }
  static __device__ __forceinline__ int row(int m, int n, int e, int lane) {
    return n * 8 + lane % 4 * 2 + e % 2;
  }
};
struct RowsByKeys {
  static __device__ __forceinline__ int key(int m, int n, int e, int lane) {
    return KeysByRows::row(m, n, e, lane);
  }
  static __device__ __forceinline__ int row(int m, int n, int e, int lane) {
    return KeysByRows::key(m, n, e, lane);
  }
};

// Every accumulator starts at the negative of its row's statistic.
template <class Place, int kTiles>
__device__ __forceinline__ void start_negative(float (&acc)[2][kTiles][4], const float* stats,
                                               int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = -stats[Place::row(m, n, e, lane)];
    }
  }
}

// rS = P = exp2(S * scale - LSE) for tile i. With softcap rS is the factor of dP, which is P times
// the derivative of the cap, and P is rounded into rP at once.
template <class Traits, class Place>
__device__ __forceinline__ void exponentiate(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                             float (&rS)[2][Traits::kWarpQ / 8][4],
                                             const BackwardParams& p, const float* lse, int i,
                                             int lane) {
  using Element = typename Traits::Element;
  const int m = i % 2, n = i / 2;
  const bool capped = Traits::kFeatured && p.softcap != 0.0f;
  const float scale = capped ? p.scale / p.softcap : p.scale * kLog2e;
  float derivative[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float s = rS[m][n][e] * scale;
    if (capped) {
      const float t = fast_tanh(s);
      s = t * (p.softcap * kLog2e);
      derivative[e] = 1.0f - t * t;
    }
    rS[m][n][e] = fast_exp2(s - lse[Place::row(m, n, e, lane)]);
  }
  if constexpr (Traits::kFeatured) {
    rP[m][n / 2][n % 2 * 2] = pack<Element>(rS[m][n][0], rS[m][n][1]);
    rP[m][n / 2][n % 2 * 2 + 1] = pack<Element>(rS[m][n][2], rS[m][n][3]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (capped) rS[m][n][e] *= derivative[e];
    }
  }
}

// P and dS become 0 where the row must not see the key, whatever the products gave, and NaN where
// it sees a key that was not finite.
template <class Traits, class Place>
__device__ __forceinline__ void mask_scores(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                            float (&rS)[2][Traits::kWarpQ / 8][4],
                                            float (&rdP)[2][Traits::kWarpQ / 8][4],
                                            Sequence sequence, const uint32_t* poison, int row,
                                            int key, int lane) {
  const unsigned band = sequence.last - sequence.first;
  const int diagonal = row - key + sequence.last, keys = sequence.seqlen_k - key;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = Place::row(m, n, e, lane), c = Place::key(m, n, e, lane);
        const bool in_band = unsigned(diagonal + r - c) <= band;
        const uint32_t visible = in_band & (c < keys) ? ~0u : 0;
        if constexpr (Traits::kFeatured) {
          const uint32_t half = e % 2 == 0 ? 0x0000ffffu : 0xffff0000u;
          uint32_t& pair = rP[m][n / 2][n % 2 * 2 + e / 2];
          pair = (pair & (visible | ~half)) | (poison[c] & visible & half);
        }
        rS[m][n][e] = __uint_as_float((__float_as_uint(rS[m][n][e]) | poison[c]) & visible);
        rdP[m][n][e] = __uint_as_float(__float_as_uint(rdP[m][n][e]) & visible);
      }
    }
  }
}

// P, rounded, unless softcap had to do that before.
template <class Traits>
__device__ __forceinline__ void round_p(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                        const float (&rS)[2][Traits::kWarpQ / 8][4]) {
  if constexpr (!Traits::kFeatured) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          rP[m][n / 2][n % 2 * 2 + h] =
              pack<typename Traits::Element>(rS[m][n][2 * h], rS[m][n][2 * h + 1]);
        }
      }
    }
  }
}

// dS = P * (dP - delta), rounded.
template <class Element, int kTiles>
__device__ __forceinline__ void multiply_ds(uint32_t (&rdS)[2][kTiles / 2][4],
                                            const float (&rdP)[2][kTiles][4],
                                            const float (&rS)[2][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rdS[m][n / 2][n % 2 * 2 + h] = pack<Element>(rdP[m][n][2 * h] * rS[m][n][2 * h],
                                                     rdP[m][n][2 * h + 1] * rS[m][n][2 * h + 1]);
      }
    }
  }
}

// Fragments of P^T or dS^T to shared memory, where other warps read them.
template <class Traits>
__device__ __forceinline__ void store_scores(typename Traits::Element* target,
                                             const uint32_t (&r)[2][Traits::kWarpQ / 16][4],
                                             int key, int row, int lane) {
  char* base = reinterpret_cast<char*>(target) + (lane & 3) * 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = key + m * 16 + half * 8 + lane / 4;
        *reinterpret_cast<uint32_t*>(base + Traits::Scores::offset(c, row / 8 + n)) =
            r[m][n / 2][n % 2 * 2 + half];
      }
    }
  }
}

}  // namespace flash
