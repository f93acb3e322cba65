"""The operators under torch.func: grad and vmap work, forward-mode derivatives are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash import calls
from flash.errors import unsupported
from flash.ops import no_forward_mode
from flash.ops_autograd import calls as operators
from flash.ops_autograd import double_backward


class Transformed(torch.autograd.Function):
    """The operator in the form that function transforms can look into."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, ready: calls.Ready) -> Any:
        return operators.forward(q, k, v, *calls.arguments_of(ready, scales=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.ready = inputs[3]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        return (*Gradient.apply(dout, dlse, q, k, v, out, lse, ctx.ready), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode("q, k, v")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _fold(Transformed, info.batch_size, in_dims, inputs)


class Gradient(torch.autograd.Function):
    """The backward operator, likewise."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        dout, *others, ready = inputs
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return operators.backward(dout, *others, *calls.arguments_of(ready, scales=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return double_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode("dout, dlse, q, k, v, out, lse")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _fold(Gradient, info.batch_size, in_dims, inputs)


def _fold(function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
    """The mapped dim joins the batch."""
    *tensors, ready = inputs
    if ready.varlen is not None or ready.descale is not None:
        hint = "map dense 16-bit or 32-bit inputs, or put the mapped dim into the lengths"
        raise unsupported("vmap", "packed or float8 inputs", "dense inputs", hint)
    joined = [_join(x, dim, size) for x, dim in zip(tensors, in_dims, strict=False)]
    found = function.apply(*joined, ready)
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0,) * len(found)


def _join(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(mapped, batch, ..) in one dim; a tensor that is not mapped is repeated as a view."""
    if x is None:
        return None
    moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    joined = moved.flatten(0, 1)
    return joined if joined.stride(-1) == 1 else joined.contiguous()
