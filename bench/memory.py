"""Memory of one forward and backward pass against length, standard attention beside: a few seconds.

`python -m bench.memory` writes bench/results/<gpu>/memory.json.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor

import flash
from bench import script
from flash.demo import memory_of, textbook
from flash.study.cases import Case
from flash.study.competitors import OURS
from flash.study.measure import reason

HEADS, HEAD_DIM, BATCH = 16, 64, 1
LENGTHS = tuple(1 << n for n in range(9, 18))
STANDARD = "standard"


def attention(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Differentiable, by one of our generations, or with S and P in memory."""
    if name == STANDARD:
        return textbook(q, k, v, Case("forward", "", 1, q.shape[1], 1, q.shape[-1], causal).spec)
    out: Tensor = flash.attention(q, k, v, causal=causal, backend=name)
    return out


def one(name: str, seqlen: int) -> dict[str, Any]:
    """Bytes beyond the inputs, gradients included, or why there are none."""
    shape = (BATCH, seqlen, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))  # fmt: skip
    dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        out = attention(OURS.get(name, name), q, k, v, True)
        torch.autograd.grad(out, (q, k, v), dout)

    row = {"competitor": name, "seqlen": seqlen, "batch": BATCH, "heads": HEADS,
           "head_dim": HEAD_DIM}  # fmt: skip
    try:
        return {**row, "memory_bytes": memory_of(step, q.device)}
    except Exception as problem:
        return {**row, "why": reason(problem)}


def main() -> int:
    parser = script.parser(__doc__)
    args = parser.parse_args()
    if script.lacks_gpu("memory"):
        return 2
    rows = []
    for seqlen in LENGTHS:
        for name in (STANDARD, *OURS):
            rows.append(one(name, seqlen))
            gc.collect()
            torch.cuda.empty_cache()
            print(rows[-1], flush=True)
    script.leave(args.out, "memory", {"memory": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
