"""How every plot looks: two themes, one colour for each competitor, lines labelled directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator


@dataclass(frozen=True)
class Theme:
    name: str
    ground: str
    ink: str
    faint: str
    colors: dict[str, str]


LIGHT = Theme("light", "#ffffff", "#1f2328", "#d5dae0", {
    "v1": "#c2600a", "v2": "#0b7f76", "v3": "#1f5fd6", "v3-keys": "#8a3fc7",
    "fp8": "#8a3fc7", "standard": "#b3261e",
    "sdpa-flash": "#6e7781", "sdpa-cudnn": "#57606a", "fa2": "#6e7781", "fa3": "#3d444d",
    "fa4": "#8c6d1f", "other": "#6e7781"})  # fmt: skip
DARK = Theme("dark", "#0d1117", "#e6edf3", "#30363d", {
    "v1": "#f0943e", "v2": "#39c5b4", "v3": "#6ea3ff", "v3-keys": "#c792ff",
    "fp8": "#c792ff", "standard": "#ff7b72",
    "sdpa-flash": "#8b949e", "sdpa-cudnn": "#a5afba", "fa2": "#8b949e", "fa3": "#c9d1d9",
    "fa4": "#d9b64a", "other": "#8b949e"})  # fmt: skip
THEMES = (LIGHT, DARK)
DASHES = {"sdpa-flash": "--", "sdpa-cudnn": ":", "fa2": "--", "fa3": "-.", "fa4": (0, (6, 2))}
LABELS = {"v1": "v1", "v2": "v2", "v3": "v3", "v3-keys": "v3, V by keys", "fp8": "v3 fp8",
          "sdpa-flash": "SDPA flash", "sdpa-cudnn": "cuDNN", "sdpa-efficient": "SDPA eff.",
          "fa2": "FA2", "fa3": "FA3", "fa4": "FA4"}  # fmt: skip
ORDER = ("v1", "v2", "v3", "v3-keys", "fp8", "fa2", "sdpa-flash", "sdpa-efficient",
         "sdpa-cudnn", "flex", "xformers", "fa3", "fa4", "torch", "standard",
         "reference")  # fmt: skip
POINTS = 8.5
HEADING_INCHES = 7.6  # the longest heading, and a device's name


class Label(NamedTuple):
    text: str
    y: float  # data coordinates
    color: str
    x: float | None = None  # where its line ends, when that is not at the right edge


def color(theme: Theme, name: str) -> str:
    return theme.colors.get(name, theme.colors["other"])


def sheet(theme: Theme, rows: int, columns: int, width: float, height: float,
          right: float = 0.9) -> tuple[Figure, Any]:  # fmt: skip
    """A figure of equal panels; `right` inches beside each are kept for labels."""
    plt.rcParams.update({
        "font.size": POINTS, "font.family": "DejaVu Sans", "text.color": theme.ink,
        "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint, "xtick.color": theme.ink,
        "ytick.color": theme.ink, "figure.facecolor": theme.ground, "axes.facecolor": theme.ground,
        "savefig.facecolor": theme.ground, "svg.fonttype": "none", "svg.hashsalt": "flash",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": theme.faint, "grid.linewidth": 0.5, "axes.axisbelow": True,
        "axes.titlesize": POINTS + 0.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    })  # fmt: skip
    width = max(width, HEADING_INCHES)
    figure, panels = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    cell = (width - 0.75 - right) / columns
    figure.subplots_adjust(
        left=0.75 / width, right=1 - right / width, top=1 - 0.62 / height, bottom=0.55 / height,
        wspace=(right + 0.3) / max(0.3, cell - right - 0.3), hspace=0.42,
    )  # fmt: skip
    return figure, panels


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest places that keep the order, this gap, and the bounds."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for before, i in zip([None, *order], order, strict=False):
        found[i] = max(found[i], low if before is None else found[before] + gap)
    ceiling = high
    for i in reversed(order):
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - gap
    return found


def label_lines(ax: Axes, labels: Sequence[Label], theme: Theme) -> None:
    """Names at the ends of lines and in their colours, moved apart where they would touch."""
    bottom, top = ax.get_ylim()
    if any(label.x is not None for label in labels) and ax.get_yscale() == "log":
        ax.set_ylim(bottom, top := top * 2)  # room for words above the end of a line
    for label in labels:
        if label.x is not None:
            ax.annotate(label.text, (label.x, label.y), (-2, 4), textcoords="offset points",
                        color=label.color, va="bottom", ha="right")  # fmt: skip
    labels = [label for label in labels if label.x is None]
    figure = ax.figure
    assert isinstance(figure, Figure)
    height = ax.get_position().height * figure.get_figheight() * 72
    to_axes = ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    places = [float(to_axes.transform(ax.transData.transform((x, label.y)))[1]) for label in labels]
    for label, place in zip(labels, spread(places, (POINTS + 1.5) / height, 0, 1), strict=True):
        ax.text(1.03, place, label.text, color=label.color, transform=ax.transAxes, va="center",
                ha="left", fontsize=POINTS, clip_on=False)  # fmt: skip
    ax.set_ylim(bottom, top)


def length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """Powers of two, written as 512, 1k, 16k."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(lengths) / 1.08, max(lengths) * 1.04)
    shown = [n for n in lengths if n.bit_count() == 1]
    shown = shown if len(shown) < 6 else shown[::2] + ([shown[-1]] if len(shown) % 2 == 0 else [])
    if len(shown) > 4 and shown[-1] == 2 * shown[-2]:
        shown.pop(-2)
    ax.set_xticks(shown, [short(n) for n in shown])
    ax.xaxis.set_minor_locator(NullLocator())


def short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def heading(figure: Figure, text: str, theme: Theme) -> None:
    height = figure.get_figheight()
    width = figure.get_figwidth()
    figure.text(0.12 / width, 1 - 0.12 / height, text, fontsize=POINTS + 2.5, fontweight="bold",
                va="top", ha="left", color=theme.ink)  # fmt: skip
