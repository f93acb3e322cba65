"""The ring of shared-memory stages between the producer warp and its consumers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ring(Generic[T]):
    """Stages with two barriers each, full and empty, kept as the parity bits of an mbarrier.

    A wait for phase p passes once the barrier's bit differs from p, so a fresh ring lets the
    producer pass its first wait on `empty` and stops the consumer at `full`.
    """

    def __init__(self, stages: int, loads: Iterator[T]) -> None:
        self.stages = stages
        self.loads = loads
        self.tile: list[T | None] = [None] * stages
        self.full = [0] * stages
        self.empty = [0] * stages
        self.loaded = self.taken = self.released = 0

    def position(self, count: int) -> tuple[int, int]:
        """The stage of the count-th tile and the phase of its barriers."""
        return count % self.stages, count // self.stages % 2

    def run_ahead(self) -> None:
        """The producer: loads until no stage is empty or no block is left."""
        while True:
            stage, phase = self.position(self.loaded)
            if self.empty[stage] == phase ^ 1:
                return  # the consumers still read this stage
            tile = next(self.loads, None)
            if tile is None:
                return
            self.tile[stage] = tile
            self.full[stage] ^= 1
            self.loaded += 1

    def wait(self) -> T:
        """The consumers: the next tile, once its bytes have landed."""
        self.run_ahead()
        stage, phase = self.position(self.taken)
        tile = self.tile[stage]
        if self.full[stage] == phase or tile is None:
            raise RuntimeError(f"stage {stage}, phase {phase}: the producer has no block left")
        self.taken += 1
        return tile

    def release(self) -> None:
        """The oldest tile that was taken may be overwritten."""
        stage, _ = self.position(self.released)
        if self.released == self.taken:
            raise RuntimeError(f"stage {stage} was released before it was taken")
        self.tile[stage] = None
        self.empty[stage] ^= 1
        self.released += 1
