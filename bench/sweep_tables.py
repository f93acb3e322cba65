"""v3 beside its peers over the papers' sweep, as its page tells it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench import record
from bench.study_tables import markdown

NOTHING = "Nothing has been recorded yet."
FILES = ("forward_bfloat16", "backward_bfloat16", "forward_float8_e4m3fn")
NAMES = {"fa3": "FA3", "sdpa-cudnn": "cuDNN"}
FA3_FP8 = Path(__file__).with_name("fa3_fp8.json")
Shape = tuple[int, str, int]  # head dim, mask, length
Speeds = dict[str, float]  # of each competitor


def by_shape(path: Path) -> dict[Shape, Speeds]:
    found: dict[Shape, Speeds] = {}
    for row in record.read(path).get("rows", []):
        key = (row["head_dim"], row["mask"], row["seqlen"])
        found.setdefault(key, {})[row["competitor"]] = row["tflops"]
    return {key: found[key] for key in sorted(found, key=lambda k: (k[0], k[1] != "full", k[2]))}


def beside(folder: Path, name: str) -> str:
    """TFLOP/s of v3 and its peers, one row for each head dim and mask; the best in bold."""
    shapes = by_shape(folder / f"{name}.json")
    peers = by_shape_of_fa3() if name.endswith("e4m3fn") else shapes
    ratios: dict[Shape, float] = {}
    cells: dict[Shape, str] = {}
    for shape, speeds in shapes.items():
        others = {n: peers[shape][n] for n in NAMES if n in peers.get(shape, {})}
        if "v3" not in speeds or not others:
            continue
        ratios[shape] = speeds["v3"] / max(others.values())
        best = max(speeds["v3"], *others.values())
        told = [f"{NAMES[n]} {in_bold(value, best)}" for n, value in others.items()]
        cells[shape] = f"{in_bold(speeds['v3'], best)} ({', '.join(told)})"
    if not cells:
        return NOTHING
    lengths = sorted({length for _, _, length in cells})
    rows = [(dim, mask, *(cells.get((dim, mask, length), "–") for length in lengths))
            for dim, mask in dict.fromkeys((dim, mask) for dim, mask, _ in cells)]  # fmt: skip
    first, *more = (str(length) for length in lengths)
    return "\n\n".join((markdown(("d", "mask", f"S = {first}", *more), rows), verdict(ratios)))


def makers(for_each_gpu: Callable[[Callable[[Path], str]], str]) -> dict[str, Callable[[], str]]:
    """Name of a file, and of its place on the page -> what makes the table."""
    return {name: partial(for_each_gpu, partial(beside, name=name)) for name in FILES}


def by_shape_of_fa3() -> dict[Shape, Speeds]:
    """Of FlashAttention-3 in FP8, which the build that runs beside these kernels lacks."""
    rows: list[dict[str, Any]] = record.read(FA3_FP8)["rows"]
    return {(row["head_dim"], row["mask"], row["seqlen"]): {"fa3": row["tflops"]} for row in rows}


def in_bold(speed: float, best: float) -> str:
    return f"**{speed:.0f}**" if speed == best else f"{speed:.0f}"


def verdict(ratios: dict[Shape, float]) -> str:
    """The geometric means, the lowest shape, and how many are below 1."""
    means = ", ".join(f"{mean(r for s, r in ratios.items() if s[0] == dim):.2f} at d = {dim}"
                      for dim in dict.fromkeys(shape[0] for shape in ratios))  # fmt: skip
    (dim, mask, length), lowest = min(ratios.items(), key=lambda item: item[1])
    below = [shape for shape, ratio in ratios.items() if ratio < 1]
    count = f"{len(below) or 'none'} of {len(ratios)} shapes below 1.00"
    return (f"Geometric mean of the ratios to the best peer {mean(ratios.values()):.3f} ({means}), "
            f"lowest {lowest:.3f} (d = {dim}, {mask}, S = {length}); {count}.")  # fmt: skip


def mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)
