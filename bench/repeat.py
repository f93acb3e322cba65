"""The same bits every time: `python -m bench.repeat` replays every kernel thousands of times.

Each call is captured in a CUDA graph that compares its results with those of the first run on the
device, bit by bit; the backward pass with `deterministic=True`. Writes
bench/results/<gpu>/repeat.json.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from bench import digest, kernel_calls, record, script
from bench.kernel_calls import Kernel, Results, Shape
from flash.study.competitors import OURS

FORWARD = {"v3_hopper": 10_000}  # runs of each kernel and shape; the others
OTHERS = 1_000
KEY = ("version", "kernel", "shape")
FULL = Shape("full, 450", (450,), (450,), batch=4, heads=8, heads_kv=8)
LARGE = (
    Shape("long, 8200 x 512", (8200,), (512,)),
    Shape("causal, 1999, GQA", (1999,), (1999,), heads=8, options={"causal": True}),
)
V1_LARGE = (  # its backward pass in order is slow
    Shape("long, 1300 x 512", (1300,), (512,)),
    Shape("causal, 600, GQA", (600,), (600,), heads=8, options={"causal": True}),
)
LONG_TILES = replace(kernel_calls.LONG, name="long tiles, 8200 x 330, 32 heads", lengths_k=(330,))
Row = dict[str, Any]


def shapes(kernel: Kernel) -> list[Shape]:
    large = V1_LARGE if kernel.version == "v1_tiling" else LARGE
    wanted = [FULL, *large, *(shape for shape in kernel_calls.SMALL if shape.options)]
    if kernel.code == kernel_calls.E4M3:
        return [*wanted, *kernel_calls.BY_KEYS]
    if not kernel.direction:
        return [*wanted, LONG_TILES] if kernel_calls.has_long_tiles(kernel) else wanted
    return [replace(s, options={**s.options, "deterministic": True}) for s in wanted]


def bits(x: torch.Tensor) -> torch.Tensor:
    """All of it, in words of eight bytes where they fit."""
    flat = x.contiguous().view(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if whole else torch.uint8)


def differing(first: Results, found: Results) -> torch.Tensor:
    each = [(bits(x) != bits(y)).any() for x, y in zip(first, found, strict=True)]
    return torch.stack(each).any()


def replayed(kernel: Kernel, shape: Shape, times: int) -> Row:
    """How many of the runs differ from the first in any bit."""
    call, begin = kernel_calls.prepare(kernel, shape, judge="cuda"), time.monotonic()
    first = tuple(x.clone() for x in call.run())
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        differing(first, call.run())
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            count += differing(first, call.run())
        count.zero_()
        for _ in range(times):
            graph.replay()
        stream.synchronize()
    return {"version": kernel.version, "kernel": list(kernel[1:]), "name": str(kernel),
            "shape": shape.name, "runs": times, "differing": int(count),
            "error": float(f"{call.error(first):.2e}"), "digest": digest.digest(kernel.version),
            "seconds": round(time.monotonic() - begin, 2), "date": record.now()}  # fmt: skip


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--version", choices=[*OURS], action="append")
    parser.add_argument("--only", default="", help="kernels whose name holds this, as 'bf16:64'")
    args = parser.parse_args()
    if script.lacks_gpu("repeat"):
        return 2
    rows = record.read(script.path_of(args.out, "repeat")).get("repeat", [])
    bad = 0
    for name in args.version or OURS:
        for kernel in kernel_calls.every(OURS[name]):
            if args.only not in str(kernel):
                continue
            forward = FORWARD.get(kernel.version, OTHERS)
            for shape in shapes(kernel):
                row = replayed(kernel, shape, OTHERS if kernel.direction else forward)
                rows = record.merge(rows, row, KEY)
                bad += row["differing"] > 0
                print(*(row[k] for k in ("version", "name", "shape", "runs", "differing", "error",
                                         "seconds")), sep=", ", flush=True)  # fmt: skip
            script.leave(args.out, "repeat", {"repeat": rows})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
