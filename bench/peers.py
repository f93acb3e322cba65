"""Who runs in a comparison: our three versions, torch's two SDPA kernels, FA-3 and FA-4 if present.

FA-3 comes from `flash_attn_interface`, or from a library with its ops named by FLASH_PEER_FA3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash

OURS = {"v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper"}
SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
NAMES = (*OURS, *SDPA, "fa3", "fa4")
FP8_NAMES = ("v3", "fa3")
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One line of a benchmark, in the convention of 16384 tokens and 2048 / d heads."""

    direction: str  # forward or backward
    dtype: str
    head_dim: int
    causal: bool
    seqlen: int
    tokens: int = 16384
    width: int = 2048

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.seqlen)

    @property
    def heads(self) -> int:
        return max(1, self.width // self.head_dim)

    @property
    def flops(self) -> float:
        """4 B H d per visible pair of row and key; backward counts 2.5 times that."""
        n = self.seqlen
        pairs = n * (n + 1) // 2 if self.causal else n * n
        forward = 4 * self.batch * self.heads * self.head_dim * pairs
        return forward * (2.5 if self.direction == "backward" else 1)

    def key(self) -> dict[str, Any]:
        mask = "causal" if self.causal else "full"
        return {"direction": self.direction, "dtype": self.dtype, "head_dim": self.head_dim,
                "mask": mask, "seqlen": self.seqlen, "batch": self.batch,
                "heads": self.heads}  # fmt: skip


@dataclass
class Inputs:
    """Fresh N(0,1) tensors (B, S, H, D), with out and lse for the backward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    causal: bool
    exact: tuple[Tensor, ...]  # of batch 0, head 0, fp64: out, or dq dk dv


def draw(case: Case) -> Inputs:
    """Inputs, and the exact answer for their first head."""
    fp8 = case.dtype == "float8_e4m3fn"
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    dtype = torch.float16 if fp8 else getattr(torch, case.dtype)
    q, k, v, dout = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    if fp8:
        q, k, v = q.to(FP8), k.to(FP8), v.to(FP8)
    q1, k1, v1, dout1 = (x[:1, :, :1].to(torch.float64) for x in (q, k, v, dout))
    options: dict[str, Any] = {"causal": case.causal, "backend": "reference"}
    out, lse = flash.attention(q1, k1, v1, return_lse=True, **options)
    exact: tuple[Tensor, ...] = (out,)
    if case.direction == "forward":
        return Inputs(q, k, v, dout, out, lse, case.causal, exact)
    exact = tuple(flash.attention_backward(dout1, q1, k1, v1, out, lse, **options))
    options["backend"] = "torch"
    out, lse = flash.attention(q, k, v, return_lse=True, **options)
    return Inputs(q, k, v, dout, out, lse, case.causal, exact)


def error(found: tuple[Tensor, ...], inputs: Inputs) -> float:
    """Relative L2 error against fp64, the worst of the results."""
    worst = 0.0
    for x, exact in zip(found, inputs.exact, strict=True):
        x = x[:1, :, :1].to(torch.float64)
        worst = max(worst, float((x - exact).norm() / exact.norm()))
    return worst


Run = Callable[[], tuple[Tensor, ...]]


@cache
def present(name: str) -> bool:
    """A peer that is no part of torch is installed here."""
    if name == "fa3":
        library = os.environ.get("FLASH_PEER_FA3")
        return bool(library) or importlib.util.find_spec("flash_attn_interface") is not None
    if name == "fa4":
        package = importlib.util.find_spec("flash_attn")
        places = (package.submodule_search_locations or []) if package else []
        return any(os.path.isdir(os.path.join(place, "cute")) for place in places)
    return True


def competitor(name: str, case: Case, x: Inputs) -> Run:
    """A call without arguments that computes the case; it raises where it is not supported."""
    if name in OURS:
        return _ours(OURS[name], case, x)
    if name in SDPA:
        return _sdpa(SDPA[name], case, x)
    return _fa3(case, x) if name == "fa3" else _fa4(case, x)


def _ours(backend: str, case: Case, x: Inputs) -> Run:
    if case.direction == "forward":
        return lambda: (flash.attention(x.q, x.k, x.v, causal=x.causal, backend=backend),)
    dq, dk, dv = (torch.empty_like(t) for t in (x.q, x.k, x.v))
    return lambda: tuple(
        flash.attention_backward(
            x.dout, x.q, x.k, x.v, x.out, x.lse, dq=dq, dk=dk, dv=dv, causal=x.causal,
            backend=backend,
        )
    )  # fmt: skip


def _autograd(forward: Callable[..., Tensor], case: Case, x: Inputs, dout: Tensor) -> Run:
    """A peer's forward, or its backward through autograd on a kept graph."""
    if case.direction == "forward":
        return lambda: (forward(x.q, x.k, x.v),)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    with torch.enable_grad():
        out = forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _sdpa(backend: SDPBackend, case: Case, x: Inputs) -> Run:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=x.causal)
        return out.transpose(1, 2)

    return _autograd(forward, case, x, x.dout)


@cache
def _fa3_ops() -> Any:
    library = os.environ.get("FLASH_PEER_FA3")
    if library:
        torch.ops.load_library(library)
    elif importlib.util.find_spec("flash_attn_interface"):
        importlib.import_module("flash_attn_interface")
    return torch.ops.flash_attn_3


def _fa3(case: Case, x: Inputs) -> Run:
    ops, scale = _fa3_ops(), case.head_dim**-0.5
    if case.direction == "forward":
        return lambda: (ops.fwd(x.q, x.k, x.v, softmax_scale=scale, is_causal=x.causal)[0],)
    out, lse = ops.fwd(x.q, x.k, x.v, softmax_scale=scale, is_causal=x.causal)[:2]
    dq, dk, dv = (torch.empty_like(t) for t in (x.q, x.k, x.v))

    def backward() -> tuple[Tensor, ...]:
        ops.bwd(x.dout, x.q, x.k, x.v, out, lse, dq, dk, dv, softmax_scale=scale,
                is_causal=x.causal)  # fmt: skip
        return dq, dk, dv

    return backward


def _fa4(case: Case, x: Inputs) -> Run:
    from flash_attn.cute import flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=x.causal)
        return out[0] if isinstance(out, tuple) else out

    return _autograd(forward, case, x, x.dout)
