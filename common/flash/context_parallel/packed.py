"""Packed sequences over a ring: each is cut in zigzag, so lengths may be any."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flash.context_parallel.ring import Step
from flash.context_parallel.shards import halves_of


class Packed:
    """Where the sequences' chunks lie on every process of a ring."""

    dim = 0

    def __init__(self, ends: tuple[int, ...], rings: int, device: torch.device) -> None:
        self.device = device
        cuts = [halves_of(ends, process, rings) for process in range(rings)]
        self.halves = [[(len(a), len(b)) for a, b in pairs] for pairs in cuts]

    def held(self, process: int) -> int:
        return sum(a + b for a, b in self.halves[process])

    def step(self, own: int, source: int, causal: bool) -> Step:
        """As for a dense batch, within each sequence."""
        rows, keys = self.halves[own], self.halves[source]
        whole = slice(None)
        if not causal or own == source:
            return Step(whole, whole, causal, self._lengths(_sums(rows), _sums(keys)))
        if source < own:
            early = [a for a, _ in keys]
            return Step(whole, self._places(source, 0), False, self._lengths(_sums(rows), early))
        late = [b for _, b in rows]
        return Step(self._places(own, 1), whole, False, self._lengths(late, _sums(keys)))

    def _lengths(self, rows: list[int], keys: list[int]) -> tuple[Tensor, Tensor, int, int]:
        ends = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (rows, keys)]
        longest = max(rows, default=0), max(keys, default=0)
        return ends[0].to(self.device), ends[1].to(self.device), *longest

    def _places(self, process: int, half: int) -> Tensor:
        """Of the first or the second chunk of every sequence, among the rows that are held."""
        found, begin = [torch.arange(0)], 0
        for pair in self.halves[process]:
            first = begin + (pair[0] if half else 0)
            found.append(torch.arange(first, first + pair[half]))
            begin += sum(pair)
        return torch.cat(found).to(self.device)


def _sums(halves: list[tuple[int, int]]) -> list[int]:
    return [a + b for a, b in halves]


@lru_cache(maxsize=16)
def packed(ends: tuple[int, ...], rings: int, device: torch.device) -> Packed:
    """The same for all layers of a model."""
    return Packed(ends, rings, device)
