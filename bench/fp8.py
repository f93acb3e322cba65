"""FP8: errors of every way to quantize against fp64, and how fast the quantizer is.

`python -m bench.fp8` writes bench/results/<gpu>/fp8.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash
from bench import script
from flash.checks_more import BLOCK
from flash.engines import quantizer
from flash.engines.quantizer import HEAD_DIMS, Task
from flash.study import accuracy

DIMS = (64, 128, 256)  # whose errors are measured
LENGTHS = tuple(1 << n for n in range(9, 18))
ELEMENTS = 1 << 28  # of a large tensor: it and its result are many times L2
SHAPES = ((1, 1024, 16, 128), (1, 16384, 16, 128))
Row = dict[str, Any]


def median_ms(run: Callable[[], Any], before: Callable[[], Any], repeats: int = 20) -> float:
    """Between events, after three runs that are not counted; `before` keeps the GPU busy while the
    host prepares a run, so that only the GPU's time counts."""
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def bandwidth(dim: int, dtype: torch.dtype) -> list[Row]:
    """TB/s, read and written, of V as it lies and with keys contiguous, of Q or K, which are
    turned, and of copying the same tensor."""
    heads = 2048 // dim
    rows = ELEMENTS // (heads * dim) // BLOCK * BLOCK
    x = torch.randn(1, rows, heads, dim, device="cuda", dtype=dtype)
    copy = torch.empty_like(x)

    def quantized(rotate: bool, keys_first: bool = False) -> Callable[[], Any]:
        task = Task(x, BLOCK, heads, rotate, spread=not rotate, keys_first=keys_first)
        return lambda: quantizer.quantize([task], "block")

    def copied() -> Any:
        return copy.copy_(x)

    runs = {"V": (quantized(False), 3), "V by keys": (quantized(False, True), 3),
            "Q, K": (quantized(True), 3), "copy": (copied, 4)}  # fmt: skip
    return [
        {"tensor": name, "head_dim": dim, "dtype": str(dtype).removeprefix("torch."),
         "tb_per_s": x.numel() * size / median_ms(run, copied) / 1e9}
        for name, (run, size) in runs.items()
    ]  # fmt: skip


def whole_call() -> list[Row]:
    """Microseconds of `quantize_fp8` for Q, K and V together: the GPU's, and as a user waits."""
    found = []
    busy = torch.empty(ELEMENTS, device="cuda").zero_  # longer than the host prepares any call
    for shape in SHAPES:
        q, k, v = (torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
        times = [1e3 * median_ms(called(q, k, v), before)
                 for before in (busy, torch.cuda.synchronize)]  # fmt: skip
        found.append({"shape": shape, "us": times[0], "us_with_host": times[1]})
    return found


def called(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    return lambda: flash.quantize_fp8(q, k, v)


def main() -> int:
    parser = script.parser(__doc__)
    args = parser.parse_args()
    if script.lacks_gpu("fp8"):
        return 2
    torch.manual_seed(0)
    errors = []
    for rows in accuracy.study(accuracy.INPUTS, DIMS, LENGTHS, "cuda"):
        errors += rows
        print(*accuracy.lines(rows)[0], flush=True)
    speeds = []
    for dim in HEAD_DIMS:
        for dtype in (torch.bfloat16, torch.float16):
            speeds += bandwidth(dim, dtype)
            print(*(f"{r['tensor']} {r['tb_per_s']:.2f}" for r in speeds[-4:]), flush=True)
    found = {"accuracy": errors, "quantizer": speeds, "quantizer_calls": whole_call()}
    print(found["quantizer_calls"])
    script.leave(args.out, "fp8", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
