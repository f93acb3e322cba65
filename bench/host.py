"""Host time of a call on tensors so small that the GPU is never what is waited for: seconds.

`python -m bench.host` writes bench/results/<gpu>/host.json: the forward call alone, the call when a
gradient is wanted, and the gradient with it; ours beside PyTorch's flash backend in one process.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash
from bench import digest, script
from flash.study.competitors import OURS, present
from flash.study.measure import reason

PEER = "sdpa-flash"
SHAPE = (1, 8, 64, 64)  # batch, heads, rows, head dim: the layout of PyTorch's call
WAYS = ("forward", "forward, gradient wanted", "forward and backward")
CALLS, ROUNDS = 200, 25
Row = dict[str, Any]


def calls(name: str, layout: str) -> dict[str, Callable[[], Any]]:
    """What is timed, way by way; `layout` is that of our call, on tensors of that layout."""
    q, k, v, dout = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    if layout == "bshd":
        q, k, v, dout = (x.transpose(1, 2).contiguous() for x in (q, k, v, dout))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if name == PEER:
            return scaled_dot_product_attention(q, k, v)
        return flash.attention(q, k, v, layout=layout, backend=OURS[name])

    def wanted() -> Any:
        return attend(*leaves)

    def both() -> None:
        torch.autograd.grad(wanted(), leaves, dout)

    return dict(zip(WAYS, (lambda: attend(q, k, v), wanted, both), strict=True))


def burst(call: Callable[[], Any]) -> float:
    """Microseconds of the host for each of many calls; the GPU is waited for outside."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * spent / CALLS


def timed(way: str, parts: dict[tuple[str, str], Callable[[], Any]]) -> list[Row]:
    """All competitors in turns, so that each meets the same moments of the machine."""
    found: dict[tuple[str, str], list[float]] = {part: [] for part in parts}
    for number in range(ROUNDS + 2):
        for part, call in parts.items():
            spent = burst(call)
            if number >= 2:  # the first rounds warm up
                found[part].append(spent)
    rows = []
    for (name, layout), times in found.items():
        row: Row = {"competitor": name, "way": way, "layout": layout, "calls": CALLS * ROUNDS,
                    "shape": list(SHAPE), "best_us": round(min(times), 2),
                    "us": round(statistics.median(times), 2)}  # fmt: skip
        rows.append({**row, "digest": digest.digest(OURS[name])} if name in OURS else row)
    peer = next(row for row in rows if row["competitor"] == PEER)
    for row in rows:
        row["ratio"] = round(row["us"] / peer["us"], 3)
    return rows


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line for each competitor and layout: microseconds and the ratio to the peer, by way."""
    found = []
    for name, layout in dict.fromkeys((r["competitor"], r["layout"]) for r in rows):
        own = {r["way"]: r for r in rows if (r["competitor"], r["layout"]) == (name, layout)}
        cells = (f"{own[way]['us']:.1f} ({own[way]['ratio']:.2f})" for way in WAYS)
        found.append((name, layout, *cells))
    return found


def main() -> int:
    parser = script.parser(__doc__)
    args = parser.parse_args()
    if script.lacks_gpu("host"):
        return 2
    parts: dict[tuple[str, str], dict[str, Callable[[], Any]]] = {(PEER, "bhsd"): {}}
    parts |= {(name, layout): {} for name in OURS for layout in ("bshd", "bhsd")}
    rows: list[Row] = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for (name, layout), ways in list(parts.items()):
            try:
                if name in OURS and not present(name):
                    raise RuntimeError("not built here")
                ways.update(calls(name, layout))
                ways[WAYS[-1]]()
            except Exception as problem:
                print(f"{name}: {reason(problem)}")
                del parts[name, layout]
        gc.disable()
        for way in WAYS:
            rows += timed(way, {part: ways[way] for part, ways in parts.items()})
    for row in rows:
        print(f"{row['way']}: {row['competitor']} {row['layout']} {row['us']} us, best "
              f"{row['best_us']}, {row['ratio']} of {PEER}", flush=True)  # fmt: skip
    script.leave(args.out, "host", {"host": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
