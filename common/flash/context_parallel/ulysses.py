"""Heads for rows and back: each process attends with some heads over all rows of the group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash.context_parallel.shards import Group, place
from flash.errors import wrong_value


class _Exchange(torch.autograd.Function):
    """Part i of `cut` goes to process i; what arrives is joined along `join`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        sent = torch.stack(x.chunk(place(group)[1], cut))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return _Exchange.apply(dout, ctx.group, ctx.join, ctx.cut), None, None, None


def to_heads(x: Tensor, group: Group) -> Tensor:
    """(batch, rows / P, heads, dim) -> (batch, rows, heads / P, dim)."""
    found: Tensor = _Exchange.apply(x, group, 2, 1)
    return found


def to_rows(x: Tensor, group: Group) -> Tensor:
    """(batch, rows, heads / P, dim) -> (batch, rows / P, heads, dim)."""
    found: Tensor = _Exchange.apply(x, group, 1, 2)
    return found


def enough_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """k and v with a head for every process: fewer heads than processes are repeated."""
    size, heads, heads_kv = place(group)[1], q.shape[2], k.shape[2]
    if heads % size:
        raise wrong_value("heads of q", heads, f"a multiple of the {size} processes of ulysses")
    if heads_kv % size == 0:
        return k, v
    if heads_kv == 0 or size % heads_kv:
        expected = f"a multiple or a divisor of the {size} processes of ulysses"
        raise wrong_value("heads of k", heads_kv, expected, "use fewer there and more in the ring")
    times = size // heads_kv
    return k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
