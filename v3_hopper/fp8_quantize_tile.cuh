// A warp's share of a tile: copied, rotated or taken as it is, rounded, stored.
#pragma once

#include "v3_hopper/fp8_quantize_schedule.cuh"
#include "v3_hopper/fp8_rotate.cuh"

namespace flash::v3::fp8 {

inline constexpr float kMaxE4M3 = 448.0f;
inline constexpr int kCopies = kHalves * kUnits;  // of 16 bytes each, by every thread for a tile
inline constexpr float kSpread = 0.125f;  // what the next row gets of what rounding has taken

// The rest of a line of 128 bytes is what another warp copies at that time.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0));
}

// What one warp does with its lines of a tile. A head is kParts lines of kDim columns, each turned
// on its own.
template <class T, int kDim, int kParts>
struct Quantizer {
  static constexpr int kWide = kDim / kUnit;       // units of a line
  static constexpr int kTogether = kWarp / kWide;  // lines that a warp copies at once
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

  // The first of the eight units that a thread copies: their rows stand kTogether apart. A warp
  // takes whole lines, or where keys are to be contiguous 32 columns of half of the rows.
  struct Origin {
    int row, column;
  };
  __device__ __forceinline__ Origin origin(const Part& part, const Step& step) const {
    if (!part.tensor.keys_first) {
      return {first_line(step) + lane / kWide, piece * kDim + lane % kWide * kUnit};
    }
    const int chain = lane / 4, row = chain / kTogether * kCopies * kTogether + chain % kTogether;
    return {step.chunk * kLines + warp % 2 * kLines / 2 + row, (warp / 2 * 4 + lane % 4) * kUnit};
  }

  // Starts copying a thread's units to its own places in shared memory.
  __device__ __forceinline__ void fetch(uint4* slots, const Part& part, const Unit& unit,
                                        const Step& step) const {
    const View& source = part.tensor.source;
    const Origin at = origin(part, step);
    const int64_t head = unit.head_kv * part.group + step.head;
    const T* from = static_cast<const T*>(source.data) + unit.source + at.row * source.row +
                    head * source.head + at.column;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int to = place(lane / kWide + i * kTogether, lane % kWide);
      copy_async(slots + to, from, at.row + i * kTogether < unit.rows);
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

  // One row of a thread's unit. With a share, that part of what rounding has taken from the rows
  // before is given to this one, so that the errors of one column cancel where many keys count
  // alike.
  static __device__ __forceinline__ uint2 round_row(const float (&x)[kUnit], float (&owed)[kUnit],
                                                    float share, float inverse) {
    uint32_t words[2];
#pragma unroll
    for (int e = 0; e < kUnit; e += 4) {
      float exact[4], given[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        exact[n] = __fmul_rn(x[e + n], inverse);
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
    return {words[0], words[1]};
  }

  // Eight rows of one unit.
  __device__ __forceinline__ void store_plain(const Share& x, const Part& part, const Unit& unit,
                                              const Step& step, float inverse) const {
    const float share = part.tensor.spread ? kSpread : 0.0f;
    const int head = unit.head_kv * part.group + step.head;
    float owed[kUnit] = {};
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int line = (i * kWarp + lane) / kWide, column = (i * kWarp + lane) % kWide;
      const uint2 words = round_row(x[i / kUnits][i % kUnits], owed, share, inverse);
      const int at = first_line(step) + line;
      if (at >= unit.rows) continue;
      const int64_t to = ((unit.stored + at) * part.tensor.heads + head) * kParts + piece;
      __stcs(static_cast<uint2*>(part.tensor.stored) + to * kWide + column, words);
    }
  }

  // Four words of four columns each, one of a row, become four words of four rows each.
  static __device__ __forceinline__ void flip(uint32_t (&to)[4], const uint4& from) {
    const uint32_t low[2] = {__byte_perm(from.x, from.y, 0x5140),
                             __byte_perm(from.z, from.w, 0x5140)};
    const uint32_t high[2] = {__byte_perm(from.x, from.y, 0x7362),
                              __byte_perm(from.z, from.w, 0x7362)};
    to[0] = __byte_perm(low[0], low[1], 0x5410);
    to[1] = __byte_perm(low[0], low[1], 0x7632);
    to[2] = __byte_perm(high[0], high[1], 0x5410);
    to[3] = __byte_perm(high[0], high[1], 0x7632);
  }

  // The same with keys contiguous: a warp's 32 columns of 64 rows pass through its own slots, in
  // groups of four columns and 16 rows, with gaps between the groups, for the banks.
  __device__ __forceinline__ void store_keys_first(const Share& x, uint4* slots, const Part& part,
                                                   const Unit& unit, const Step& step,
                                                   float inverse) const {
    constexpr int kRows = 16, kRowGap = 20, kGap = 80, kPairGap = 168;  // words
    static_assert(4 * kPairGap * 4 <= kCopies * kWarp * 16);
    const float share = part.tensor.spread ? kSpread : 0.0f;
    auto* words = reinterpret_cast<uint32_t*>(slots);
    float owed[kUnit] = {};
    const int first = origin(part, step).row % (kLines / 2);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint2 two = round_row(x[i / kUnits][i % kUnits], owed, share, inverse);
      const int row = first + i * kTogether;
      uint32_t* to = words + lane % 4 * kPairGap + row / kRows * kRowGap + row % kRows;
      to[0] = two.x;
      to[kGap] = two.y;
    }
    __syncwarp();
    const int group = lane / 4, rows = lane % 4;
    const uint32_t* from = words + group / 2 * kPairGap + group % 2 * kGap + rows * kRowGap;
    uint32_t flipped[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) flip(flipped[i], reinterpret_cast<const uint4*>(from)[i]);
    __syncwarp();  // the slots may be filled again
    const int at = step.chunk * kLines + warp % 2 * kLines / 2 + rows * kRows;
    if (at >= unit.rows) return;
    const int64_t all = part.tensor.rows, head = unit.head_kv * part.group + step.head;
    const int64_t line =
        (unit.batch * part.tensor.heads + head) * (kParts * kDim) + warp / 2 * 32 + group * 4;
    auto* stored = static_cast<unsigned char*>(part.tensor.stored) + line * all +
                   (unit.stored - unit.batch * all + at);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      __stcs(reinterpret_cast<uint4*>(stored + e * all),
             uint4{flipped[0][e], flipped[1][e], flipped[2][e], flipped[3][e]});
    }
  }
};

}  // namespace flash::v3::fp8
