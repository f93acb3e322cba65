"""Memory that tells: guard bands of NaN around all that a call allocates, poison around its inputs.

Every byte of a guard is 0xFF, which is NaN in fp8, fp16, bf16, fp32 and -1 in integers; the same
bytes prefill the memory itself, so what a kernel forgets to write shows as NaN too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from grid import DEVICE, Inputs
from torch import Tensor

from flash.engines import prepared

GUARD = 1 << 13  # bytes on each side; a multiple of every alignment a kernel asks for
POISON = 0xFF


class Guards:
    """Stands in for what allocates results and remembers what it gave out."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.plain = torch.empty

    def empty(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None,
              **rest: Any) -> Tensor:  # fmt: skip
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if rest or dtype is None:
            return self.plain(shape, dtype=dtype, device=device, **rest)
        return self.memory(math.prod(shape), dtype, device).view(shape)

    def strided(self, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        """Without gaps, in any order of the dims."""
        return self.memory(math.prod(shape), dtype, DEVICE).as_strided(shape, strides)

    def memory(self, count: int, dtype: torch.dtype, device: Any) -> Tensor:
        nbytes = count * dtype.itemsize
        buffer = torch.full((nbytes + 2 * GUARD,), POISON, dtype=torch.uint8, device=device)
        self.buffers.append((buffer, nbytes))
        return buffer[GUARD : GUARD + nbytes].view(dtype)

    def check(self) -> None:
        for number, (buffer, nbytes) in enumerate(self.buffers):
            for side, band in (("before", buffer[:GUARD]), ("behind", buffer[GUARD + nbytes :])):
                touched = (band != POISON).nonzero()
                assert not len(touched), (
                    f"{len(touched)} bytes written {side} allocation {number} of {nbytes} bytes"
                )


@contextmanager
def guarded(monkeypatch: Any) -> Iterator[Guards]:
    """Within, results lie in guarded memory; on leaving, the bands are checked."""
    guards = Guards()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guards.empty)
        patch.setattr(prepared, "new", guards.strided)
        yield guards
    assert guards.buffers, "the call allocated nothing that could be guarded"
    guards.check()


def surrounded(x: Tensor, rows: int = 3, heads: int = 1, dim: int = 8) -> Tensor:
    """The values of (batch, rows, heads, dim) amid NaN: before, behind and in every gap."""
    batch, n, h, d = x.shape
    size = (batch + 2, n + 2 * rows, h + 2 * heads, d + 2 * dim)
    wide = torch.full(size, float("nan"), dtype=x.dtype, device=x.device)
    view = wide[1 : batch + 1, rows : rows + n, heads : heads + h, dim : dim + d]
    view.copy_(x)
    return view


def poisoned(given: Inputs, seen: Tensor) -> Inputs:
    """All inputs amid NaN, and NaN in every key and value that no row sees."""
    hide = ~seen.any(0)[None, :, None, None]
    k, v = (x.masked_fill(hide, float("nan")) for x in (given.k, given.v))
    q, k, v, dout = (surrounded(x) for x in (given.q, k, v, given.dout))
    return Inputs(q, k, v, dout, given.dlse)


def cumulative(lengths: list[int]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
