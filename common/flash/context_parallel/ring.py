"""K and V go around a ring of processes; partial attentions are merged in float32.

Rows lie in zigzag (shards.py), so a causal step against another process's keys is a full rectangle:
all our rows and the first half of its keys when it comes earlier in the ring, the second half of
our rows and all its keys when it comes later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flash.attention import attention, attention_backward
from flash.context_parallel.shards import Group, place


class Step(NamedTuple):
    """Which rows meet which keys, and whether below the diagonal only."""

    rows: slice
    keys: slice
    causal: bool


def step_of(own: int, source: int, causal: bool, rows: int) -> Step:
    """Process `own` against the keys of process `source`."""
    half, whole = slice(rows // 2, None), slice(None)
    if not causal or own == source:
        return Step(whole, whole, causal)
    return Step(whole, slice(0, rows // 2), False) if source < own else Step(half, whole, False)


class Ring:
    """Sends tensors to the next process and receives those of the previous one."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = place(group)
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.next = ranks[(self.rank + 1) % self.size]
        self.previous = ranks[(self.rank - 1) % self.size]

    def start(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any], list[Tensor]]:
        """Begin; computing may go on with `tensors`, which must not be written until `finish`."""
        sent = [x.contiguous() for x in tensors]
        arriving = [torch.empty_like(x) for x in sent]
        moves = [dist.P2POp(dist.isend, x, self.next, self.group) for x in sent]
        moves += [dist.P2POp(dist.irecv, x, self.previous, self.group) for x in arriving]
        return arriving, dist.batch_isend_irecv(moves), sent

    @staticmethod
    def finish(under_way: tuple[list[Tensor], list[Any], list[Tensor]]) -> list[Tensor]:
        arriving, works, _ = under_way
        for work in works:
            work.wait()
        return arriving


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which partial results are summed."""
    return x if x.dtype == torch.float64 else x.float()


def absorb(total: Tensor, stats: Tensor, out: Tensor, lse: Tensor) -> None:
    """`total` and its log-sum-exp `stats` come to be, in place, those of both parts' keys."""
    joined = torch.logaddexp(stats, lse)
    weight = torch.exp(lse - torch.where(joined == -torch.inf, 0.0, joined))
    total.lerp_(out.to(total.dtype), weight.transpose(1, 2).unsqueeze(-1))
    stats.copy_(joined)


class RingAttention(torch.autograd.Function):
    """(out, lse) of this process's rows over the keys of all; every tensor is "bshd"."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, causal: bool, options: Any
    ) -> tuple[Tensor, Tensor]:
        ring = Ring(group)
        kv, total, stats = [k, v], None, None
        for i in range(ring.size):
            under_way = ring.start(kv) if i + 1 < ring.size else None
            step = step_of(ring.rank, (ring.rank - i) % ring.size, causal, q.shape[1])
            part = [x[:, step.keys] for x in kv]
            out, lse = attention(
                q[:, step.rows], *part, causal=step.causal, return_lse=True, **options
            )
            if total is None or stats is None:  # the first step has all rows
                total, stats = _wide(out), _wide(lse)
            else:
                absorb(total[:, step.rows], stats[:, :, step.rows], out, lse)
            kv = ring.finish(under_way) if under_way is not None else kv
        assert total is not None
        assert stats is not None
        result = total.to(q.dtype), stats
        ctx.save_for_backward(q, k, v, *result)
        ctx.parts = (group, causal, options)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        group, causal, options = ctx.parts
        ring = Ring(group)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        kv, dq, dkv, sums_under_way = [k, v], None, [], None
        for i in range(ring.size):
            under_way = ring.start(kv) if i + 1 < ring.size else None
            step = step_of(ring.rank, (ring.rank - i) % ring.size, causal, q.shape[1])
            rows, keys = step.rows, step.keys
            stats = [None if x is None else x[:, :, rows].contiguous() for x in (lse, dlse)]
            assert stats[0] is not None
            found = attention_backward(
                dout[:, rows], q[:, rows], kv[0][:, keys], kv[1][:, keys], out[:, rows], stats[0],
                dlse=stats[1], causal=step.causal, **options,
            )  # fmt: skip
            if dq is None or sums_under_way is None:  # the first step has all rows and keys
                dq, dkv = _wide(found[0]), [_wide(x) for x in found[1:]]
            else:
                dq[:, rows] += found[0]
                dkv = ring.finish(sums_under_way)
                for sums, share in zip(dkv, found[1:], strict=True):
                    sums[:, keys] += share
            # sums follow their keys while the next step computes, and come home after the last
            sums_under_way = ring.start(dkv)
            kv = ring.finish(under_way) if under_way is not None else kv
        assert dq is not None
        assert sums_under_way is not None
        dkv = ring.finish(sums_under_way)
        grads = (dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype))
        return *grads, None, None, None
