"""The checks and the launch of attention_backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash import calls, dispatch
from flash.checks import check_inputs, check_output
from flash.checks_more import check_saved, check_varlen
from flash.errors import wrong_value
from flash.execute import ALIGNED, alignment_of, request_of, run_backward
from flash.options import LAYOUTS, backend_name, choice, make_spec
from flash.spec import Varlen

ARGUMENTS = (
    "dout", "q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen_q", "max_seqlen_k", "causal", "window", "scale", "softcap", "deterministic",
    "layout", "backend",
)  # fmt: skip
Grads3 = tuple[Tensor, Tensor, Tensor]


def run(
    saved: tuple[Any, ...], grads: tuple[Any, ...], lengths: tuple[Any, ...],
    options: tuple[Any, ...],
) -> Grads3:  # fmt: skip
    causal, window, scale, softcap, deterministic, layout, backend = options
    choice("layout", layout, LAYOUTS)
    name = backend_name(backend)
    _, _, q, k, v, _, _ = saved
    packed = any(x is not None for x in lengths)
    if packed and layout != "bshd":
        raise wrong_value("layout", layout, "left out for packed tensors")
    check_inputs(q, k, v, "packed" if packed else layout)
    spec = make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    varlen = check_varlen(q, k, *lengths) if packed else None
    swap = layout == "bhsd"
    checked = _check_tensors(saved, grads, swap)
    factor = None if scale is None else spec.scale
    ready = calls.Ready(spec, name, swap, False, None, factor, None, varlen)
    found = _launch(ready, *checked)
    if swap:
        dq, dk, dv = (
            f.transpose(1, 2) if g is None else g for f, g in zip(found, grads, strict=True)
        )
        return dq, dk, dv
    return found


def _check_tensors(
    saved: tuple[Any, ...], grads: tuple[Any, ...], swap: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Both groups with rows before heads."""
    dout, dlse, q, k, v, out, lse = saved

    def turn(x: Any) -> Any:
        return x.transpose(1, 2) if swap and isinstance(x, Tensor) else x

    tq, tk, tv = turn(q), turn(k), turn(v)
    check_saved(dout, tq, tv, out, lse, dlse, (0, 2, 1, 3) if swap else (0, 1, 2, 3)[: q.ndim])
    inputs = tuple(x for x in saved if x is not None)
    written: tuple[Tensor, ...] = ()
    for name, x, like in zip(("dq", "dk", "dv"), grads, (q, k, v), strict=True):
        if x is not None:
            check_output(name, x, tuple(like.shape), q, q.dtype, (*inputs, *written))
            written = (*written, x)
    turned = (turn(dout), dlse, tq, tk, tv, turn(out), lse)
    return turned, tuple(turn(x) for x in grads)


def _launch(ready: calls.Ready, saved: tuple[Any, ...], grads: tuple[Any, ...]) -> Grads3:
    q, k, v = saved[2:5]
    if calls.eager() and q.device.type != "meta" and not _wants_gradient(saved):
        request = request_of(
            q, k, v, ready.spec, ready.backend, varlen=ready.varlen is not None,
            direction="backward",
        )  # fmt: skip
        decision = dispatch.resolve(request, q.device)
        dispatch.record(decision)
        direct = decision.engine != "kernels"
        targets = tuple(
            x if x is not None and (direct or alignment_of(x) == ALIGNED) else None for x in grads
        )
        found = run_backward(decision, ready.spec, saved, varlen=ready.varlen, grads=targets)
        return _fill(found, grads)
    return _operate(ready, saved, grads)


def _wants_gradient(saved: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in saved)


def _operate(ready: calls.Ready, saved: tuple[Any, ...], grads: tuple[Any, ...]) -> Grads3:
    args = calls.arguments_of(ready, scales=False)
    if all(x is not None for x in grads):
        calls.calls.backward_out(*saved, *args, dq=grads[0], dk=grads[1], dv=grads[2])
        return grads[0], grads[1], grads[2]
    if calls.transformed():
        from flash.transforms import Gradient

        return _fill(Gradient.apply(*saved, ready), grads)
    return _fill(calls.calls.backward(*saved, *args), grads)


def _fill(found: Any, grads: tuple[Any, ...]) -> Grads3:
    """Results that were not written in place go to the tensors that were given."""
    dq, dk, dv = (
        f if g is None or g is f else g.copy_(f) for f, g in zip(found, grads, strict=True)
    )
    return dq, dk, dv


__all__ = ["ARGUMENTS", "Varlen", "run"]
