"""Roofline, traffic, training and ablations as pictures."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from flash.study.cases import of_row
from flash.study.facts import apart
from flash.study.modelled import least_bytes
from flash.study.plots import lines, names_of, together
from flash.study.sources import Row, Source
from flash.study.style import LABELS, Label, Theme, color, heading, label_lines, length_axis, sheet

GIGA = 1e9


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("direction", "dtype", "head_dim", "mask", "competitor"))


def intensity(source: Source, row: Row) -> float:
    """FLOPs per DRAM byte: from ncu's count at another length of as many tokens, else the least.

    What a forward pass moves beyond each tensor once (v1's O, m and l) grows with the length; what
    a backward pass moves beyond that (the sums of dQ in fp32) does not.
    """
    case = of_row(row)
    for counted in source.parts.get("traffic", []):
        if key(counted) == key(row):
            other = of_row(counted)
            once = least_bytes(other)
            beyond = counted["dram_read"] + counted["dram_write"] - once
            if case.direction == "forward":
                beyond *= case.seqlen / other.seqlen
            tokens = case.batch * case.seqlen / (other.batch * other.seqlen)
            return float(case.flops / ((once + beyond) * tokens))
    return case.flops / least_bytes(case)


def roofline(source: Source, theme: Theme) -> Figure | None:
    """The three generations under the measured ceilings of this GPU."""
    roofs = [(name, source.limit(name) / 1e12) for name in ("wgmma bf16", "mma.sync")]
    roofs = [(name, rate) for name, rate in roofs if rate]
    bandwidth = source.limit("memory read") / 1e12
    rows = [r for r in source.rows if r["competitor"] in ("v1", "v2", "v3") and
            r["dtype"] == "bfloat16" and r["mask"] == "full" and r["head_dim"] in (64, 128)
            and r["seqlen"] in (512, 2048, 8192)]  # fmt: skip
    if not roofs or not bandwidth or not rows:
        return None
    figure, axes = sheet(theme, 1, 2, 11.0, 4.2, right=1.05)
    for ax, direction in zip(axes[0], ("forward", "backward"), strict=True):
        own = [r for r in rows if r["direction"] == direction]
        points = [(intensity(source, r), r["tflops"], r) for r in own]
        left, right = 30, max((x for x, *_ in points), default=1e3) * 1.6
        for _, rate in roofs:
            ax.plot([rate / bandwidth, right], [rate, rate], color=theme.ink, linewidth=1)
        top = max(rate for _, rate in roofs)
        ax.plot([left, top / bandwidth], [left * bandwidth, top], color=theme.ink, linewidth=1)
        for name in names_of(own):
            for dim, marker in ((64, "o"), (128, "s")):
                line = sorted((x, y) for x, y, r in points
                              if (r["competitor"], r["head_dim"]) == (name, dim))  # fmt: skip
                if line:
                    ax.plot(*zip(*line, strict=True), marker=marker, markersize=5, linewidth=1,
                            color=color(theme, name))  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(left, right)
        ax.set_ylim(100, top * 1.25)
        ax.set_yticks([100, 200, 400, 800], ["100", "200", "400", "800"])
        ax.minorticks_off()
        pairs = sorted({(r["competitor"], r["head_dim"]) for _, _, r in points})
        ends = [max((x, y, r) for x, y, r in points if (r["competitor"], r["head_dim"]) == pair)
                for pair in pairs]  # fmt: skip
        found = [Label(f"{r['competitor']} d{r['head_dim']}", y, color(theme, r["competitor"]))
                 for _, y, r in ends]  # fmt: skip
        found += [Label(name, rate, theme.ink) for name, rate in roofs]
        label_lines(ax, found, theme)
        ax.set_title(f"{direction}, full, S = 512, 2048, 8192")
        ax.set_xlabel("FLOP per DRAM byte")
    axes[0][0].set_ylabel("TFLOP/s")
    heading(figure, f"Roofline with measured ceilings — {source.device}", theme)
    return figure


def traffic(source: Source, theme: Theme) -> Figure | None:
    """Closed form, bytes that reach L2, bytes that reach memory, each tensor once."""
    rows = source.parts.get("traffic", [])
    if not rows:
        return None
    cases = list(dict.fromkeys((r["direction"], r["head_dim"], r["mask"]) for r in rows))
    cases = [c for c in cases if c[2] == "full"] or cases
    figure, axes = sheet(theme, 1, len(cases), 2.6 * len(cases) + 1.2, 3.9, right=0.2)
    kinds = (("closed form", 0.35), ("L2, measured", 0.65), ("DRAM, measured", 1.0))
    for ax, case in zip(axes[0], cases, strict=True):
        own = [r for r in rows if (r["direction"], r["head_dim"], r["mask"]) == case]
        names = names_of(own)
        for i, name in enumerate(names):
            row = next(r for r in own if r["competitor"] == name)
            l2 = sum(row[n] for n in ("l2_read", "l2_write", "l2_reduce"))
            values = (row.get("closed_form") or 0, l2, row["dram_read"] + row["dram_write"])
            for j, ((_, strength), value) in enumerate(zip(kinds, values, strict=True)):
                place = i + (j - 1) * 0.27
                ax.bar(place, value / GIGA, 0.25, color=color(theme, name), alpha=strength)
                ax.text(place, value / GIGA, f" {value / GIGA:.2g}", rotation=90, fontsize=7,
                        ha="center", va="bottom")  # fmt: skip
        least = own[0]["least"] / GIGA
        ax.axhline(least, color=theme.ink, linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(names)), [LABELS.get(n, n) for n in names])
        ax.set_ylim(0, ax.get_ylim()[1] * 1.22)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{case[0]}, d = {case[1]}")
        ax.set_xlabel("closed form, L2, DRAM")
    axes[0][0].set_ylabel("GB")
    heading(figure, f"Bytes moved, S = {rows[0]['seqlen']} — {source.device}", theme)
    return figure


def losses(source: Source, theme: Theme) -> Figure | None:
    """Loss curves of the same training with each attention, and how far they are apart."""
    rows = [r for r in source.parts.get("curves", []) if r.get("losses")]
    models = list(dict.fromkeys(r["model"] for r in rows))
    if not models:
        return None
    figure, axes = sheet(theme, 1, len(models), 4.6 * len(models) + 0.4, 3.4, right=1.5)
    for ax, model in zip(axes[0], models, strict=True):
        own = [r for r in rows if r["model"] == model]
        found = []
        for n, name in enumerate(names_of(own)):
            curve = next(r["losses"] for r in own if r["competitor"] == name)
            ax.plot(range(1, len(curve) + 1), curve, color=color(theme, name),
                    linewidth=5.5 - 1.5 * n, solid_capstyle="round")  # fmt: skip
            found.append(Label(LABELS.get(name, name), curve[-1], color(theme, name)))
        ax.set_title(f"{model}: at most {apart(own):.2%} apart")
        ax.set_xlabel("step")
        label_lines(ax, together(found, theme), theme)
    axes[0][0].set_ylabel("loss")
    heading(figure, f"Training with each attention, same weights and data — {source.device}", theme)
    return figure


def training(source: Source, theme: Theme) -> Figure | None:
    """Step time and memory against length; a line ends where memory does."""
    rows = source.parts.get("steps", [])
    models = list(dict.fromkeys(r["model"] for r in rows))
    if not models:
        return None
    figure, axes = sheet(theme, 2, len(models), 4.6 * len(models) + 0.4, 5.6, right=1.5)
    fields = (("ms", "ms a step", 1.0), ("memory_bytes", "GiB at the peak", 2.0**-30))
    for j, model in enumerate(models):
        own = [r for r in rows if r["model"] == model]
        for i, (name, unit, scale) in enumerate(fields):
            ax = axes[i][j]
            found = lines(ax, own, name, theme, scale)
            length_axis(ax, sorted({r["seqlen"] for r in own}))
            ax.set_yscale("log")
            ax.set_ylabel(unit)
            ax.set_title(model if i == 0 else "")
            label_lines(ax, together(found, theme), theme)
        axes[1][j].set_xlabel("sequence length, batch of one")
    heading(figure, f"A training step of four layers — {source.device}", theme)
    return figure
