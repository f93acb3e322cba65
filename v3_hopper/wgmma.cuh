// The warpgroup matrix instruction: D[64 x N] (+)= A[64 x k] B[k x N], fp32 accumulators in
// registers.
//
// wgmma<N>::ss takes A and B from shared memory, wgmma<N>::rs takes A from registers. Accumulator i
// of a thread is at row 16 * warp + lane / 4 + 8 * (i / 2 % 2) and column 8 * (i / 4) +
// 2 * (lane % 4) + i % 2; register-A slab s of 16-bit elements is accumulators [8 s, 8 s + 8).
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace flash::v3 {

// Which dimension of an operand is contiguous in shared memory: the reduced one (K) or its own
// (MN).
enum class Major : int { kK = 0, kMN = 1 };

// The parts of the instruction's text that depend on element type and operand order.
template <class T, Major kA, Major kB>
struct WgmmaText;
template <Major kA, Major kB>
struct WgmmaText<bf16, kA, kB> {
  static constexpr char kKind[] = "k16.f32.bf16.bf16";
  static constexpr char kOrder[] = {
      ',', '1', ',', '1', ',', char('0' + int(kA)), ',', char('0' + int(kB)), '\0'};
  static constexpr char kOrderRS[] = {',', '1', ',', '1', ',', char('0' + int(kB)), '\0'};
};
template <Major kA, Major kB>
struct WgmmaText<fp16, kA, kB> : WgmmaText<bf16, kA, kB> {
  static constexpr char kKind[] = "k16.f32.f16.f16";
};
template <>
struct WgmmaText<e4m3, Major::kK, Major::kK> {
  static constexpr char kKind[] = "k32.f32.e4m3.e4m3";
  static constexpr char kOrder[] = ",1,1";
  static constexpr char kOrderRS[] = ",1,1";
};

template <int N>
struct wgmma;

// Operand numbers and constraints of the first 16 R columns of accumulators.
#define FLASH_D1 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FLASH_D2 FLASH_D1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASH_D3 FLASH_D2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define FLASH_D4 FLASH_D3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASH_D5 FLASH_D4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define FLASH_D6 FLASH_D5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define FLASH_D7 FLASH_D6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define FLASH_D8 FLASH_D7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASH_D9 FLASH_D8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define FLASH_D10 FLASH_D9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define FLASH_D11 FLASH_D10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define FLASH_D12 FLASH_D11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define FLASH_D13 FLASH_D12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define FLASH_D14 FLASH_D13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define FLASH_D15 FLASH_D14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define FLASH_D16 FLASH_D15 ",%120,%121,%122,%123,%124,%125,%126,%127"
// Half a group more: eight columns.
#define FLASH_D4H FLASH_D4 ",%32,%33,%34,%35"
#define FLASH_D6H FLASH_D6 ",%48,%49,%50,%51"
#define FLASH_D8H FLASH_D8 ",%64,%65,%66,%67"
#define FLASH_ROW(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLASH_C1 FLASH_ROW(0)
#define FLASH_C2 FLASH_C1, FLASH_ROW(8)
#define FLASH_C3 FLASH_C2, FLASH_ROW(16)
#define FLASH_C4 FLASH_C3, FLASH_ROW(24)
#define FLASH_C5 FLASH_C4, FLASH_ROW(32)
#define FLASH_C6 FLASH_C5, FLASH_ROW(40)
#define FLASH_C7 FLASH_C6, FLASH_ROW(48)
#define FLASH_C8 FLASH_C7, FLASH_ROW(56)
#define FLASH_C9 FLASH_C8, FLASH_ROW(64)
#define FLASH_C10 FLASH_C9, FLASH_ROW(72)
#define FLASH_C11 FLASH_C10, FLASH_ROW(80)
#define FLASH_C12 FLASH_C11, FLASH_ROW(88)
#define FLASH_C13 FLASH_C12, FLASH_ROW(96)
#define FLASH_C14 FLASH_C13, FLASH_ROW(104)
#define FLASH_C15 FLASH_C14, FLASH_ROW(112)
#define FLASH_C16 FLASH_C15, FLASH_ROW(120)
#define FLASH_HALF(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASH_C4H FLASH_C4, FLASH_HALF(32)
#define FLASH_C6H FLASH_C6, FLASH_HALF(48)
#define FLASH_C8H FLASH_C8, FLASH_HALF(64)

// N columns, R rows of operands, then the numbers of the operands that follow them.
#define FLASH_WGMMA(N, R, o0, o1, o2, o3, o4, o5, o6, o7)                                        \
  template <>                                                                                    \
  struct wgmma<N> {                                                                              \
    template <class T, Major kA = Major::kK, Major kB = Major::kK>                               \
    __device__ __forceinline__ static void ss(float (&d)[N / 2], uint64_t a, uint64_t b,         \
                                              bool accumulate) {                                 \
      using Text = WgmmaText<T, kA, kB>;                                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "%" #o3 " {" FLASH_D##R                \
                   "}, %" #o0 ", %" #o1 ", p%" #o4 ";\n}\n"                                      \
                   : FLASH_C##R                                                                  \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "C"(Text::kKind), "C"(Text::kOrder)); \
    }                                                                                            \
    template <class T, Major kB = Major::kK>                                                     \
    __device__ __forceinline__ static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b,  \
                                              bool accumulate) {                                 \
      using Text = WgmmaText<T, Major::kK, kB>;                                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "%" #o6 " {" FLASH_D##R                \
                   "}, {%" #o0 ",%" #o1 ",%" #o2 ",%" #o3 "}, %" #o4 ", p%" #o7 ";\n}\n"         \
                   : FLASH_C##R                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),   \
                     "C"(Text::kKind), "C"(Text::kOrderRS));                                     \
    }                                                                                            \
  };

FLASH_WGMMA(16, 1, 8, 9, 10, 11, 12, 13, 14, 15)
FLASH_WGMMA(32, 2, 16, 17, 18, 19, 20, 21, 22, 23)
FLASH_WGMMA(48, 3, 24, 25, 26, 27, 28, 29, 30, 31)
FLASH_WGMMA(64, 4, 32, 33, 34, 35, 36, 37, 38, 39)
FLASH_WGMMA(72, 4H, 36, 37, 38, 39, 40, 41, 42, 43)
FLASH_WGMMA(80, 5, 40, 41, 42, 43, 44, 45, 46, 47)
FLASH_WGMMA(96, 6, 48, 49, 50, 51, 52, 53, 54, 55)
FLASH_WGMMA(104, 6H, 52, 53, 54, 55, 56, 57, 58, 59)
FLASH_WGMMA(112, 7, 56, 57, 58, 59, 60, 61, 62, 63)
FLASH_WGMMA(128, 8, 64, 65, 66, 67, 68, 69, 70, 71)
FLASH_WGMMA(136, 8H, 68, 69, 70, 71, 72, 73, 74, 75)
FLASH_WGMMA(144, 9, 72, 73, 74, 75, 76, 77, 78, 79)
FLASH_WGMMA(160, 10, 80, 81, 82, 83, 84, 85, 86, 87)
FLASH_WGMMA(176, 11, 88, 89, 90, 91, 92, 93, 94, 95)
FLASH_WGMMA(192, 12, 96, 97, 98, 99, 100, 101, 102, 103)
FLASH_WGMMA(208, 13, 104, 105, 106, 107, 108, 109, 110, 111)
FLASH_WGMMA(224, 14, 112, 113, 114, 115, 116, 117, 118, 119)
FLASH_WGMMA(240, 15, 120, 121, 122, 123, 124, 125, 126, 127)
FLASH_WGMMA(256, 16, 128, 129, 130, 131, 132, 133, 134, 135)
#undef FLASH_WGMMA
#undef FLASH_ROW
#undef FLASH_HALF

}  // namespace flash::v3
