"""v3 beside its peers over the papers' sweep, as its page tells it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import record
from bench.study_tables import LABELS, OFFICIAL, markdown
from flash.study.facts import by_case
from flash.study.ratios import geomean

NOTHING = "Nothing has been recorded yet."
FILES = ("forward_bfloat16", "backward_bfloat16", "forward_float8_e4m3fn")
BY_KEYS = "forward_float8_keys"  # the table of FP8 with V's keys contiguous
Shape = tuple[int, str, int]  # head dim, mask, length


def makers(for_each_gpu: Callable[[Callable[[Path], str]], str]) -> dict[str, Callable[[], str]]:
    """Name of a file, and of its place on the page -> what makes the table."""
    made: dict[str, Callable[[], str]] = {
        name: partial(for_each_gpu, partial(beside, name=name)) for name in FILES
    }
    made[BY_KEYS] = partial(for_each_gpu, partial(beside, name=FILES[-1], ours="v3-keys"))
    return made


def beside(folder: Path, name: str, ours: str = "v3") -> str:
    """TFLOP/s of ours and its peers, one row for each head dim and mask; the best in bold."""
    shapes = by_case(record.read(folder / f"{name}.json").get("rows", []))
    ratios: dict[Shape, float] = {}
    cells: dict[Shape, str] = {}
    for shape in sorted(shapes, key=lambda shape: (shape[0], shape[1] != "full", shape[2])):
        peers = {n: shapes[shape][n] for n in OFFICIAL["v3"] if n in shapes[shape]}
        if ours not in shapes[shape] or not peers:
            continue
        speed, best_peer = shapes[shape][ours], max(peers.values())
        ratios[shape] = speed / best_peer
        best = max(speed, best_peer)
        told = [f"{LABELS[n]} {in_bold(peers[n], best)}" for n in peers]
        cells[shape] = f"{in_bold(speed, best)} ({', '.join(told)})"
    if not cells:
        return NOTHING
    lengths = sorted({length for _, _, length in cells})
    rows = [(dim, mask, *(cells.get((dim, mask, length), "–") for length in lengths))
            for dim, mask in dict.fromkeys((dim, mask) for dim, mask, _ in cells)]  # fmt: skip
    first, *more = (str(length) for length in lengths)
    return "\n\n".join((markdown(("d", "mask", f"S = {first}", *more), rows), verdict(ratios)))


def in_bold(speed: float, best: float) -> str:
    return f"**{speed:.0f}**" if speed == best else f"{speed:.0f}"


def verdict(ratios: dict[Shape, float]) -> str:
    """The geometric means, the lowest shape, and how many are below 1."""
    means = ", ".join(f"{geomean(r for s, r in ratios.items() if s[0] == dim):.2f} at d = {dim}"
                      for dim in dict.fromkeys(shape[0] for shape in ratios))  # fmt: skip
    (dim, mask, length), lowest = min(ratios.items(), key=lambda item: item[1])
    below = sum(ratio < 1 for ratio in ratios.values())
    return (f"Geometric mean of the ratios to the best peer {geomean(ratios.values()):.3f} "
            f"({means}), lowest {lowest:.3f} (d = {dim}, {mask}, S = {length}); "
            f"{below or 'none'} of {len(ratios)} shapes below 1.00.")  # fmt: skip
