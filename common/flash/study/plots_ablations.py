"""What each idea of a kernel brings, and one CTA's timeline, as pictures."""

from __future__ import annotations

from matplotlib.figure import Figure

from flash.study.sources import Source
from flash.study.style import Theme, heading, sheet
from flash.study.timeline import window

SPANS = {
    "loads K": "v1", "loads V": "fa4", "multiplies": "v3", "softmax": "v2", "drains O": "fp8",
    "rescales": "standard", "waits": "other",
}  # fmt: skip
SHOWN_CLOCKS = 12000


def ablations(source: Source, theme: Theme) -> Figure | None:
    """Speed without an idea as a share of the speed with all of them, one bar for each."""
    rows = source.parts.get("ablations", [])
    if not rows:
        return None
    groups = list(dict.fromkeys((r["version"], r["without"]) for r in rows))
    lines = len(rows) + 1.3 * len(groups)
    figure, axes = sheet(theme, 1, 1, 8.0, 1.17 + 0.24 * lines, right=0.4)
    ax = axes[0][0]
    figure.subplots_adjust(left=0.03 + 0.0085 * max(len(row["case"]) for row in rows))
    place, ticks = 0.0, []
    for version, without in groups:
        ax.text(0.005, place, f"{version} without {without}", va="center", fontweight="bold")
        for row in (r for r in rows if (r["version"], r["without"]) == (version, without)):
            place += 1
            share = row["tflops"] / row["baseline"]
            ax.barh(place, share, height=0.7, color=theme.colors[version])
            clear = 1.0 if 0.92 < share < 1 else share  # of the line at 1
            ax.text(clear + 0.012, place, f"{share:.0%}", va="center", fontsize=7.5)
            ticks.append((place, row["case"]))
        place += 1.3
    ax.set_ylim(-0.8, place - 0.5)
    ax.axvline(1, color=theme.ink, linewidth=0.8)
    ax.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    ax.invert_yaxis()
    ax.set_xlim(0, max(1.15, 1.1 * max(r["tflops"] / r["baseline"] for r in rows)))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("speed, as a share of the kernel with all of its ideas")
    heading(figure, f"What each idea brings — {source.device}", theme)
    return figure


def timeline(source: Source, theme: Theme) -> Figure | None:
    """Roles of one CTA downwards, clocks to the right."""
    rows = window(source.parts.get("timeline", []), SHOWN_CLOCKS)
    if not rows:
        return None
    roles = list(dict.fromkeys(r["role"] for r in rows))
    figure, axes = sheet(theme, 1, 1, 11.0, 0.62 + 0.55 + 0.55 * len(roles), right=0.3)
    ax = axes[0][0]
    figure.subplots_adjust(left=0.14)
    kinds = [kind for kind in SPANS if any(r["what"] == kind for r in rows)]
    for row in rows:
        ax.barh(roles.index(row["role"]), row["end"] - row["begin"], left=row["begin"], height=0.7,
                color=theme.colors[SPANS.get(row["what"], "other")], linewidth=0)  # fmt: skip
    ax.set_yticks(range(len(roles)), roles)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, SHOWN_CLOCKS)
    ax.set_xlabel("clocks")
    for n, kind in enumerate(kinds):
        ax.text(n / len(kinds), 1.02, f"■ {kind}", transform=ax.transAxes, va="bottom",
                color=theme.colors[SPANS.get(kind, "other")])  # fmt: skip
    heading(figure, f"One CTA of v3's forward kernel — {source.device}", theme)
    return figure
