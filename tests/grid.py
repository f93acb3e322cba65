"""One grid for all three versions: cases, inputs, an oracle of its own, tolerances.

Tensors on the CPU run the schedules, on a GPU the kernels; the tests are the same.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flash
from flash import dispatch
from flash.capability import VERSIONS, arch_of

INF = math.inf
ON_GPU = torch.cuda.is_available() and os.environ.get("FLASH_TEST_DEVICE", "cuda") != "cpu"
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-20, torch.float64: 2.0**-50}
SHORT = {"v1_tiling": "v1", "v2_parallel": "v2", "v3_hopper": "v3"}


@dataclass(frozen=True)
class Case:
    """One call; its id names what is not the default."""

    seqlen_q: int = 129
    seqlen_k: int = 129
    dim: int = 64
    dim_v: int = 0  # 0: dim
    heads_q: int = 2
    heads_kv: int = 2
    dtype: torch.dtype = BF16
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    scale: float | None = None
    batch: int = 1
    gain: float = 1.0

    def __str__(self) -> str:
        parts = [f"{self.seqlen_q}x{self.seqlen_k}", f"d{self.dim}"]
        parts += [f"out{self.dim_v}"] if self.dim_v else []
        parts += [] if self.heads_q == self.heads_kv else [f"h{self.heads_q}:{self.heads_kv}"]
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += [] if self.causal is False else ["causal" if self.causal is True else "topleft"]
        parts += [f"w{self.window[0]}_{self.window[1]}"] if self.window else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [] if self.scale is None else [f"scale{self.scale:g}"]
        parts += [] if self.gain == 1.0 else [f"gain{self.gain:g}"]
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap,
                "scale": self.scale}  # fmt: skip

    @property
    def factor(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def draw(case: Case, seed: int = 0, device: torch.device = DEVICE) -> Inputs:
    """Fresh N(0, gain^2) inputs, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    dim_v = case.dim_v or case.dim
    shapes = (
        (case.batch, case.seqlen_q, case.heads_q, case.dim),
        (case.batch, case.seqlen_k, case.heads_kv, case.dim),
        (case.batch, case.seqlen_k, case.heads_kv, dim_v),
        (case.batch, case.seqlen_q, case.heads_q, dim_v),
    )
    gains = (case.gain, case.gain, 1.0, 1.0)
    q, k, v, dout = (
        (torch.randn(s, generator=g) * w).to(device, case.dtype)
        for s, w in zip(shapes, gains, strict=True)
    )
    dlse = torch.randn(case.batch, case.heads_q, case.seqlen_q, generator=g).to(device)
    return Inputs(q, k, v, dout, dlse)


def visible(case: Case, device: torch.device = DEVICE) -> Tensor:
    """(rows, keys) booleans, straight from the contract's words."""
    r = torch.arange(case.seqlen_q, device=device)[:, None]
    c = torch.arange(case.seqlen_k, device=device)[None, :]
    shift = 0 if case.causal == "top-left" else case.seqlen_k - case.seqlen_q
    left, right = case.window or (None, None)
    seen = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device)
    if case.causal:
        seen &= c <= r + shift
    if left is not None:
        seen &= c >= r + shift - left
    if right is not None:
        seen &= c <= r + shift + right
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Attention by the textbook, every matrix in full, in the dtype of its inputs."""
    group = q.shape[2] // max(1, k.shape[2])
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.factor
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    seen = visible(case, q.device)
    s = s.masked_fill(~seen, -INF)
    empty = ~seen.any(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1).masked_fill(empty[:, 0], -INF)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


class Answer(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...] = ()
    saved: tuple[Tensor, ...] = ()  # row by row, what rounding the saved O does to each gradient


def by_autograd(case: Case, given: Inputs, dtype: torch.dtype, gradients: bool) -> Answer:
    """`dense` in this dtype, and its gradients for dout and dlse."""
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in given[:3]]
    out, lse = dense(*leaves, case)
    if not gradients:
        return Answer(out, lse)
    finite = lse.masked_fill(lse == -INF, 0.0)
    cotangents = [given.dout.to(dtype), given.dlse.to(dtype)]
    grads = torch.autograd.grad([out, finite], leaves, cotangents, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
    return Answer(out.detach(), lse.detach(), tuple(filled))


def rounding_of_saved_out(case: Case, given: Inputs, exact: Answer) -> tuple[Tensor, ...]:
    """Backward reads O as it was returned, made with rounded P and rounded itself.

    So sum(dO * O) is off by about eps * |dO * O| and eps * |P * dP| of the row. Textbook autograd
    keeps P instead and has no such term; here it is, carried to each gradient.
    """
    group = case.heads_q // case.heads_kv
    q = given.q.double()
    k, v = (x.double().repeat_interleave(group, 2) for x in (given.k, given.v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.factor
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    lse = exact.lse.masked_fill(exact.lse == -INF, INF)
    p = torch.exp(s - lse[..., None]).masked_fill(~visible(case, q.device), 0.0)
    dout = given.dout.double()
    p_dp = (p * torch.einsum("bqhd,bkhd->bhqk", dout, v)).norm(dim=-1)
    off = EPS[case.dtype] * torch.hypot((dout * exact.out).norm(dim=-1).transpose(1, 2), p_dp)
    weights = abs(case.factor) * off[..., None] * p  # (batch, heads, rows, keys)
    dq = torch.einsum("bhqk,bkhd->bqhd", weights, k).norm(dim=-1)
    dk = torch.einsum("bhqk,bqh->bkh", weights.square(), q.square().sum(-1)).sqrt()
    dk = dk.unflatten(2, (case.heads_kv, -1)).norm(dim=-1)
    return dq, dk, torch.zeros_like(dk)


@lru_cache(maxsize=512)
def expected(case: Case, gradients: bool = False, seed: int = 0) -> tuple[Answer, Answer]:
    """(in fp64, in PyTorch's own arithmetic of the case's dtype)."""
    given = draw(case, seed)
    exact = by_autograd(case, given, torch.float64, gradients)
    if gradients:
        exact = exact._replace(saved=rounding_of_saved_out(case, given, exact))
    return exact, by_autograd(case, given, case.dtype, gradients)


def row_errors(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact.double()).norm(dim=-1)


def assert_rows(
    actual: Tensor, exact: Tensor, same_dtype: Tensor, what: str, saved: Tensor | float = 0.0
) -> None:
    """Row by row: at most twice PyTorch's error in the same dtype, plus rounding of the result."""
    eps = EPS[actual.dtype]
    size = exact.double().norm(dim=-1)
    floor = eps * (size + 0.5 * size.square().mean().sqrt()) + 1e-30
    errors, allowed = row_errors(actual, exact), 2.0 * row_errors(same_dtype, exact) + floor + saved
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    worst = (errors / allowed).flatten().argmax() if errors.numel() else None
    if worst is not None:
        e, a = errors.flatten()[worst].item(), allowed.flatten()[worst].item()
        assert e <= a, f"{what}: row {worst.item()} is off by {e:.3e}, allowed {a:.3e}"


def assert_lse(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Absolute: a factor of exp(error) on every probability of the row."""
    assert actual.dtype == torch.float32
    empty = exact == -INF
    assert torch.equal(actual == -INF, empty), "LSE is -inf exactly where a row sees no key"
    # products of 16-bit inputs are exact in fp32: what is left is the order of the sum
    error = (actual.double() - exact.double()).masked_fill(empty, 0.0).abs()
    allowed = 1e-5 + 2e-6 * exact.masked_fill(empty, 0.0).abs()
    assert bool((error <= allowed).all()), f"LSE off by {error.max().item():.2e}"


def attend(version: str, given: Inputs, case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = flash.attention(
        given.q, given.k, given.v, backend=version, return_lse=True, **case.options, **more
    )
    return out, lse


def differentiate(version: str, given: Inputs, case: Case, **more: Any) -> Answer:
    """Through autograd, with a gradient on the output and one on the LSE."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out, lse = attend(version, Inputs(*leaves, given.dout, given.dlse), case, **more)
    grads = torch.autograd.grad([out, lse], leaves, [given.dout, given.dlse])
    return Answer(out.detach(), lse.detach(), grads)


def assert_gradients(found: Answer, exact: Answer, same_dtype: Answer) -> None:
    for i, name in enumerate(("dQ", "dK", "dV")):
        assert_rows(found.grads[i], exact.grads[i], same_dtype.grads[i], name, exact.saved[i])


def features(case: Case) -> tuple[str, ...]:
    wanted = {
        "causal": bool(case.causal), "window": case.window is not None,
        "softcap": case.softcap > 0, "gqa": case.heads_q != case.heads_kv,
        "head_dim_v": case.dim_v not in (0, case.dim),
    }  # fmt: skip
    return tuple(name for name, used in wanted.items() if used)


def serves(version: str, case: Case, direction: str = "forward") -> bool:
    """By the capability table and, on a GPU, by what is built: never by trying."""
    request = dispatch.Request(case.dtype, case.dim, case.dim_v or case.dim, direction, version,
                               features(case))  # fmt: skip
    built = dispatch.built_here(0) if ON_GPU else {}
    return not dispatch.reasons_against(version, arch_of(DEVICE), request, built)


def versions(case: Case | None = None) -> list[str]:
    """Oldest first: those that serve a case here."""
    case = case or Case()
    return [version for version in reversed(VERSIONS) if serves(version, case)]


def pairs(cases: list[Case], direction: str = "forward") -> list[Any]:
    """(version, case) parameters of all that each version serves, with ids such as v2-129x129."""
    return [
        pytest.param(version, case, id=f"{SHORT[version]}-{case}")
        for version, case in itertools.product(reversed(VERSIONS), dict.fromkeys(cases))
        if serves(version, case, direction)
    ]


def vary(cases: list[Case], **axes: list[Any]) -> list[Case]:
    """Every case with every combination of the axes' values."""
    combined = itertools.product(*axes.values())
    changes = [dict(zip(axes, values, strict=True)) for values in combined]
    return [replace(case, **change) for case in cases for change in changes]
