"""Who runs in a comparison: our generations, torch's kernels, and the peers that are installed.

FA-3 comes from `flash_attn_interface`, or from a library with its ops named by FLASH_PEER_FA3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash
from flash.checks_more import BLOCK
from flash.quantize import keys_contiguous
from flash.study.cases import Case
from flash.study.inputs import FP8, Inputs

OURS = {"v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper"}
SOURCES = {**OURS, "v3-keys": "v3_hopper"}  # whose kernels run
SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
PLAIN = ("torch", "reference")
OUTSIDE = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute",
           "xformers": "xformers"}  # fmt: skip
NAMES = (*SOURCES, "fp8", *SDPA, "flex", *OUTSIDE, "standard", *PLAIN)
TITLES = {
    "v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper",
    "v3-keys": "v3_hopper, FP8, V's keys contiguous", "fp8": "v3_hopper, precision fp8",
    "sdpa-flash": "torch SDPA, flash", "sdpa-cudnn": "torch SDPA, cuDNN",
    "sdpa-efficient": "torch SDPA, memory-efficient", "flex": "torch FlexAttention, compiled",
    "fa2": "flash-attn 2", "fa3": "FlashAttention-3", "fa4": "FlashAttention-4",
    "xformers": "xformers", "standard": "standard attention: S and P in memory",
    "torch": "flash.attention(backend='torch')", "reference": "exact, fp64 inside",
}  # fmt: skip
Run = Callable[[], tuple[Tensor, ...]]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unfit(Exception):
    """This competitor does not serve this case."""


@cache
def present(name: str) -> bool:
    """A peer that is no part of torch is installed here."""
    if name == "fa3" and os.environ.get("FLASH_PEER_FA3"):
        return True
    if name == "fa4":
        package = importlib.util.find_spec("flash_attn")
        places = (package.submodule_search_locations or []) if package else []
        return any(os.path.isdir(os.path.join(place, "cute")) for place in places)
    return name not in OUTSIDE or importlib.util.find_spec(OUTSIDE[name]) is not None


def competitor(name: str, case: Case, x: Inputs) -> Run:
    """A call without arguments that computes the case; it raises where it is not supported."""
    if name in OURS or name in PLAIN:
        return _ours(OURS.get(name, name), case, x)
    if name == "v3-keys":
        if x.q.dtype != FP8:
            raise Unfit("a layout of V in FP8")
        return _ours("v3_hopper", case, replace(x, v=keys_contiguous(x.v)))
    if name == "fp8":
        if case.direction == "backward":
            raise Unfit("FP8 is a forward pass")
        return _ours("v3_hopper", case, x, precision="fp8")
    if name == "fa3":
        return _fa3(case, x)
    return _autograd(_forward(name, case), case, x)


def ran(name: str, device: str) -> str:
    """A schedule's time says nothing, so a row names what ran."""
    if name in SOURCES or name == "fp8":
        return "kernel" if device == "cuda" else "schedule"
    return "reference" if name == "reference" else "library"


def _ours(backend: str, case: Case, x: Inputs, **more: Any) -> Run:
    options: dict[str, Any] = {**case.options, **more, "backend": backend}
    if x.q.dtype == FP8:
        options.update(unit_scales(x))
    if case.direction == "forward":
        return lambda: (flash.attention(x.q, x.k, x.v, **options),)
    if x.saved is None:
        raise Unfit("no output and LSE of a forward pass")
    given = (x.dout, x.q, x.k, x.v, *x.saved)
    return lambda: tuple(flash.attention_backward(*given, **options))


def unit_scales(x: Inputs) -> dict[str, Tensor]:
    """Scales of 1, one for each block of rows and K/V head."""
    return {
        f"{name}_descale": torch.ones(
            t.shape[0], -(-t.shape[1] // BLOCK), x.k.shape[2], device=t.device
        )
        for name, t in (("q", x.q), ("k", x.k), ("v", x.v))
    }


def _autograd(forward: Forward, case: Case, x: Inputs) -> Run:
    """A peer's forward, or its backward through autograd on a kept graph."""
    if case.direction == "forward":
        return lambda: (forward(x.q, x.k, x.v),)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    with torch.enable_grad():
        out = forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True)


def _forward(name: str, case: Case) -> Forward:
    if name in SDPA:
        return _sdpa(SDPA[name], case)
    makers: dict[str, Callable[[Case], Forward]] = {
        "flex": _flex, "fa2": _fa2, "fa4": _fa4, "xformers": _xformers, "standard": _standard,
    }  # fmt: skip
    return makers[name](case)


def _plain_mask(case: Case) -> None:
    if case.window is not None or case.softcap:
        raise Unfit("no window and no softcap")
    if case.causal and case.keys != case.seqlen:
        raise Unfit("its causal mask begins at the first key")


def _sdpa(backend: SDPBackend, case: Case) -> Forward:
    _plain_mask(case)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.kv_heads != case.heads
            )
        return out.transpose(1, 2)

    return forward


def _standard(case: Case) -> Forward:
    """Textbook attention, as autograd differentiates it."""
    from flash.demo import textbook

    _plain_mask(case)
    group = case.heads // case.kv_heads
    return lambda q, k, v: textbook(
        q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), case.spec
    )


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask

    first, last = case.spec.band(case.seqlen, case.keys)
    low = -case.keys - case.seqlen if first is None else first
    high = case.keys + case.seqlen if last is None else last

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= row + low) & (key <= row + high)

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return case.softcap * torch.tanh(score / case.softcap)

    masked = case.causal or case.window is not None
    block = create_block_mask(sees, None, None, case.seqlen, case.keys) if masked else None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = _compiled_flex()(
            q, k, v, score_mod=cap if case.softcap else None, block_mask=block,
            enable_gqa=case.kv_heads != case.heads,
        )  # fmt: skip
        return out.transpose(1, 2)

    return forward


def _sides(case: Case) -> tuple[int, int]:
    """A window as the flash-attn packages write it."""
    left, right = case.window or (None, None)
    return (-1 if left is None else left, -1 if right is None else right)


def _fa2(case: Case) -> Forward:
    module: Any = importlib.import_module("flash_attn")
    options = {"causal": case.causal, "window_size": _sides(case), "softcap": case.softcap}
    return lambda q, k, v: module.flash_attn_func(q, k, v, **options)


def _fa4(case: Case) -> Forward:
    module: Any = importlib.import_module("flash_attn.cute")
    window = case.window or (None, None)
    options = {"causal": case.causal, "window_size": window, "softcap": case.softcap}

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = module.flash_attn_func(q, k, v, **options)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    return forward


def _xformers(case: Case) -> Forward:
    _plain_mask(case)
    if case.kv_heads != case.heads:
        raise Unfit("grouped heads need another layout")
    ops: Any = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if case.causal else None
    return lambda q, k, v: ops.memory_efficient_attention(q, k, v, attn_bias=mask)


@cache
def fa3_ops() -> Any:
    """FlashAttention-3's operators: fwd, bwd."""
    library = os.environ.get("FLASH_PEER_FA3")
    if library:
        torch.ops.load_library(library)
    else:
        importlib.import_module("flash_attn_interface")
    return torch.ops.flash_attn_3


def _fa3(case: Case, x: Inputs) -> Run:
    ops, (left, right) = fa3_ops(), _sides(case)
    options: dict[str, Any] = {"softmax_scale": case.spec.scale, "is_causal": case.causal}
    if case.window is not None:
        options |= {"window_size_left": left, "window_size_right": right}
    if case.softcap:
        options["softcap"] = case.softcap
    if case.direction == "forward":
        return lambda: (ops.fwd(x.q, x.k, x.v, **options)[0],)
    out, lse = ops.fwd(x.q, x.k, x.v, **options)[:2]

    def backward() -> tuple[Tensor, ...]:
        dq, dk, dv = (torch.empty_like(t) for t in (x.q, x.k, x.v))
        ops.bwd(x.dout, x.q, x.k, x.v, out, lse, dq, dk, dv, **options)
        return dq, dk, dv

    return backward
