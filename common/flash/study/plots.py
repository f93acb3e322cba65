"""Speed, error, memory and energy as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flash.study.facts import picojoules, regular
from flash.study.sources import Row, Source
from flash.study.style import (
    DASHES,
    LABELS,
    ORDER,
    Label,
    Theme,
    color,
    heading,
    label_lines,
    length_axis,
    sheet,
)

Panel = tuple[Any, ...]
MAX_DIMS = 4


def names_of(rows: Iterable[Row]) -> list[str]:
    present = {row["competitor"] for row in rows}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def lines(ax: Axes, rows: list[Row], field: str, theme: Theme, scale: float = 1.0) -> list[Label]:
    """One line for each competitor over the lengths; returns the labels of their ends."""
    labels, longest = [], max((row["seqlen"] for row in rows), default=0)
    for name in names_of(rows):
        own = sorted((r["seqlen"], r[field] * scale) for r in rows
                     if r["competitor"] == name and r.get(field))  # fmt: skip
        if not own:
            continue
        ours = name in ("v1", "v2", "v3", "v3-keys", "fp8", "standard")
        ax.plot(*zip(*own, strict=True), DASHES.get(name, "-"), color=color(theme, name),
                linewidth=2 if ours else 1.3, marker="o", markersize=3.4 if ours else 2.4,
                zorder=3 if ours else 2)  # fmt: skip
        end, value = own[-1]
        early = None if end == longest else float(end)
        beyond = {r.get("why") for r in rows if r["competitor"] == name and r["seqlen"] > end}
        text = LABELS.get(name, name) + (
            ", then\nout of memory" if "out of memory" in beyond else ""
        )
        labels.append(Label(text, value, color(theme, name), early))
    return labels


def panels_of(rows: list[Row]) -> tuple[list[int], list[str]]:
    """Head dims and masks that have more than one length."""
    lengths: dict[tuple[int, str], set[int]] = {}
    for row in rows:
        lengths.setdefault((row["head_dim"], row["mask"]), set()).add(row["seqlen"])
    good = [key for key, found in lengths.items() if len(found) > 1]
    masks = [mask for mask in ("full", "causal") if any(mask == m for _, m in good)]
    return sorted({dim for dim, _ in good})[:MAX_DIMS], masks


def grid(
    source: Source, rows: list[Row], theme: Theme, title: str, unit: str, field: str,
    finish: Callable[[Axes], None],
) -> Figure | None:  # fmt: skip
    """Panels by head dim and mask with one line for each competitor."""
    dims, masks = panels_of(rows)
    if not dims:
        return None
    figure, axes = sheet(
        theme, len(masks), len(dims), 3.7 * len(dims) + 0.6, 2.75 * len(masks) + 0.5
    )
    every = [row["seqlen"] for row in rows if row["head_dim"] in dims]
    for i, mask in enumerate(masks):
        for j, dim in enumerate(dims):
            ax = axes[i][j]
            own = [row for row in rows if (row["head_dim"], row["mask"]) == (dim, mask)]
            found = lines(ax, own, field, theme)
            length_axis(ax, sorted(set(every)))
            finish(ax)
            ax.set_title(f"d = {dim}, {mask}")
            if j == 0:
                ax.set_ylabel(unit)
            if i == len(masks) - 1:
                ax.set_xlabel("sequence length")
            label_lines(ax, found, theme)
    heading(figure, f"{title} — {source.device}", theme)
    return figure


def speed(source: Source, theme: Theme, direction: str, dtype: str) -> Figure | None:
    rows = [r for r in regular(source.rows) if r["direction"] == direction and r["dtype"] == dtype
            and r.get("ran", "kernel") != "schedule"]  # fmt: skip
    top = max((r["tflops"] for r in rows), default=1) * 1.08
    title = f"{direction.capitalize()} speed, {dtype}"
    return grid(source, rows, theme, title, "TFLOP/s", "tflops", lambda ax: _from_zero(ax, top))


def _from_zero(ax: Axes, top: float) -> None:
    ax.set_ylim(0, top)


def errors(source: Source, theme: Theme, direction: str, dtype: str) -> Figure | None:
    rows = [r for r in regular(source.rows) if r["direction"] == direction and r["dtype"] == dtype
            and r.get("error")]  # fmt: skip
    if not rows:
        return None
    low, high = (f(r["error"] for r in rows) for f in (min, max))
    title = f"{direction.capitalize()} error against fp64, {dtype}"

    def finish(ax: Axes) -> None:
        ax.set_ylim(0, high * 1.15) if high < 5 * low else ax.set_yscale("log")
        if high < 5 * low:  # no common factor above the axis, where the heading is
            ax.yaxis.set_major_formatter("{x:g}")

    return grid(source, rows, theme, title, "relative L2 error", "error", finish)


def memory(source: Source, theme: Theme) -> Figure | None:
    """Peak memory of one forward and backward pass, standard attention beside."""
    rows = source.parts.get("memory", [])
    good = [row for row in rows if row.get("memory_bytes")]
    if not good:
        return None
    figure, axes = sheet(theme, 1, 1, 6.6, 3.9, right=1.5)
    ax = axes[0][0]
    found = lines(ax, rows, "memory_bytes", theme, 1 / 2**20)
    length_axis(ax, sorted({row["seqlen"] for row in rows}))
    ax.set_yscale("log")
    ax.set_ylabel("MiB beyond the inputs")
    ax.set_xlabel("sequence length")
    label_lines(ax, together(found, theme), theme)
    first = good[0]
    heading(figure, f"Memory of forward and backward, {first['heads']} heads of "
            f"{first['head_dim']}, causal — {source.device}", theme)  # fmt: skip
    return figure


def together(labels: list[Label], theme: Theme) -> list[Label]:
    """One label for lines that end within 3 % of each other."""
    found: list[Label] = []
    for label in labels:
        near = next((i for i, other in enumerate(found) if other.x == label.x
                     and abs(other.y - label.y) <= 0.03 * label.y), None)  # fmt: skip
        if near is None:
            found.append(label)
        else:
            other = found[near]
            found[near] = Label(f"{other.text}, {label.text}", other.y, theme.ink, label.x)
    return found


def joules(source: Source, theme: Theme) -> Figure | None:
    """Energy of a call under seconds of load, as picojoules per FLOP: less is better."""
    rows = [r for r in source.sustained if r.get("joules")]
    rows += [{**r, **{n: r[f"sustained_{n}"] for n in ("joules", "tflops", "ms")}}
             for r in source.rows if r.get("sustained_joules")]  # fmt: skip
    rows = [r for r in regular(rows) if r["mask"] == "full"]
    if not rows:
        return None
    ways = [way for way in ("forward", "backward") if any(r["direction"] == way for r in rows)]
    dims, names = sorted({r["head_dim"] for r in rows}), names_of(rows)[::-1]
    width, height = 3.1 * len(dims) + 1.4, (0.27 * len(names) + 0.95) * len(ways) + 0.4
    figure, axes = sheet(theme, len(ways), len(dims), width, height, right=0.25)
    figure.subplots_adjust(left=1.05 / width, hspace=0.62)
    cost = {(r["direction"], r["head_dim"], r["competitor"]): picojoules(r) for r in rows}
    for i, way in enumerate(ways):
        for j, dim in enumerate(dims):
            ax = axes[i][j]
            values = [cost.get((way, dim, name), 0.0) for name in names]
            ax.barh(range(len(names)), values, 0.66, color=[color(theme, n) for n in names])
            for place, value in enumerate(values):
                ax.text(value + 0.02 * max(cost.values()), place, f"{value:.2f}" if value else "–",
                        va="center", fontsize=7.5)  # fmt: skip
            ax.set_yticks(range(len(names)), [LABELS.get(n, n) for n in names] if j == 0 else [])
            ax.set_xlim(0, 1.18 * max(cost.values()))
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.grid(axis="y", visible=False)
            ax.set_title(f"{way}, d = {dim}")
            if i == len(ways) - 1:
                ax.set_xlabel("pJ per FLOP")
    heading(figure, f"Energy under seconds of load, S = 8192 — {source.device}", theme)
    return figure
