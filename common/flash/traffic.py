"""Bytes that a schedule moves between device memory and the chip, counted per tensor."""

from __future__ import annotations

from collections import Counter


class Traffic:
    """A byte counter: pass one to a schedule and read it afterwards."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()

    def read(self, tensor: str, nbytes: int) -> None:
        self.reads[tensor] += nbytes

    def write(self, tensor: str, nbytes: int) -> None:
        self.writes[tensor] += nbytes

    def of(self, tensor: str) -> int:
        """Bytes read and written of one tensor."""
        return self.reads[tensor] + self.writes[tensor]

    @property
    def total(self) -> int:
        return self.reads.total() + self.writes.total()

    def table(self) -> dict[str, tuple[int, int]]:
        """tensor -> (bytes read, bytes written), in order of first use."""
        names = dict.fromkeys([*self.reads, *self.writes])
        return {name: (self.reads[name], self.writes[name]) for name in names}

    def __repr__(self) -> str:
        rows = (f"{name}: {r} read, {w} written" for name, (r, w) in self.table().items())
        return f"Traffic({'; '.join(rows)})"
