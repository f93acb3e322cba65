// Which CTA quantizes which rows: units that share a scale, of all tensors, in turn.
#pragma once

#include "v3_hopper/fp8_quantize.h"

namespace flash::v3::fp8 {

inline constexpr int kLines = 128;  // of a tile; a line is one row of one head (or part of it)

// What a launch does: everything, only the largest magnitudes, or only the rounding.
enum class Pass { kAll, kAmax, kRound };

// n / divisor for n < 2^31 without a division.
struct Divider {
  unsigned divisor = 1, magic = 0, shift = 0;

  void prepare(int by) {
    divisor = unsigned(by);
    while ((1u << shift) < divisor) ++shift;
    magic = unsigned(((uint64_t(1) << (31 + shift)) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int quotient(int n) const {
    return divisor == 1 ? n : int(__umulhi(unsigned(n) * 2, magic) >> shift);
  }
};

// A tensor, and how its units are counted: K/V heads first, then blocks of rows.
struct Part {
  QuantizeTensor tensor;
  Divider heads_kv, blocks;
  int group = 1, chunks = 1;  // query heads of a K/V head; tiles of a block's rows of one head
  int units = 0;
};
struct Parts {
  Part part[QuantizeParams::kMost];
};

// The rows that share one scale: of a block, for all query heads of a K/V head.
struct Unit {
  int batch, head_kv, block, rows;
  int64_t source, stored;  // elements to the first row, and its number

  __device__ __forceinline__ Unit(const Part& part, int index) {
    const QuantizeTensor& t = part.tensor;
    const int above = part.heads_kv.quotient(index);
    head_kv = index - above * t.heads_kv;
    batch = part.blocks.quotient(above);
    block = above - batch * int(part.blocks.divisor);
    const int first_row = block * t.block_rows;
    const bool packed = t.cu_seqlens != nullptr;
    const int64_t begin = packed ? t.cu_seqlens[batch] : int64_t(batch) * t.rows;
    const int all = packed ? t.cu_seqlens[batch + 1] - int(begin) : t.rows;
    rows = min(t.block_rows, all - first_row);
    stored = begin + first_row;
    source = packed ? stored * t.source.row : batch * t.source.batch + first_row * t.source.row;
  }
};

// One tile, kLines rows of one head, of one unit. A unit of several tiles is walked twice: for its
// scale, then to be rounded.
struct Step {
  int part, index, head, chunk;
  bool again;

  __device__ __forceinline__ bool valid() const { return part < QuantizeParams::kMost; }
  __device__ __forceinline__ void settle(const Parts& parts) {
    while (valid() && index >= parts.part[part].units) index -= parts.part[part++].units;
  }
  __device__ __forceinline__ bool last(const Part& of) const {
    return chunk + 1 == of.chunks && head + 1 == of.group;
  }
  template <Pass kPass>
  __device__ __forceinline__ void advance(const Parts& parts) {
    const Part& of = parts.part[part];
    if (!last(of)) {
      if (++chunk == of.chunks) ++head, chunk = 0;
      return;
    }
    again = kPass == Pass::kAll && head + chunk > 0 && !again;
    head = chunk = 0;
    if (again) return;
    index += gridDim.x;
    settle(parts);
  }
};

}  // namespace flash::v3::fp8
