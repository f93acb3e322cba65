// Our layouts against CuTe's, while compiling; no machine code comes out of this file. The kernels
// use the formulas; CuTe's algebra says the same in the vocabulary of CUTLASS:
//   a swizzle <B, M, S>: bits [M, M + B) of an offset are XORed with those S places above them;
//   a fragment (thread, value) -> coordinate, here row + rows * column.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/swizzle.hpp>

#include "common/swizzle.cuh"

namespace flash {

// Rows of 2^n chunks of 16 bytes are one of CuTe's swizzles of byte offsets.
template <int kDim, class Swizzle>
constexpr bool swizzled_as() {
  using Rows = SwizzledRows<kDim>;
  for (int row = 0; row < 64; ++row) {
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const int plain = row * Rows::kRowBytes + chunk * 16;
      if (Rows::offset(row, chunk) != int(Swizzle::apply(plain))) return false;
    }
  }
  return true;
}
static_assert(swizzled_as<32, cute::Swizzle<2, 4, 3>>());
static_assert(swizzled_as<64, cute::Swizzle<3, 4, 3>>(),
              "what TMA and WGMMA call 128-byte swizzle");
static_assert(swizzled_as<128, cute::Swizzle<3, 4, 4>>());
static_assert(swizzled_as<256, cute::Swizzle<3, 4, 5>>());

// Accumulators of one warp (mma.m16n8k16) or of the four warps of a warpgroup (wgmma.m64nNk16):
// element i of a thread is in row 16 warp + lane / 4 + 8 (i / 2 % 2) and in column
// 8 (i / 4) + 2 (lane % 4) + i % 2. A operands from registers lie likewise, two elements to each.
template <class Layout, int kRows, int kThreads, int kColumns>
constexpr bool fragment_as() {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < kRows * kColumns / kThreads; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      if (int(Layout{}(thread, i)) != row + kRows * column) return false;
    }
  }
  return true;
}
template <class Instruction>
using Traits = cute::MMA_Traits<Instruction>;
using Mma = Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
static_assert(fragment_as<Mma::CLayout, 16, 32, 8>(), "scores and outputs of v1 and v2");
static_assert(fragment_as<Mma::ALayout, 16, 32, 16>(), "P goes from scores to operand in place");
static_assert(fragment_as<cute::SM90::GMMA::CLayout_64xN<32>, 64, 128, 32>(), "v3's scores");
static_assert(fragment_as<cute::SM90::GMMA::ALayout_64x16, 64, 128, 16>(), "v3's P");

}  // namespace flash
