"""Fresh inputs of a case, and the exact answer for the part of them that errors are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flash
from flash.study.cases import Case

FP8 = torch.float8_e4m3fn
EXACT_ROWS = 1024  # of a forward pass: the last rows of the first head
EXACT_FLOPS = 3e13  # more of them in fp64 for a backward pass, and its error is left out
CPU_FLOPS = 3e11


@dataclass
class Inputs:
    """N(0, 1) tensors (B, S, H, D); `exact` is fp64 of one head: out, or dq dk dv."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    saved: tuple[Tensor, Tensor] | None  # out and lse, for the backward pass
    exact: tuple[Tensor, ...] | None
    group: int


def draw(case: Case, device: str = "cuda") -> Inputs:
    """Drawn in the case's dtype; FP8 inputs are rounded from fp16, with a scale of 1."""
    fp8 = case.dtype == "float8_e4m3fn"
    dtype = torch.float16 if fp8 else getattr(torch, case.dtype)
    rows, keys = (case.batch, case.seqlen), (case.batch, case.keys)
    shapes = ((*rows, case.heads, case.head_dim), (*keys, case.kv_heads, case.head_dim),
              (*keys, case.kv_heads, case.dim_v), (*rows, case.heads, case.dim_v))  # fmt: skip
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    if fp8:
        q, k, v = q.to(FP8), k.to(FP8), v.to(FP8)
    group = case.heads // case.kv_heads
    found = Inputs(q, k, v, dout, None, None, group)
    with torch.no_grad():
        if case.direction == "backward":
            out, lse = flash.attention(q, k, v, return_lse=True, backend="torch", **case.options)
            found.saved = out, lse
        found.exact = _exact(case, found)
    return found


def _exact(case: Case, x: Inputs) -> tuple[Tensor, ...] | None:
    options: dict[str, Any] = {**case.options, "backend": "reference"}
    if case.direction == "forward":
        q, k, v = _head(x.q, 1)[:, -EXACT_ROWS:], _head(x.k, 1), _head(x.v, 1)
        return (flash.attention(q, k, v, **options),)
    pairs = case.flops / (case.batch * case.kv_heads)
    if pairs > (EXACT_FLOPS if x.q.is_cuda else CPU_FLOPS):
        return None
    q, dout = _head(x.q, x.group), _head(x.dout, x.group)
    k, v = _head(x.k, 1), _head(x.v, 1)
    out, lse = flash.attention(q, k, v, return_lse=True, **options)
    return tuple(flash.attention_backward(dout, q, k, v, out, lse, **options))


def _head(x: Tensor, count: int) -> Tensor:
    return x[:1, :, :count].to(torch.float64)


def error(found: tuple[Tensor, ...], x: Inputs) -> float | None:
    """Relative L2 error against fp64, the worst of the results."""
    if x.exact is None:
        return None
    worst = 0.0
    for ours, exact in zip(found, x.exact, strict=True):
        part = ours[:1, -exact.shape[1] :, : exact.shape[2]].to(torch.float64)
        worst = max(worst, float((part - exact).norm() / exact.norm()))
    return worst
