"""The report: one self-contained HTML page of plots and tables, in light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from flash.study import plots, plots_ablations, plots_more
from flash.study.cases import of_row
from flash.study.files import slug
from flash.study.measure import describe
from flash.study.ratios import winners
from flash.study.sources import Source, collect
from flash.study.style import THEMES, Theme

__all__ = ["collect", "drawings", "render", "write"]

Draw = Callable[[Source, Theme], "Figure | None"]
PNG_DPI = 160
STYLE = """
:root{--ground:#fff;--ink:#1f2328;--faint:#d5dae0;--soft:#57606a}
.dark{display:none}
@media(prefers-color-scheme:dark){:root{--ground:#0d1117;--ink:#e6edf3;--faint:#30363d;
--soft:#a5afba}.dark{display:block}.light{display:none}}
body{background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
max-width:1200px;margin:2rem auto;padding:0 1rem}
img{max-width:100%;height:auto}figure{margin:1.6rem 0}
figcaption,small{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.8rem 0}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--faint);text-align:right}
th:first-child,td:first-child{text-align:left}
div.wide{overflow-x:auto}details{margin:1rem 0}
"""
CAPTIONS = {
    "speed": "Median of a burst; N(0, 1) inputs; causal counts visible pairs only; a backward pass "
             "counts 2.5 times its forward pass.",
    "error": "Relative L2 distance from attention in fp64 on the timed inputs, one head.",
    "roofline": "Ceilings as bench.limits measured them. Bytes: from ncu's count of DRAM at S = "
                "4096; what a forward pass moves there beyond every tensor once is taken to grow "
                "with the length. mma.sync is the ceiling of v1 and v2, wgmma that of v3.",
    "traffic": "Paler to darker: what the closed form counts, what the SMs asked of L2, what went "
               "to DRAM (ncu, cold L2); dotted: each tensor once. L2 answers repeated reads of Q, "
               "K and V and absorbs the additions to dQ, so v2 and v3 reach DRAM little more than "
               "once a tensor; O, m and l of v1's forward pass do not stay there. v1's backward "
               "schedule reads O and dQ at every visit, its kernel neither; SMs that read the same "
               "tile at a time share a trip.",
    "memory": "Standard attention keeps S and P; ours keep the LSE.",
    "joules": "Board power under seconds of load times time, over counted FLOPs. Less is better.",
    "losses": "Curves that lie on each other are drawn with falling widths.",
    "training": "Forward, backward and optimizer of four layers of width 1024.",
    "ablations": "Each variant is the kernel with one idea taken out, built on request.",
    "timeline": "Clock reads at role changes inside one CTA of v3's forward kernel.",
}  # fmt: skip


def plans(source: Source) -> Iterator[tuple[str, Draw]]:
    """(name, how to draw it) of every plot that this source may have data for."""
    kinds = sorted({(r["direction"] == "backward", r["dtype"]) for r in source.rows})
    for backward, dtype in kinds:
        way = "backward" if backward else "forward"
        yield f"speed_{way}_{dtype}", _bound(plots.speed, way, dtype)
        yield f"error_{way}_{dtype}", _bound(plots.errors, way, dtype)
    yield "roofline", plots_more.roofline
    yield "traffic", plots_more.traffic
    yield "memory", plots.memory
    yield "joules", plots.joules
    yield "losses", plots_more.losses
    yield "training", plots_more.training
    yield "ablations", plots_ablations.ablations
    yield "timeline", plots_ablations.timeline


def _bound(draw: Callable[..., Figure | None], way: str, dtype: str) -> Draw:
    return lambda source, theme: draw(source, theme, way, dtype)


def drawings(source: Source, kinds: Sequence[str] = ("svg",)) -> Iterator[tuple[str, str, bytes]]:
    """(name, suffix, content) of every plot in both themes: speed_forward-light, svg, ..."""
    for name, draw in plans(source):
        for theme in THEMES:
            figure = draw(source, theme)
            if figure is None:
                break
            for kind in kinds:
                yield f"{name}-{theme.name}", kind, render(figure, kind)
            plt.close(figure)


def render(figure: Figure, kind: str) -> bytes:
    """The same bytes for the same figure."""
    target = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(target, format=kind, dpi=PNG_DPI, metadata=metadata)
    return target.getvalue()


def write(sources: list[Source], out: Path, plots_folder: Path | None) -> list[Path]:
    """The page, and its plots as files where a folder is given."""
    parts, written = [], [out]
    for source in sources:
        pictures: dict[str, dict[str, bytes]] = {}
        for name, kind, content in drawings(source, ("svg", "png") if plots_folder else ("svg",)):
            stem, theme = name.rsplit("-", 1)
            if kind == "svg":
                pictures.setdefault(stem, {})[theme] = content
            if plots_folder:
                target = plots_folder / slug(source.device) / f"{name}.{kind}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                written.append(target)
        parts.append(section(source, pictures))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document(parts))
    return written


def document(parts: Iterable[str]) -> str:
    return ("<!doctype html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'><title>flash report</title>"
            f"<style>{STYLE}</style><h1>Three generations of exact attention</h1>"
            + "".join(parts) + "</html>\n")  # fmt: skip


def section(source: Source, pictures: dict[str, dict[str, bytes]]) -> str:
    parts = [f"<h2>{html.escape(source.device)}</h2>", f"<p><small>{facts(source)}</small></p>"]
    won = winners(source.device, source.rows)
    if won:
        parts += ["<h3>Which generation wins where</h3>",
                  table(("cases", "fastest", "ahead by"), [line[1:] for line in won])]  # fmt: skip
    if source.parts.get("limits"):
        parts += ["<h3>Ceilings of this GPU</h3>", ceilings(source)]
    for name, themes in pictures.items():
        images = "".join(picture(theme, content, name) for theme, content in themes.items())
        caption = CAPTIONS[name.split("_")[0]]
        parts.append(f"<figure>{images}<figcaption>{caption}</figcaption></figure>")
    if source.rows:
        parts += ["<details><summary>Every figure</summary>", every_figure(source), "</details>"]
    return "".join(parts)


def picture(theme: str, content: bytes, name: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img class={theme} alt="{name}" src="data:image/svg+xml;base64,{data}">'


def facts(source: Source) -> str:
    shown = ("driver", "power_limit_w", "max_clock_mhz", "torch", "cuda", "cudnn")
    words = [f"{name} {source.environment[name]}" for name in shown if name in source.environment]
    dates = sorted(row["date"][:10] for row in source.rows if "date" in row)
    words += ["measured " + " to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    return html.escape(", ".join(words))


def ceilings(source: Source) -> str:
    rows = []
    for limit in source.parts["limits"]:
        share = limit.get("per_clock_and_processor")
        rows.append((limit["name"], f"{limit['rate']:.4g} {limit['unit']}",
                     "–" if share is None else f"{share:.4g}",
                     f"{limit['clock_mhz']}" if share else "–"))  # fmt: skip
    return table(("unit", "rate", "per clock and SM", "SM MHz"), rows)


def every_figure(source: Source) -> str:
    rows = []
    for row in source.rows:
        share = source.share(row)
        rows.append((describe(of_row(row)), row["competitor"], f"{row['tflops']:.4g}",
                     "–" if share is None else f"{share:.0%}", f"{row['ms']:.4f}",
                     "–" if row.get("error") is None else f"{row['error']:.1e}"))  # fmt: skip
    head = ("case", "backend", "TFLOP/s", "of its ceiling", "ms", "error")
    return f"<div class=wide>{table(head, rows)}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}" for name in head)]
    lines += ["<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows]
    return f"<table>{''.join(lines)}</table>"
