"""A self-test of this GPU or CPU in under a minute: does every backend here give right results?

Errors are held against PyTorch's own in the same dtype, both measured against fp64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flash
from flash.capability import VERSIONS
from flash.demo import has_kernel

SECONDS = 60.0
FACTOR = 2.0  # times PyTorch's error
FLOOR = 1.0  # plus so many roundings of the largest exact value


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int

    def draw(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """q, k, v, dout, fresh N(0, 1)."""
        rows = ((self.seqlen_q, self.heads_q), (self.seqlen_k, self.heads_kv))
        shapes = [(self.batch, *rows[i], self.head_dim) for i in (0, 1, 1, 0)]
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@dataclass(frozen=True)
class Outcome:
    """One check of one backend: the worst error as a share of what is allowed."""

    backend: str
    check: str
    ran: str  # kernel or schedule
    share: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.share <= 1.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (33, 17)},
    "softcap": {"softcap": 15.0, "causal": True},
}
CPU_SHAPES = {
    "equal lengths": Shape(1, 129, 129, 2, 2, 64),
    "grouped heads": Shape(2, 65, 190, 4, 2, 64),
    "wide heads": Shape(1, 130, 70, 1, 1, 128),
}
GPU_SHAPES = {
    "equal lengths": Shape(2, 1024, 1024, 4, 4, 64),
    "grouped heads": Shape(2, 333, 1190, 8, 2, 128),
    "odd head dim": Shape(1, 700, 300, 2, 2, 72),
    "one row": Shape(3, 1, 513, 8, 1, 128),
}
Check = tuple[str, str, Callable[[], Outcome]]


def allowed(peer: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest absolute error that passes."""
    own = float((peer.double() - exact).abs().max())
    return FACTOR * own + FLOOR * torch.finfo(dtype).eps * float(exact.abs().max())


def share(found: Tensor, peer: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Worst error as a part of what is allowed; a NaN, or -inf in other rows, is infinitely bad."""
    blind = exact.isneginf()  # LSE of rows without keys
    if not torch.equal(found.isneginf(), blind) or bool(found.isnan().any()):
        return float("inf")
    found, peer, exact = (x.double().masked_fill(blind, 0.0) for x in (found, peer, exact))
    return float((found - exact).abs().max()) / allowed(peer, exact, dtype)


def run_all(inputs: list[Tensor], options: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = inputs
    out, lse = flash.attention(q, k, v, **options, return_lse=True, backend=backend)
    grads = flash.attention_backward(dout, q, k, v, out, lse, **options, backend=backend)
    return (out, lse, *grads)


def against_exact(
    backend: str, shape: Shape, mask: str, dtype: torch.dtype, device: str
) -> Outcome:
    """Forward and backward against fp64, next to PyTorch on the same inputs."""
    inputs, options = shape.draw(dtype, device), MASKS[mask]
    exact = run_all([x.double() for x in inputs], options, "reference")
    peer = run_all(inputs, options, "torch")
    found = run_all(inputs, options, backend)
    shares = {
        name: share(a, b, c, torch.float32 if name == "lse" else dtype)
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), found, peer, exact, strict=True)
    }
    worst = max(shares, key=lambda name: shares[name])
    return Outcome(backend, "", where(inputs), shares[worst], worst)


def where(inputs: list[Tensor]) -> str:
    return "kernel" if inputs[0].is_cuda else "schedule"


def verdict(backend: str, inputs: list[Tensor], right: bool, detail: str) -> Outcome:
    """A check that has no error to measure: right or wrong."""
    return Outcome(backend, "", where(inputs), 0.0 if right else float("inf"), detail)


def blind_rows(backend: str, dtype: torch.dtype, device: str) -> Outcome:
    """Rows that see no key give 0, -inf and no gradient."""
    inputs = Shape(1, 100, 40, 2, 2, 64).draw(dtype, device)
    out, lse, dq, _, _ = run_all(inputs, {"causal": "top-left", "window": (9, None)}, backend)
    blind = slice(40 + 9, 100)
    zeros = not out[:, blind].any() and not dq[:, blind].any()
    right = zeros and bool(lse[..., blind].isneginf().all())
    return verdict(backend, inputs, right, "exact zeros")


def hidden_keys(backend: str, dtype: torch.dtype, device: str) -> Outcome:
    """Keys and values that no row sees may be NaN and change nothing."""
    inputs = Shape(1, 60, 100, 2, 2, 64).draw(dtype, device)
    q, k, v, _ = inputs
    options: dict[str, Any] = {"causal": "top-left", "backend": backend}
    clean = flash.attention(q, k, v, **options)
    k[:, 60:], v[:, 60:] = torch.nan, torch.inf
    return verdict(backend, inputs, torch.equal(clean, flash.attention(q, k, v, **options)),
                   "equal bits")  # fmt: skip


def same_bits(backend: str, dtype: torch.dtype, device: str) -> Outcome:
    """The same call twice, and through another layout, gives the same bits."""
    q, k, v, _ = Shape(2, 200, 200, 4, 2, 64).draw(dtype, device)
    first = flash.attention(q, k, v, causal=True, backend=backend)
    second = flash.attention(q, k, v, causal=True, backend=backend)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    third = flash.attention(*turned, causal=True, layout="bhsd", backend=backend)
    right = torch.equal(first, second) and torch.equal(first, third.transpose(1, 2))
    return verdict(backend, [q], right, "equal bits")


def available(device: str, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Backends to check here, and why the others are left out."""
    if device == "cpu":
        return list(reversed(VERSIONS)), {}
    probe = Shape(1, 64, 64, 1, 1, 64).draw(dtype, device)
    chosen, left_out = [], {}
    for version in reversed(VERSIONS):
        if all(has_kernel(version, probe, way) for way in ("forward", "backward")):
            chosen.append(version)
        else:
            left_out[version] = f"no {dtype} kernel that runs on this device"
    return chosen, left_out


def checks(device: str, dtype: torch.dtype) -> list[Check]:
    """(backend, what, how) of everything that `run` will do."""
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    special = {
        "rows without keys": blind_rows,
        "NaN behind the mask": hidden_keys,
        "same call, same bits": same_bits,
    }
    planned: list[Check] = []
    for backend in available(device, dtype)[0]:
        for name, check in special.items():
            planned.append((backend, name, partial(check, backend, dtype, device)))
        for name, shape in shapes.items():
            for mask in MASKS:
                call = partial(against_exact, backend, shape, mask, dtype, device)
                planned.append((backend, f"{name}, {mask}", call))
    return planned


def run(
    device: str, dtype: torch.dtype, seconds: float = SECONDS
) -> Iterator[tuple[int, int, Outcome]]:
    """(number, of how many, outcome) for each check; stops when the time is over."""
    planned, begin = checks(device, dtype), time.monotonic()
    for number, (backend, name, check) in enumerate(planned, 1):
        if time.monotonic() - begin > seconds:
            return
        try:
            found = check()
            outcome = Outcome(backend, name, found.ran, found.share, found.detail)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            outcome = Outcome(backend, name, "", float("inf"), text)
        yield number, len(planned), outcome
