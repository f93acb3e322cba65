"""What each idea brings: kernels with one idea taken out, beside the same kernel with all of them.

`python -m bench.ablations` builds them for this GPU and writes bench/results/<gpu>/ablations.json;
`--build DIR` only builds, `--place DIR` uses such a build.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import flash
from bench import script, variants
from bench.variants import Variant
from flash.study.cases import Case, paper
from flash.study.competitors import OURS

Row = dict[str, Any]
ROUNDS = 4
PATIENCE = 30  # seconds for one case, of which a second is usual
TURN = "FLASH_BENCH_TURN"
V1, V2, V3 = (("v1", "v1_tiling"), ("v2", "v2_parallel"), ("v3", "v3_hopper"))
_EACH_BLOCK = """  for (int block = 0; block < grid.blocks_q; ++block) {
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) block_in_turn() = block;
  __syncthreads();
"""
_IN_TURN = """__device__ __forceinline__ int& block_in_turn() {
  __shared__ int block;
  return block;
}

"""
_GRID = "// All Q blocks of all heads as one line."
PING_PONG = (("v3_hopper/traits.cuh", "kTakesTurns = kConsumers == 2;", "kTakesTurns = false;"),)
OVERLAP = (
    ("v3_hopper/forward.cuh", "wgmma_wait<1>();  // S is there",
     "wgmma_wait<0>();  // S is there"),
)  # fmt: skip
_CONSUMER, _FORWARD = "v3_hopper/consumer.cuh", "v3_hopper/forward.cuh"
_GUARD, _SOFTMAX = '#include "v3_hopper/guard.cuh"\n', "softmax = {make_scale<Traits>(args.p)};\n"
SPECIALIZATION = (
    ("v3_hopper/traits.cuh", "kThreads = (1 + kConsumers)", "kThreads = kConsumers"),
    ("v3_hopper/traits.cuh", "kConsumers + kGuardWarps + 1;", "kConsumers;"),
    ("v3_hopper/traits.cuh", "bool kSkips =", "bool kSkips = false &&"),
    ("v3_hopper/load.cuh", "!at.unguarded.holds(block)", "false"),
    ("v3_hopper/load.cuh", "if (elect_one()) {", "if (threadIdx.x == 0) {"),
    (_CONSUMER, _GUARD, '#include "v3_hopper/feeder.cuh"\n' + _GUARD),
    (_CONSUMER, _SOFTMAX,
     _SOFTMAX + "  Feeder<Traits>& feeder = Feeder<Traits>::make(args, shared);\n"),
    (_FORWARD, "  pipe.give_turn();\n", "  pipe.give_turn();\n  feeder.feed(1);\n"),
    (_FORWARD, "  if (!next.open_tile(pipe)) return;\n",
     "  feeder.feed(0);\n  if (!next.open_tile(pipe)) return;\n  feeder.enter();\n"),
    (_FORWARD, "sK);\n  wgmma_wait<0>();\n", "sK);\n  feeder.feed(0);\n  wgmma_wait<0>();\n"),
    (_FORWARD, "(pipe)) break;\n", "(pipe)) break;\n    feeder.enter();\n"),
    (_FORWARD, "if (warpgroup == 0) {", "if constexpr (false) {  // no other role"),
    (_FORWARD, "    grow_registers<Traits::kConsumerRegisters>();\n", ""),
    (_FORWARD, "shared, warpgroup - 1}", "shared, warpgroup}"),
)  # fmt: skip
BOTH = "forward;backward"
VARIANTS = (
    Variant(*V1),
    Variant(*V1, "long K/V blocks (128 keys on chip)", (
        ("v1_tiling/traits.cuh", "kMaxStages = 16;", "kMaxStages = 2;"),)),
    Variant(*V1, "slices of Q (CTAs along heads only)", (
        ("v1_tiling/launch.cuh", "for (int turns : {1, 2, 4})",
         "for (int turns : {int(up(p.seqlen_q, rows))})"),
        ("v1_tiling/launch.cuh", "    if (turns > 1 && cost >= best) continue;\n", ""))),
    Variant(*V2),
    Variant(*V2, "sequence parallelism (CTAs along heads only)", (
        ("v2_parallel/forward.cuh", "  Work<Traits> work(p, grid);\n",
         _EACH_BLOCK + "  Work<Traits> work(p, grid);\n"),
        ("v2_parallel/forward.cuh", "if (work.tile().empty()) return;",
         "if (work.tile().empty()) continue;"),
        ("v2_parallel/forward.cuh", "  } while (work.advance());\n}",
         "  } while (work.advance());\n  }\n}"),
        ("v2_parallel/schedule.cuh", _GRID, _IN_TURN + _GRID),
        ("v2_parallel/schedule.cuh", "if (ctas == 0) return blockIdx.x;",
         "if (ctas == 0) return block_in_turn() * heads + blockIdx.x;"),
        ("v2_parallel/schedule.cuh", "kL2Bytes = 32 << 20;", "kL2Bytes = int64_t(1) << 40;"),
        ("v2_parallel/launch.cuh", "dim3(unsigned(grid.launched()))",
         "dim3(unsigned(grid.heads))"))),
    Variant(*V2, "rows over warps (pairs of warps split K)", (
        ("v2_parallel/traits.cuh", "kTeam = kHeadDim <= 128 ? 1 : 2;", "kTeam = 2;"),)),
    Variant(*V2, "L2 locality (all heads side by side)", (
        ("v2_parallel/schedule.cuh", "kL2Bytes = 32 << 20;", "kL2Bytes = int64_t(1) << 40;"),)),
    Variant(*V3, directions=BOTH),
    Variant(*V3, "ping-pong", PING_PONG),
    Variant(*V3, "overlap inside a warpgroup", OVERLAP),
    Variant(*V3, "ping-pong and overlap inside a warpgroup", PING_PONG + OVERLAP),
    Variant(*V3, "warp specialization (a consumer issues the loads)", SPECIALIZATION,
            (("bench/feeder.cuh", "v3_hopper/feeder.cuh"),)),
    Variant(*V3, "a ring (one stage of K and of V)", (
        ("v3_hopper/traits.cuh", "kStages = 2,", "kStages = 1,"),
        ("v3_hopper/traits.cuh", "kStages = 3,", "kStages = 1,"),
        ("v3_hopper/traits.cuh", "kStages = 4,", "kStages = 1,"))),
    Variant(*V3, "the next tile's loads (a narrow head's key tiles one by one)", (
        ("v3_hopper/narrow_backward.cuh", "kTiles = kTransposed ? 2 : 1;", "kTiles = 1;"),),
        directions="backward", dims="64"),
    Variant(*V3, "rounds of heads (one head's key tiles after another's)", (
        ("v3_hopper/launch_backward.cuh", "kMost = 16;", "kMost = 1;"),), directions="backward"),
)  # fmt: skip


def cases() -> list[Case]:
    shapes = (
        ("forward", 64, False, 8192), ("forward", 128, False, 4096), ("forward", 128, True, 2048),
        ("backward", 64, False, 1024), ("backward", 64, True, 4096), ("backward", 128, True, 4096),
    )  # fmt: skip
    return [paper(way, "bfloat16", dim, causal, n) for way, dim, causal, n in shapes]


def words(case: Case) -> str:
    way = "" if case.direction == "forward" else f"{case.direction}, "
    return f"{way}d {case.head_dim}, {case.mask}, {case.seqlen}"


def built(case: Case, version: str) -> bool:
    """The build of flash that this process imports has the case's kernel."""
    from flash.engines import kernels

    kernel = (case.direction == "backward", 1, case.head_dim, case.head_dim)
    return kernel in kernels.instances(OURS[version])


def time_here(name: str) -> None:
    """Rows of whatever build of flash this process imports; processes take turns at the GPU."""
    from flash.study.measure import Settings, measure, stopwatch

    watch, how = stopwatch("cuda"), Settings(total_ms=40, memory=False)
    with open(os.environ[TURN], "w") as turn:
        for case in [case for case in cases() if built(case, name)] * ROUNDS:
            fcntl.flock(turn, fcntl.LOCK_EX)
            signal.alarm(PATIENCE)  # a kernel that hangs ends its process, not the others' turn
            rows = measure(case, [name], watch, how).rows
            torch.cuda.empty_cache()
            signal.alarm(0)
            fcntl.flock(turn, fcntl.LOCK_UN)
            for row in rows:
                print(json.dumps({"case": words(case), "tflops": row["tflops"],
                                  "error": row["error"]}), flush=True)  # fmt: skip


def build(variant: Variant, place: Path) -> Path:
    return variants.build(variant, place, variant.dims, directions=variant.directions)


def timed(place: Path) -> list[Row]:
    """Every variant in a process of its own; medians over the rounds, of which the first warms."""
    os.environ[TURN] = str(place / "turn")

    def ask(variant: Variant) -> str:
        try:
            installed = build(variant, place)
            return variants.python(installed, "-m", "bench.ablations", "--time", variant.version)
        except subprocess.CalledProcessError as problem:
            if not variant.edits:
                raise
            print(f"{variant.name}: {problem.stderr or problem}"[-400:], file=sys.stderr)
            return ""

    found: dict[tuple[str, str, str], list[Row]] = {}
    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        for variant, text in zip(VARIANTS, pool.map(ask, VARIANTS), strict=True):
            for row in map(json.loads, text.splitlines()):
                key = (variant.version, variant.without, row["case"])
                found.setdefault(key, []).append(row)
    speeds = {key: statistics.median(r["tflops"] for r in rows[1:]) for key, rows in found.items()}
    return [
        {"version": version, "without": without, "case": case, "tflops": speed,
         "baseline": speeds[version, "", case],
         "error": max(row["error"] for row in found[version, without, case])}
        for (version, without, case), speed in speeds.items() if without
    ]  # fmt: skip


def quantized() -> list[Row]:
    """Error of FP8 inputs without an idea, on values of which one in a thousand is large."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1024, 4, 128, device=device) for _ in range(3))
    for x in (q, k, v):
        x += 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3)
    exact = flash.attention(*(x.double() for x in (q, k, v)), backend="reference")
    q, k, v = (x.bfloat16() for x in (q, k, v))
    choices: dict[str, dict[str, Any]] = {
        "": {}, "Hadamard turns": {"hadamard": False}, "block scales": {"granularity": "tensor"},
        "both": {"hadamard": False, "granularity": "tensor"},
    }  # fmt: skip
    errors = {}
    for without, options in choices.items():
        parts = flash.quantize_fp8(q, k, v, **options)._asdict()
        out = flash.attention(**parts, backend="reference").double()
        errors[without] = float((out - exact).pow(2).mean().sqrt())
    return [{"without": name, "rmse": float(f"{value:.3g}"), "baseline": float(f"{errors['']:.3g}")}
            for name, value in errors.items() if name]  # fmt: skip


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--build", type=Path, help="only build, into this folder")
    parser.add_argument("--place", type=Path, help="where builds are, or go")
    parser.add_argument("--time", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        time_here(args.time)
        return 0
    if args.build:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda variant: build(variant, args.build), VARIANTS))
        return 0
    if script.lacks_gpu("ablations"):
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        rows = timed(args.place or Path(scratch))
    for row in rows:
        print(f"{row['version']} without {row['without']:48} {row['case']:20} {row['tflops']:6.0f} "
              f"of {row['baseline']:.0f}, error {row['error']:.1e}", flush=True)  # fmt: skip
    script.leave(args.out, "ablations", {"ablations": rows, "fp8": quantized()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
