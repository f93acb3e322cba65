"""One settled call on one engine: quantization before, the gradient's fixed points around."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.capability import FP8
from flash.dispatch import Decision, Request, engine, resolve
from flash.errors import unsupported
from flash.spec import Descale, Grads, Result, Spec, Varlen
from flash.wrapped import address

ALIGNED = 16


class Job(NamedTuple):
    """Everything of a forward call except its tensors, settled before anything runs."""

    spec: Spec
    decision: Decision
    engine: Any
    fp8: bool = False  # quantize 16-bit inputs first


def alignment_of(*tensors: Tensor) -> int:
    """The largest power of two, at most 16, that divides all pointers and strides, in bytes."""
    bits = ALIGNED
    for x in tensors:
        if x.device.type == "cuda":
            bits |= address(x)
            size = x.element_size()
            x = x if x.stride(-1) == 1 or x.dtype != FP8 else x.transpose(1, -1)  # V by keys
            for n, stride in zip(x.shape[:-1], x.stride(), strict=False):
                bits |= stride * size if n > 1 else 0
    return bits & -bits


def features_of(spec: Spec, dtype: torch.dtype, grouped: bool, varlen: bool) -> tuple[str, ...]:
    """The features that a backend must have for this call."""
    wanted = {
        "causal": spec.right == 0 and spec.left is None,
        "window": spec.left is not None or spec.right not in (0, None),
        "softcap": spec.softcap != 0,
        "gqa": grouped,
        "varlen": varlen,
        "fp8": dtype == FP8,
        "varlen fp8": varlen and dtype == FP8,
        "deterministic": spec.deterministic,
    }
    return tuple(name for name, needed in wanted.items() if needed)


def request_of(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, backend: str, *, varlen: bool = False,
    fp8: bool = False, direction: str = "forward",
) -> Request:  # fmt: skip
    dtype = FP8 if fp8 and direction == "forward" else q.dtype
    features = features_of(spec, dtype, q.shape[-2] != k.shape[-2], varlen)
    if q.shape[-1] != v.shape[-1]:
        features = (*features, "head_dim_v")
    alignment = ALIGNED if fp8 else alignment_of(q, k, v)
    dims = (int(q.shape[-1]), int(v.shape[-1]))
    return Request(dtype, *dims, direction, backend, features, alignment)


def settle(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, backend: str, *, varlen: bool = False,
    fp8: bool = False, gradient: bool = False,
) -> Job:  # fmt: skip
    """Choose the engines of forward and, when a gradient is wanted, of backward."""
    kinds: dict[str, Any] = {"varlen": varlen, "fp8": fp8}
    forward = request_of(q, k, v, spec, backend, **kinds)
    back = None
    if gradient:
        back = request_of(q, k, v, spec, backend, direction="backward", **kinds)
    decision = resolve(forward, q.device, back)
    return Job(spec, decision, engine(decision), fp8)


def quantized(
    q: Tensor, k: Tensor, v: Tensor, varlen: Varlen | None
) -> tuple[Tensor, Tensor, Tensor, Descale]:
    """16-bit tensors as e4m3, one scale per block of rows and K/V head; Q and K are rotated."""
    from flash.checks_more import BLOCK
    from flash.quantize import quantize_dense, quantize_packed

    if varlen is None:
        found = quantize_dense(q, k, v, "block", True, BLOCK, BLOCK)
    else:
        found = quantize_packed(q, k, v, varlen, True, BLOCK)
    rows = [0 if s.shape[1] == 1 else BLOCK for s in (found.q_descale, found.k_descale)]
    return *found[:3], Descale(*found[3:], *rows)


def run_forward(
    job: Job, q: Tensor, k: Tensor, v: Tensor, *, descale: Descale | None = None,
    varlen: Varlen | None = None, out: Tensor | None = None,
) -> Result:  # fmt: skip
    if not job.fp8:
        found: Result = job.engine.forward(
            q, k, v, job.spec, descale=descale, varlen=varlen, out=out
        )
        return found
    q8, k8, v8, scales = quantized(q, k, v, varlen)
    direct = out if q.dtype == torch.bfloat16 else None
    found = job.engine.forward(q8, k8, v8, job.spec, descale=scales, varlen=varlen, out=direct)
    if q.dtype == torch.bfloat16:
        return found
    return Result(found.out.to(q.dtype) if out is None else out.copy_(found.out), found.lse)


def run_backward(
    decision: Decision, spec: Spec, saved: tuple[Tensor | None, ...], *,
    varlen: Varlen | None = None, grads: tuple[Tensor | None, ...] = (None, None, None),
) -> Grads:  # fmt: skip
    """`saved` is (dout, dlse, q, k, v, out, lse)."""
    dout, dlse, q, k, v, out, lse = saved
    if decision.engine == "kernels":
        dout, out = (x if x is None or readable(x) else x.contiguous() for x in (dout, out))
    named = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    runner = engine(decision)
    found: Grads = runner.backward(dout, dlse, q, k, v, out, lse, spec, varlen=varlen, **named)
    return found


def readable(x: Tensor) -> bool:
    """A kernel can read it as it is."""
    return x.stride(-1) == 1 and alignment_of(x) == ALIGNED


def fp8_has_no_gradient() -> Exception:
    hint = "use 16-bit inputs with precision='fp8', whose backward is 16-bit"
    return unsupported("requires_grad", True, "False for float8 inputs", hint)
