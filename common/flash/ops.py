"""The calls as PyTorch operators, so that compile, export, autocast and counters see them.

Tensors are (batch, seq, heads, dim), or (total, heads, dim) with cu_seqlens; results contiguous.
`forward` and `backward` return new tensors, `forward_out` and `backward_out` write given ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash import dispatch
from flash.checks_more import BLOCK
from flash.engines.layout import lse_dtype, lse_shape, out_dtype
from flash.errors import UnsupportedError
from flash.execute import request_of, run_backward, run_forward, settle
from flash.spec import Descale, Result, Spec, Varlen

NAMESPACE = "flash_generations"
library = torch.library.Library(NAMESPACE, "DEF")

_LENGTHS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
_SCORES = (
    "float? scale, float softcap, SymInt? left, SymInt? right, bool top_left, "
    "bool deterministic, str backend"
)
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, " + _LENGTHS
    + "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, bool fp8, " + _SCORES
)  # fmt: skip
_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    + _LENGTHS + _SCORES
)  # fmt: skip
SCHEMAS = {
    "forward": f"({_FORWARD}) -> (Tensor out, Tensor lse)",
    "forward_out": f"({_FORWARD}, *, Tensor(a!) out) -> Tensor lse",
    "backward": f"({_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "backward_out": f"({_BACKWARD}, *, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
}


def spec_of(q: Tensor, scores: tuple[Any, ...]) -> Spec:
    scale, softcap, left, right, top_left, deterministic = scores
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return Spec(factor, softcap, left, right, top_left, deterministic)


def varlen_of(lengths: tuple[Any, ...]) -> Varlen | None:
    return None if lengths[0] is None else Varlen(*lengths)


def descale_of(scales: tuple[Any, ...]) -> Descale | None:
    """Scales as they were checked; a block is fixed, unless one scale serves all rows."""
    if scales[0] is None:
        return None
    rows = [0 if s.shape[1] == 1 else BLOCK for s in scales[:2]]
    return Descale(*scales, *rows)


def no_forward_mode(name: str) -> UnsupportedError:
    text = (
        f"attention has no forward-mode derivative (jvp, dual tensors), for {name}; supported is "
        "reverse mode; use torch.func.vjp or backward()"
    )
    return UnsupportedError(text, argument=name, given="dual tensor", expected="reverse mode")


def refuse_tangents(**tensors: Tensor | None) -> None:
    """An operator that has no autograd formula drops the tangent of a dual tensor silently."""
    if forward_ad._current_level < 0:
        return
    for name, x in tensors.items():
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise no_forward_mode(name)


def _forward(q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...], out: Tensor | None) -> Result:
    refuse_tangents(q=q, k=k, v=v, out=out)
    lengths, scales, fp8, scores, backend = args[:4], args[4:7], args[7], args[8:14], args[14]
    varlen, spec = varlen_of(lengths), spec_of(q, scores)
    job = settle(q, k, v, spec, backend, varlen=varlen is not None, fp8=fp8)
    dispatch.record(job.decision)
    return run_forward(job, q, k, v, descale=descale_of(scales), varlen=varlen, out=out)


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    found = _forward(q, k, v, args, None)
    return found.out, found.lse


def forward_out(q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Tensor) -> Tensor:
    return _forward(q, k, v, args, out).lse


def _backward(saved: tuple[Any, ...], args: tuple[Any, ...], grads: tuple[Any, ...]) -> Any:
    lengths, scores, backend = args[:4], args[4:10], args[10]
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
    refuse_tangents(**dict(zip(names, (*saved, *grads), strict=True)))
    q, k, v = saved[2:5]
    varlen, spec = varlen_of(lengths), spec_of(q, scores)
    kinds: dict[str, Any] = {"varlen": varlen is not None, "direction": "backward"}
    decision = dispatch.resolve(request_of(q, k, v, spec, backend, **kinds), q.device)
    dispatch.record(decision)
    return run_backward(decision, spec, saved, varlen=varlen, grads=grads)


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = _backward(args[:7], args[7:], (None, None, None))
    return found.dq, found.dk, found.dv


def backward_out(*args: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    _backward(args[:7], args[7:], (dq, dk, dv))


def forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype(q))
    return out, q.new_empty(lse_shape(q), dtype=lse_dtype(q))


def forward_out_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Tensor) -> Tensor:
    return q.new_empty(lse_shape(q), dtype=lse_dtype(q))


def backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = args[2:5]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def backward_out_fake(*args: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "forward": (forward, forward_fake),
    "forward_out": (forward_out, forward_out_fake),
    "backward": (backward, backward_fake),
    "backward_out": (backward_out, backward_out_fake),
}


def register() -> None:
    """Once, when the package is imported."""
    for name, (run, fake) in _IMPLEMENTATIONS.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


register()
