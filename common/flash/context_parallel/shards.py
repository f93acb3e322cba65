"""Who holds which rows: zigzag over a ring, so that causal work is even, then split once more.

A ring of R processes cuts the sequence into 2 R chunks; process r holds chunks r and 2 R - 1 - r.
Processes that exchange heads (Ulysses) hold equal slices of those rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flash.errors import wrong_value

Group = dist.ProcessGroup | None


def place(group: Group) -> tuple[int, int]:
    """(rank, size) in a group; no group is a group of one."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


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


def shard(x: Tensor, *, ring: Group = None, ulysses: Group = None, dim: int = 1) -> Tensor:
    """This process's rows of a whole sequence along `dim`; differentiable, a copy."""
    rows = rows_of(x.shape[dim], place(ring), place(ulysses))
    return x.index_select(dim, rows.to(x.device))


def unshard(x: Tensor, *, ring: Group = None, ulysses: Group = None, dim: int = 1) -> Tensor:
    """The whole sequence from every process's rows; not differentiable."""
    x = x.detach()
    rings, parts = place(ring)[1], place(ulysses)[1]
    held = _gathered(x, ulysses)
    held = [torch.cat(_gathered(part, ring), dim) for part in held]  # by slice, then by ring
    whole = torch.empty_like(torch.cat(held, dim))
    seqlen = whole.shape[dim]
    for u, part in enumerate(held):
        rows = torch.cat([rows_of(seqlen, (r, rings), (u, parts)) for r in range(rings)])
        whole.index_copy_(dim, rows.to(x.device), part)
    return whole


def _gathered(x: Tensor, group: Group) -> list[Tensor]:
    if group is None:
        return [x]
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(place(group)[1])
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
