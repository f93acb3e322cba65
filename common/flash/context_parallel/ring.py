"""K and V go around a ring of processes; partial attentions are merged in float32.

Rows lie in zigzag (shards.py), so a causal step against another process's keys is a full rectangle:
all our rows and the first half of its keys when it comes earlier in the ring, the second half of
our rows and all its keys when it comes later. Packed sequences are cut so one by one (packed.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flash.attention import attention, attention_backward, attention_varlen
from flash.context_parallel.shards import Group, place

Part = slice | Tensor  # of the rows held here: a slice of them, or their places


class Step(NamedTuple):
    """Which rows meet which keys, whether below the diagonal only, and where sequences end."""

    rows: Part
    keys: Part
    causal: bool
    lengths: tuple[Tensor, Tensor, int, int] | None = None  # cu_seqlens and longest, of q and of k


def step_of(own: int, source: int, causal: bool, rows: int) -> Step:
    """Process `own` against the keys of process `source`, a dense batch."""
    half, whole = slice(rows // 2, None), slice(None)
    if not causal or own == source:
        return Step(whole, whole, causal)
    return Step(whole, slice(0, rows // 2), False) if source < own else Step(half, whole, False)


class Shards(Protocol):
    """How the sequence, or the packed sequences, lie over the ring."""

    dim: int  # of the rows, in q, k and v

    def held(self, process: int) -> int: ...
    def step(self, own: int, source: int, causal: bool) -> Step: ...


class Even:
    """A dense batch, as many rows everywhere."""

    dim = 1

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def held(self, process: int) -> int:
        return self.rows

    def step(self, own: int, source: int, causal: bool) -> Step:
        return step_of(own, source, causal, self.rows)


class Ring:
    """Sends tensors to the next process and receives those of the previous one."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = place(group)
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.next = ranks[(self.rank + 1) % self.size]
        self.previous = ranks[(self.rank - 1) % self.size]

    def start(
        self, tensors: list[Tensor], dim: int, rows: int
    ) -> tuple[list[Tensor], list[Any], list[Tensor]]:
        """Begin; `rows` are to arrive, and `tensors` must not be written until `finish`."""
        sent = [x.contiguous() for x in tensors]
        arriving = [x.new_empty(*x.shape[:dim], rows, *x.shape[dim + 1 :]) for x in sent]
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
    total.lerp_(out.to(total.dtype), weight.transpose(-1, -2).unsqueeze(-1))
    stats.copy_(joined)


def take(x: Tensor, part: Part, dim: int) -> Tensor:
    """A view for a slice, a copy for places."""
    if isinstance(part, Tensor):
        return x.index_select(dim, part)
    return x[(slice(None),) * (dim % x.ndim) + (part,)]


def put(x: Tensor, part: Part, dim: int, taken: Tensor) -> None:
    """What `take` gave and was changed since; a view is there already."""
    if isinstance(part, Tensor):
        x.index_copy_(dim, part, taken)


def add(x: Tensor, part: Part, dim: int, share: Tensor) -> None:
    if isinstance(part, Tensor):
        x.index_add_(dim, part, share.to(x.dtype))
    else:
        take(x, part, dim).add_(share)


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, options: Any) -> tuple[Tensor, Tensor]:
    options = {**options, "causal": step.causal, "return_lse": True}
    if step.lengths is None:
        out, lse = attention(q, k, v, **options)
    else:
        out, lse = attention_varlen(q, k, v, *step.lengths, **options)
    return out, lse


class RingAttention(torch.autograd.Function):
    """(out, lse) of this process's rows over the keys of all."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, causal: bool, shards: Shards,
        options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ring, dim = Ring(group), shards.dim
        kv, total, stats = [k, v], None, None
        for i in range(ring.size):
            source = (ring.rank - i) % ring.size
            more = i + 1 < ring.size
            under_way = ring.start(kv, dim, shards.held(source - 1)) if more else None
            step = shards.step(ring.rank, source, causal)
            rows = take(q, step.rows, dim)
            keys, values = (take(x, step.keys, dim) for x in kv)
            out, lse = attend(rows, keys, values, step, options)
            if total is None or stats is None:  # the first step has all rows
                total, stats = _wide(out), _wide(lse)
            else:
                some, some_stats = take(total, step.rows, dim), take(stats, step.rows, -1)
                absorb(some, some_stats, out, lse)
                put(total, step.rows, dim, some)
                put(stats, step.rows, -1, some_stats)
            kv = ring.finish(under_way) if under_way is not None else kv
        assert total is not None
        assert stats is not None
        result = total.to(q.dtype), stats
        ctx.save_for_backward(q, k, v, *result)
        ctx.parts = (group, causal, shards, options)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        group, causal, shards, options = ctx.parts
        ring, dim = Ring(group), shards.dim
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        kv, dq, dkv, sums_under_way = [k, v], None, [], None
        for i in range(ring.size):
            source = (ring.rank - i) % ring.size
            under_way = ring.start(kv, dim, shards.held(source - 1)) if i + 1 < ring.size else None
            step = shards.step(ring.rank, source, causal)
            found = _share(step, dim, (dout, q, out, *kv), (lse, dlse), options)
            if dq is None or sums_under_way is None:  # the first step has all rows and keys
                dq, dkv = _wide(found[0]), [_wide(x) for x in found[1:]]
            else:
                add(dq, step.rows, dim, found[0])
                dkv = ring.finish(sums_under_way)
                for sums, share in zip(dkv, found[1:], strict=True):
                    add(sums, step.keys, dim, share)
            # sums follow their keys while the next step computes, and come home after the last
            sums_under_way = ring.start(dkv, dim, shards.held(source - 1))
            kv = ring.finish(under_way) if under_way is not None else kv
        assert dq is not None
        assert sums_under_way is not None
        dkv = ring.finish(sums_under_way)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None, None, None


def _share(
    step: Step, dim: int, saved: tuple[Tensor, ...], stats: tuple[Tensor | None, ...], options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """This step's part of the gradients."""
    dout, q, out = (take(x, step.rows, dim) for x in saved[:3])
    k, v = (take(x, step.keys, dim) for x in saved[3:5])
    lse, dlse = (None if x is None else take(x, step.rows, -1).contiguous() for x in stats)
    assert lse is not None
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    lengths: dict[str, Any] = dict(zip(names, step.lengths or (None,) * 4, strict=True))
    return attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, causal=step.causal, **lengths, **options
    )
