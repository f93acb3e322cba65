"""Who holds which rows: zigzag over a ring, so that causal work is even, then split once more.

A ring of R processes cuts the sequence into 2 R chunks; process r holds chunks r and 2 R - 1 - r.
Of packed sequences, each is cut so, into chunks of any size. Processes that exchange heads
(Ulysses) hold equal slices of those rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from flash.checks import check_kind
from flash.errors import wrong_type, wrong_value

Group = dist.ProcessGroup | None


def place(group: Group, name: str = "group") -> tuple[int, int]:
    """(rank, size) in a group; no group is a group of one."""
    if group is None:
        return 0, 1
    if not isinstance(group, dist.ProcessGroup):
        hint = "of torch.distributed.new_group on one of its processes, or mesh.get_group()"
        raise wrong_type(name, group, "a process group or None", hint)
    return dist.get_rank(group), dist.get_world_size(group)


def places(ring: Group, ulysses: Group) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both, as arguments of a call."""
    return place(ring, "ring"), place(ulysses, "ulysses")


def _check_rows(x: Any, dim: Any) -> None:
    """A tensor, and a dim that it has."""
    check_kind("x", x)
    if type(dim) is not int:
        raise wrong_type("dim", dim, "an int")
    if not -x.ndim <= dim < x.ndim:
        raise wrong_value("dim", dim, f"a dim of x, which has {x.ndim}")


def rows_of(seqlen: int, ring: tuple[int, int], ulysses: tuple[int, int]) -> Tensor:
    """Places, in the whole sequence, of the rows that a process holds."""
    (r, rings), (u, parts) = ring, ulysses
    chunks = 2 * rings if rings > 1 else 1
    if seqlen % (chunks * parts):
        hint = "pad the sequence"
        raise wrong_value("seqlen", seqlen, f"a multiple of {chunks * parts}", hint)
    places = torch.arange(seqlen).chunk(chunks) if seqlen else (torch.arange(0),) * chunks
    held = places[0] if rings == 1 else torch.cat([places[r], places[2 * rings - 1 - r]])
    return held.chunk(parts)[u] if seqlen else held


def ends_of(cu_seqlens: Any) -> tuple[int, ...]:
    """Cumulative lengths on the host; a tensor of a GPU is waited for."""
    if not isinstance(cu_seqlens, (Tensor, list, tuple)):
        raise wrong_type("cu_seqlens", cu_seqlens, "a list or a tensor of ints")
    ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if isinstance(ends, int) or not all(type(end) is int for end in ends):
        raise wrong_value("cu_seqlens", ends, "ints, one for each end")
    if not ends or ends[0] != 0 or any(a > b for a, b in pairwise(ends)):
        raise wrong_value("cu_seqlens", ends[:8], "0, then the end of every sequence")
    return tuple(ends)


def halves_of(ends: tuple[int, ...], process: int, rings: int) -> list[tuple[range, range]]:
    """Of each packed sequence the places of the two chunks that a process of the ring holds."""
    found = []
    for begin, end in pairwise(ends):
        cuts = [begin + (end - begin) * i // (2 * rings) for i in range(2 * rings + 1)]
        late = 2 * rings - 1 - process
        found.append((range(cuts[process], cuts[process + 1]), range(cuts[late], cuts[late + 1])))
    return found


def packed_rows_of(
    ends: tuple[int, ...], ring: tuple[int, int], ulysses: tuple[int, int]
) -> Tensor:
    """rows_of for packed sequences."""
    (r, rings), (u, parts) = ring, ulysses
    if rings == 1:
        held = torch.arange(ends[-1])
    else:
        halves = [torch.arange(x.start, x.stop) for pair in halves_of(ends, r, rings) for x in pair]
        held = torch.cat(halves) if halves else torch.arange(0)
    if len(held) % parts:
        hint = f"add a last sequence of padding; process {r} of the ring holds {len(held)} rows"
        raise wrong_value("rows", len(held), f"a multiple of the {parts} of ulysses", hint)
    return held.chunk(parts)[u] if len(held) else held


def _rows(seqlen: int, cu_seqlens: Any, ring: tuple[int, int], ulysses: tuple[int, int]) -> Tensor:
    if cu_seqlens is None:
        return rows_of(seqlen, ring, ulysses)
    ends = ends_of(cu_seqlens)
    if ends[-1] != seqlen:
        raise wrong_value("cu_seqlens[-1]", ends[-1], f"the number of rows, {seqlen}")
    return packed_rows_of(ends, ring, ulysses)


def shard(
    x: Tensor, *, ring: Group = None, ulysses: Group = None, dim: int = 1, cu_seqlens: Any = None
) -> Tensor:
    """This process's rows of a whole sequence along `dim`; differentiable, a copy.

    With `cu_seqlens`, of packed sequences, usually along dim 0.
    """
    _check_rows(x, dim)
    rows = _rows(x.shape[dim], cu_seqlens, *places(ring, ulysses))
    return x.index_select(dim, rows.to(x.device))


def unshard(
    x: Tensor, *, ring: Group = None, ulysses: Group = None, dim: int = 1, cu_seqlens: Any = None
) -> Tensor:
    """The whole sequence from every process's rows; not differentiable."""
    _check_rows(x, dim)
    x = x.detach()
    (rank, rings), (part, parts) = places(ring, ulysses)
    if cu_seqlens is None:
        seqlen = x.shape[dim] * rings * parts
    else:
        cu_seqlens = ends_of(cu_seqlens)
        seqlen = cu_seqlens[-1]
    held_by = [
        [_rows(seqlen, cu_seqlens, (r, rings), (u, parts)) for r in range(rings)]
        for u in range(parts)
    ]
    if x.shape[dim] != len(held_by[part][rank]):
        expected = f"{len(held_by[part][rank])}, this process's share by cu_seqlens"
        raise wrong_value(f"rows of x along dim {dim}", x.shape[dim], expected)
    slices = _gathered(x, ulysses, [x.shape[dim]] * parts, dim)
    whole = x.new_empty(*x.shape[:dim], seqlen, *x.shape[dim % x.ndim + 1 :])
    for held, rows in zip(slices, held_by, strict=True):
        for piece, where in zip(
            _gathered(held, ring, [len(n) for n in rows], dim), rows, strict=True
        ):
            whole.index_copy_(dim, where.to(x.device), piece)
    return whole


def _gathered(x: Tensor, group: Group, rows: list[int], dim: int) -> list[Tensor]:
    """What every process of the group holds, `rows` of it along `dim`."""
    if group is None:
        return [x]
    most = max(rows)
    fill = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, most - x.shape[dim]]
    sent = pad(x, fill).contiguous()  # as some backends gather equal parts only
    parts = [torch.empty_like(sent) for _ in rows]
    dist.all_gather(parts, sent, group=group)
    return [part.narrow(dim, 0, n) for part, n in zip(parts, rows, strict=True)]
