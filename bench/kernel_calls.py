"""Calls that reach every compiled kernel: small shapes of every kind, with the exact results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash
from flash.engines import kernels

DTYPES = {0: torch.float16, 1: torch.bfloat16, 2: torch.float32, 3: torch.bfloat16}
FP16, E4M3 = 0, 3
LONG_DIMS = (96, 128)
NAMES = {0: "fp16", 1: "bf16", 2: "fp32", 3: "e4m3"}
Results = tuple[Tensor, ...]


class Kernel(NamedTuple):
    """One row of a module's table of instances."""

    version: str
    direction: int
    code: int
    dim: int
    dim_v: int

    def __str__(self) -> str:
        tail = f":{self.dim_v}" if self.dim_v != self.dim else ""
        return f"{'backward' if self.direction else 'forward'} {NAMES[self.code]}:{self.dim}{tail}"


@dataclass(frozen=True)
class Shape:
    """Lengths of one sequence or of packed ones, heads, and the options of the call."""

    name: str
    lengths_q: tuple[int, ...] = (150,)
    lengths_k: tuple[int, ...] = (200,)
    batch: int = 1
    heads: int = 4
    heads_kv: int = 2
    packed: bool = False
    hidden_nan: bool = False  # in K and V where no row looks
    options: dict[str, Any] = field(default_factory=dict)


SMALL = (
    Shape("full", options={}),
    Shape("causal", options={"causal": True}),
    Shape("window, softcap", options={"window": (70, 10), "softcap": 20.0}),
    Shape("NaN behind the mask", hidden_nan=True, options={"causal": "top-left"}),
    Shape("packed", (37, 0, 130, 300, 64), (50, 20, 0, 333, 129), packed=True,
          options={"causal": True}),
    Shape("many tiles", (200,), (130,), heads=80, heads_kv=40),
    Shape("packed, long", (1100, 30, 70), (90, 20, 100), packed=True, options={"causal": True}),
)  # fmt: skip
LONG = Shape("long", (8200,), (70,), heads=32, heads_kv=1)  # v3's tiles of long sequences
GROUPED = Shape("grouped, long keys", (70,), (4200,))  # v3's dQ of d = 128 is zeroed beforehand
ROUNDS = Shape("many rounds", (100,), (70,), heads=680, heads_kv=1)  # each CTA has 5 tiles or more
BY_KEYS = (  # of V in FP8: where their number is a multiple of 16
    Shape("keys contiguous, causal", (150,), (208,), options={"causal": True}),
    Shape("keys contiguous, NaN behind the mask", (150,), (208,), hidden_nan=True,
          options={"causal": "top-left"}),
    Shape("keys contiguous, many rounds", (100,), (80,), heads=680, heads_kv=1),
)  # fmt: skip
QUANTIZED = tuple(Shape(f"scale per {name}", options={"granularity": name})
                  for name in ("tensor", "head"))  # fmt: skip
DETERMINISTIC = replace(SMALL[1], name="causal, deterministic",
                        options={"causal": True, "deterministic": True})  # fmt: skip


def every(version: str) -> Iterator[Kernel]:
    """The kernels that were built."""
    for row in sorted(kernels.instances(version)):
        yield Kernel(version, *row)


def has_long_tiles(kernel: Kernel) -> bool:
    """v3 takes longer tiles of long sequences there (`kHasLong`)."""
    forward = kernel.version == "v3_hopper" and not kernel.direction and kernel.code != E4M3
    return forward and kernel.dim == kernel.dim_v and kernel.dim in LONG_DIMS


def shapes(kernel: Kernel) -> tuple[Shape, ...]:
    """fp16 kernels are those of bf16 but for the type: fewer shapes."""
    rounds = (ROUNDS,) if kernel.version == "v3_hopper" and not kernel.direction else ()
    if kernel.code == FP16:
        return SMALL[1:3] + SMALL[4:5]
    if kernel.code == E4M3:
        return (*SMALL, *rounds, *QUANTIZED, *BY_KEYS)
    if has_long_tiles(kernel):
        return (*SMALL, *rounds, LONG)
    if not kernel.direction:
        return (*SMALL, *rounds)
    zeroed = kernel.version == "v3_hopper" and kernel.dim == 128
    return (*SMALL, DETERMINISTIC, GROUPED) if zeroed else (*SMALL, DETERMINISTIC)


class Call(NamedTuple):
    """Runs on a GPU what `exact` holds in fp64 on the CPU."""

    run: Callable[[], Results]
    exact: Results

    def error(self, found: Results) -> float:
        """Relative L2 error, the worst of the results; NaN where one is not finite."""
        worst = 0.0
        for ours, exact in zip(found, self.exact, strict=True):
            own = ours.to(exact.device).double()
            error = float((own - exact).norm() / exact.norm().clamp_min(1e-9))
            worst = max(worst, error) if math.isfinite(error) else math.nan
        return worst


def drawn(kernel: Kernel, shape: Shape) -> tuple[Results, dict[str, Any]]:
    """(q, k, v, dout), N(0, 1) and rounded to the kernel's dtype, and the call's options."""
    g = torch.Generator().manual_seed(kernel.dim + 1000 * kernel.code)
    rows = (sum(shape.lengths_q),) if shape.packed else (shape.batch, *shape.lengths_q)
    keys = (sum(shape.lengths_k),) if shape.packed else (shape.batch, *shape.lengths_k)
    sizes = ((*rows, shape.heads, kernel.dim), (*keys, shape.heads_kv, kernel.dim),
             (*keys, shape.heads_kv, kernel.dim_v), (*rows, shape.heads, kernel.dim_v))  # fmt: skip
    q, k, v, dout = (torch.randn(s, generator=g).to(DTYPES[kernel.code]) for s in sizes)
    if shape.hidden_nan:
        k[:, shape.lengths_q[0] :] = math.nan
        v[:, shape.lengths_q[0] :] = math.nan
    options = dict(shape.options)
    if shape.packed:
        for name, lengths in (("q", shape.lengths_q), ("k", shape.lengths_k)):
            ends = list(itertools.accumulate(lengths, initial=0))
            options[f"cu_seqlens_{name}"] = torch.tensor(ends, dtype=torch.int32)
            options[f"max_seqlen_{name}"] = max(lengths)
    return (q, k, v, dout), options


def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Results:
    """(out, lse); with `granularity`, of inputs quantized so."""
    granularity = options.pop("granularity", None)
    if granularity and options["backend"] != "reference":
        options.pop("precision", None)
        hadamard = granularity == "tensor"
        if not hadamard:  # for once from fp16
            q, k, v = q.half(), k.half(), v.half()
        parts = flash.quantize_fp8(q, k, v, granularity, hadamard)
        found: Results = flash.attention(**parts._asdict(), return_lse=True, **options)
    elif "cu_seqlens_q" in options:
        found = flash.attention_varlen(q, k, v, return_lse=True, **options)
    else:
        found = flash.attention(q, k, v, return_lse=True, **options)
    return found


def on(place: str, options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(place) if isinstance(x, Tensor) else x for n, x in options.items()}


def prepare(kernel: Kernel, shape: Shape, device: str = "cuda", judge: str = "cpu") -> Call:
    """The call, its inputs on `device`, the exact results of `judge`; a backward pass starts from
    the exact forward pass."""
    inputs, options = drawn(kernel, shape)
    known = {**on(judge, options), "backend": "reference"}
    moved = {**on(device, options), "backend": kernel.version}
    q, k, v, dout = (x.to(judge).double() for x in inputs)
    out, lse = forward(q, k, v, **known)
    q_, k_, v_, dout_ = (x.to(device) for x in inputs)
    if kernel.direction == 0:
        if kernel.code == E4M3:
            moved["precision"] = "fp8"
        return Call(lambda: forward(q_, k_, v_, **moved)[:1], (out,))
    exact = flash.attention_backward(dout, q, k, v, out, lse, **known)
    saved = (out.to(device, q_.dtype), lse.float().to(device))
    return Call(lambda: flash.attention_backward(dout_, q_, k_, v_, *saved, **moved), exact)
