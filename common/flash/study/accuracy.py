"""What FP8 costs in accuracy: the error of every way to quantize, against fp64 of the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import flash

Row = dict[str, Any]
BF16, TURNED = "bf16", "block, turned"
# How Q, K and V are quantized: who shares a scale, and whether Q and K are turned first.
WAYS: dict[str, tuple[str, bool] | None] = {
    BF16: None, TURNED: ("block", True), "block": ("block", False), "head": ("head", False),
    "tensor": ("tensor", False),
}  # fmt: skip
NORMAL, OUTLIERS = "normal", "outliers"  # N(0,1); N(0,1) + N(0,100) x Bernoulli(0.001)
INPUTS = (OUTLIERS, NORMAL)
SAMPLES = 16_384  # rows of O that an error is taken over, as far as memory reaches
SAMPLES_CPU = 1024
MOST_ROWS, MOST_TOKENS = 1024, 1 << 19
COLUMNS = ("inputs", "d", "S", *WAYS, "tensor / turned")


def draw(kind: str, shape: tuple[int, int, int], device: str) -> Tensor:
    """(1, seqlen, heads, head_dim) in bf16."""
    x = torch.randn(1, *shape, device=device)
    if kind == OUTLIERS:
        x += 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3)
    return x.bfloat16()


def sampled(seqlen: int, most: int = SAMPLES) -> tuple[int, int]:
    """(heads, last rows) that stand for all."""
    rows = min(seqlen, MOST_ROWS, most)
    return max(1, min(most // rows, MOST_TOKENS // seqlen)), rows


def run(way: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by v3, its kernels or on a CPU its schedule."""
    how = WAYS[way]
    if how is None:
        return flash.attention(q, k, v, backend="v3")
    found = flash.quantize_fp8(q, k, v, *how)
    return flash.attention(**found._asdict(), backend="v3")


def errors(kind: str, dim: int, seqlen: int, device: str, samples: int = SAMPLES) -> list[Row]:
    """Root mean square error of O and its share of O, one row for each way."""
    heads, rows = sampled(seqlen, samples)
    q, k, v = (draw(kind, (seqlen, heads, dim), device) for _ in range(3))
    q = q[:, -rows:].contiguous()
    with torch.no_grad():
        wide = [x.double() for x in (q, k, v)]
        exact = torch.cat([
            flash.attention(*(x[:, :, h : h + 1] for x in wide), backend="reference")
            for h in range(heads)
        ], dim=2)  # fmt: skip
        size = exact.square().mean().sqrt().item()
        found = []
        for way in WAYS:
            rmse = (run(way, q, k, v).double() - exact).square().mean().sqrt().item()
            found.append({
                "inputs": kind, "head_dim": dim, "seqlen": seqlen, "way": way, "rmse": rmse,
                "relative": rmse / size, "heads": heads, "rows": rows,
            })  # fmt: skip
    return found


def study(kinds: Iterable[str], dims: Iterable[int], seqlens: Sequence[int], device: str,
          samples: int = SAMPLES) -> Iterator[list[Row]]:  # fmt: skip
    for kind in kinds:
        for dim in dims:
            for seqlen in seqlens:
                yield errors(kind, dim, seqlen, device, samples)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each shape, in the order of COLUMNS: RMSE, and relative to O."""
    found = []
    for kind, dim, seqlen in dict.fromkeys((r["inputs"], r["head_dim"], r["seqlen"]) for r in rows):
        own = {r["way"]: r for r in rows
               if (r["inputs"], r["head_dim"], r["seqlen"]) == (kind, dim, seqlen)}  # fmt: skip
        cells = [f"{own[w]['rmse']:.2e} ({own[w]['relative']:.2%})" if w in own else "–"
                 for w in WAYS]  # fmt: skip
        ratio = own["tensor"]["rmse"] / own[TURNED]["rmse"] if "tensor" in own else math.nan
        found.append([kind, str(dim), str(seqlen), *cells, f"{ratio:.2f}"])
    return found
