"""The gradients of the operators: backward is an operator itself, and has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash.capability import FP8
from flash.errors import UnsupportedError
from flash.execute import fp8_has_no_gradient
from flash.ops import NAMESPACE, library

_FORWARD_ARGUMENTS = 18
_BACKWARD_ARGUMENTS = 18
calls = getattr(torch.ops, NAMESPACE)


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward reads; a result that nobody differentiates stays None."""
    q, k, v, cu_q, cu_k, max_q, max_k = inputs[:7]
    if q.dtype == FP8:
        raise fp8_has_no_gradient()
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.lengths = (max_q, max_k)
    ctx.scores = inputs[11:]
    ctx.set_materialize_grads(False)


def forward_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * _FORWARD_ARGUMENTS
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()
    lengths = (cu_q, cu_k, *ctx.lengths)
    grads = calls.backward(dout, dlse, q, k, v, out, lse, *lengths, *ctx.scores)
    return (*grads, *(None,) * (_FORWARD_ARGUMENTS - 3))


def double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    text = (
        "attention has no second derivative: its backward was differentiated; supported is the "
        "first derivative; drop create_graph=True, or use torch's math attention"
    )
    raise UnsupportedError(text, argument="create_graph", given=True, expected=False)


torch.library.register_autograd(
    f"{NAMESPACE}::forward", forward_backward, setup_context=save_forward, lib=library
)
torch.library.register_autograd(f"{NAMESPACE}::backward", double_backward, lib=library)
