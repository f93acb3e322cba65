// A warp's share of a tile: copied, rotated or taken as it is, rounded, stored.
#pragma once

#include "v3_hopper/fp8_quantize_schedule.cuh"
#include "v3_hopper/fp8_rotate.cuh"

namespace flash::v3::fp8 {

inline constexpr float kMaxE4M3 = 448.0f;
inline constexpr int kCopies = kHalves * kUnits;  // of 16 bytes each, by every thread for a tile
inline constexpr float kSpread = 0.125f;  // what the next row gets of what rounding has taken

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0));
}

// What one warp does with its lines of a tile. A head is kParts lines of kDim columns, each turned
// on its own.
template <class T, int kDim, int kParts>
struct Quantizer {
  static constexpr int kWide = kDim / kUnit;  // units of a line
  static constexpr int kPartWarps = kLines / kWarpLines<kDim>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int piece = kParts == 1 ? 0 : warp / kPartWarps;

  // Neighbouring lines' units swap places, that no two that are read together share banks.
  static __device__ __forceinline__ int place(int line, int unit) {
    return line * kWide + (unit ^ (line & 1));
  }

  // The first of a warp's lines in a tile, from the first row of its unit.
  __device__ __forceinline__ int first_line(const Step& step) const {
    return step.chunk * kLines + (kParts == 1 ? warp : warp % kPartWarps) * kWarpLines<kDim>;
  }

  // Starts copying a warp's lines to its own places in shared memory, whole lines at once.
  __device__ __forceinline__ void fetch(uint4* slots, const Part& part, const Unit& unit,
                                        const Step& step) const {
    constexpr int kTogether = kWarp / kWide;  // lines
    const View& source = part.tensor.source;
    const int line = lane / kWide, column = lane % kWide, at = first_line(step) + line;
    const int64_t head = unit.head_kv * part.group + step.head;
    const T* from = static_cast<const T*>(source.data) + unit.source + at * source.row +
                    head * source.head + piece * kDim + column * kUnit;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int to = place(line + i * kTogether, column);
      copy_async(slots + to, from, at + i * kTogether < unit.rows);
      from += kTogether * source.row;
    }
  }

  __device__ __forceinline__ void take(Share& x, const uint4* slots, const uint4* signs,
                                       const Hadamard16<T>& hadamard, bool turn) const {
    if (!turn) return take_plain(x, slots);
    uint4 packed[kHalves][kUnits];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Spot<kDim> spot(i / kUnits, i % kUnits);
      packed[i / kUnits][i % kUnits] = slots[place(spot.line, spot.unit)];
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint4 turned = signs[piece * kWide + Spot<kDim>(i / kUnits, i % kUnits).unit];
      uint4& own = packed[i / kUnits][i % kUnits];
      own = {own.x ^ turned.x, own.y ^ turned.y, own.z ^ turned.z, own.w ^ turned.w};
    }
    rotate<kDim>(x, packed, hadamard);
  }

  // What this thread copied itself: 8 rows of one unit.
  __device__ __forceinline__ void take_plain(Share& x, const uint4* slots) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int line = (i * kWarp + lane) / kWide, column = (i * kWarp + lane) % kWide;
      unpack<T>(x[i / kUnits][i % kUnits], slots[place(line, column)]);
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

  // e4m3 has no infinity.
  __device__ __forceinline__ void clear_infinite(Share& x) const {
#pragma unroll
    for (int i = 0; i < kCopies * kUnit; ++i) {
      float& value = x[i / kUnit / kUnits][i / kUnit % kUnits][i % kUnit];
      if (isinf(value)) value = NAN;
    }
  }

  static __device__ __forceinline__ uint32_t round_four(const float* x, float factor) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float2 pair = {x[e] * factor, x[e + 1] * factor};
      const uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      word |= two << e * 8;
    }
    return word;
  }

  __device__ __forceinline__ void store(const Share& x, const Part& part, const Unit& unit,
                                        const Step& step, float inverse) const {
    constexpr int kNext = kDim > 32 ? 2 : 1;  // neighbouring units that a thread has
    const int head = unit.head_kv * part.group + step.head;
#pragma unroll
    for (int i = 0; i < kCopies; i += kNext) {
      const Spot<kDim> spot(i / kUnits, i % kUnits);
      const int at = first_line(step) + spot.line;
      if (at >= unit.rows) continue;
      const int64_t line = ((unit.stored + at) * part.tensor.heads + head) * kParts + piece;
      const float* first = x[i / kUnits][i % kUnits];
      const uint2 low = {round_four(first, inverse), round_four(first + 4, inverse)};
      if constexpr (kNext == 1) {
        __stcs(static_cast<uint2*>(part.tensor.stored) + line * kWide + spot.unit, low);
      } else {
        const float* second = x[i / kUnits][i % kUnits + 1];
        const uint4 both = {low.x, low.y, round_four(second, inverse),
                            round_four(second + 4, inverse)};
        __stcs(static_cast<uint4*>(part.tensor.stored) + (line * kWide + spot.unit) / 2, both);
      }
    }
  }

  // Eight rows of one unit. With `spread`, a part of what rounding has taken from the rows before
  // is given to the next, so that the errors of one column cancel where many keys count alike.
  __device__ __forceinline__ void store_plain(const Share& x, const Part& part, const Unit& unit,
                                              const Step& step, float inverse) const {
    const float share = part.tensor.spread ? kSpread : 0.0f;
    const int head = unit.head_kv * part.group + step.head;
    float owed[kUnit] = {};
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int line = (i * kWarp + lane) / kWide, column = (i * kWarp + lane) % kWide;
      uint32_t words[2];
#pragma unroll
      for (int e = 0; e < kUnit; e += 4) {
        float exact[4], given[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          exact[n] = __fmul_rn(x[i / kUnits][i % kUnits][e + n], inverse);
          given[n] = fmaf(owed[e + n], share, exact[n]);
        }
        words[e / 4] = round_four(given, 1.0f);
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          const __half2 two = __half2(__nv_cvt_fp8x2_to_halfraw2(words[e / 4] >> n * 8, __NV_E4M3));
          const float2 rounded = __half22float2(two);
          const float lost[2] = {exact[n] - rounded.x, exact[n + 1] - rounded.y};
#pragma unroll
          for (int m = 0; m < 2; ++m) {  // not of NaN and Inf
            owed[e + n + m] += fabsf(lost[m]) <= kMaxE4M3 ? lost[m] : 0.0f;
          }
        }
      }
      const int at = first_line(step) + line;
      if (at >= unit.rows) continue;
      const int64_t to = ((unit.stored + at) * part.tensor.heads + head) * kParts + piece;
      __stcs(static_cast<uint2*>(part.tensor.stored) + to * kWide + column,
             uint2{words[0], words[1]});
    }
  }
};

}  // namespace flash::v3::fp8
