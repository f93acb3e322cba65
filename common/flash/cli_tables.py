"""What the command line prints, as rich tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flash.capability import VERSIONS, capability
from flash.demo import Line, Setting
from flash.doctor import OK, PROBLEM, Finding
from flash.options import make_spec
from flash.picture import census, picture
from flash.study.files import device_name
from flash.study.ratios import Comparison
from flash.tiles import Tile
from flash.verify import Outcome

MARKS = {OK: Text("ok", "green"), PROBLEM: Text("problem", "bold red")}


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}"


def count(number: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000 or unit == " T":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Numbers to the right, words to the left."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        words = name[:1].islower() or name == ""
        made.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    return made


def doctor(findings: list[Finding]) -> RenderableType:
    rows = []
    for finding in findings:
        text = finding.text + (f"\n-> {finding.remedy}" if finding.remedy else "")
        rows.append((finding.subject, MARKS.get(finding.state, Text(finding.state)), text))
    return table("flash doctor", ("what", "state", "found"), rows)


def demo(setting: Setting, lines: list[Line], exact_flops: int) -> RenderableType:
    columns = ("backend", "direction", "ran as", "Rel. error", "HBM traffic", "FLOPs", "Memory")
    timed = any(line.ms is not None for line in lines)
    rows = []
    for line in lines:
        row = [line.name, line.direction, line.ran, f"{line.error:.2e}", size(line.hbm_bytes),
               count(line.flops), size(line.memory)]  # fmt: skip
        if timed:
            row.append("" if line.ms is None else f"{line.ms:.3f}")
        rows.append(row)
    notes = (
        "Error: relative L2 against attention in fp64 (backward: the worst of dQ, dK, dV). "
        "HBM traffic: bytes between device memory and the chip, counted tile by tile.\n"
        f"FLOPs: of the tiles that are computed; {count(exact_flops)} would do for the visible "
        "pairs of one forward pass. Memory: allocated beyond the inputs."
    )
    if not timed:
        notes += (" Without a GPU the generations run as schedules: the same tiles in plain "
                  "PyTorch, so their time says nothing.")  # fmt: skip
    shown = (*columns, "Time ms") if timed else columns
    return Group(table(setting.describe(), shown, rows), Text(notes, "dim"))


def pictures(setting: Setting) -> RenderableType:
    """The mask by tiles, as each generation cuts it."""
    panels = []
    for version in reversed(VERSIONS):
        tile = Tile(*importlib.import_module(f"flash.{version}.schedule").TILE)
        drawn = picture(setting.spec(), setting.seqlen, setting.seqlen, tile, limit=24)
        tiles = census(setting.spec(), setting.seqlen, setting.seqlen, tile)
        share = tiles.pairs_visible / max(1, tiles.pairs_computed)
        panels.append(Panel(f"{drawn}\n{share:.0%} of the computed pairs are visible",
                            title=version, expand=False))  # fmt: skip
    return Columns(panels)


def verify(
    device: str, dtype: str, outcomes: list[Outcome], planned: int, left_out: dict[str, str]
) -> RenderableType:
    rows = []
    for backend in dict.fromkeys(outcome.backend for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.backend == backend]
        worst = max(own, key=lambda outcome: outcome.share)
        passed = sum(outcome.passed for outcome in own)
        mark = Text("ok", "green") if passed == len(own) else Text("WRONG", "bold red")
        rows.append((backend, mark, own[0].ran, f"{passed}/{len(own)}", f"{worst.share:.2f}",
                     f"{worst.check} ({worst.detail})"))  # fmt: skip
    columns = ("backend", "state", "ran as", "Passed", "Worst / allowed", "worst check")
    notes = [f"{name}: left out: {why}" for name, why in left_out.items()]
    if len(outcomes) < planned:
        notes.append(f"stopped for time after {len(outcomes)} of {planned} checks")
    wrong = [f"{o.backend}: {o.check}: {o.detail}" for o in outcomes if not o.passed]
    title = f"flash verify on {device}, {dtype}: errors against twice PyTorch's, both against fp64"
    return Group(table(title, columns, rows), *map(Text, [*notes, *wrong]))


def accuracy(rows: Sequence[dict[str, Any]], device: str) -> RenderableType:
    """Errors of FP8 by who shares a scale."""
    from flash.study.accuracy import COLUMNS, lines

    ran = "v3's kernels" if device == "cuda" else "v3's schedule in plain PyTorch"
    notes = (
        f"RMSE of O, and its share of O, by {ran}, against fp64 of the inputs before they are "
        "quantized. outliers: N(0,1) + N(0,100) x Bernoulli(0.001). turned: random signs and a "
        "Hadamard matrix. head: one scale per head, as FlashAttention-3's kernel takes."
    )
    shown = [(c if c == "inputs" else c[:1].upper() + c[1:]) for c in COLUMNS]
    return Group(table("flash compare --fp8", shown, lines(rows)), Text(notes, "dim"))


def mask_picture(inputs: list[Any], options: dict[str, Any]) -> str:
    """The mask of an explained call, by the tile of the newest generation that has one for it."""
    q, k, v = inputs
    spec = make_spec(options["causal"], options["window"], None, 0.0, False, q.shape[-1])
    for version in VERSIONS:
        tile = capability(version).tile(
            "forward", q.shape[-1], v.shape[-1], q.shape[1], q.shape[:3].numel(),
            full=spec.left is None and spec.right is None,
        )  # fmt: skip
        if tile is not None:
            cut = Tile(tile.block_q, tile.block_kv)
            return f"{version}:\n{picture(spec, q.shape[1], k.shape[1], cut)}"
    return ""


BENCH_COLUMNS = {
    "TFLOP/s": "tflops", "Of ceiling": "share", "Time ms": "ms", "P10": "ms_p10", "P90": "ms_p90",
    "Error": "error", "Memory": "memory_bytes", "MHz": "clock_mhz", "W": "power_w",
    "Calls": "calls", "Sustained": "sustained_tflops", "J": "sustained_joules",
    "Sust. MHz": "sustained_clock_mhz", "Sust. W": "sustained_power_w",
}  # fmt: skip
FIRST_COLUMNS = ("TFLOP/s", "Of ceiling", "Time ms", "P10", "P90", "Error", "Memory", "MHz", "W")
FORMS = {"tflops": ".4g", "share": ".0%", "sustained_tflops": ".4g", "ms": ".4f", "ms_p10": ".4f",
         "ms_p90": ".4f", "error": ".1e", "sustained_joules": ".3g"}  # fmt: skip


def bench_columns(asked: str) -> list[str] | str:
    """The columns to show, or what is wrong with those asked for."""
    if not asked:
        return [*FIRST_COLUMNS, "Sustained", "J"]
    if asked == "all":
        return list(BENCH_COLUMNS)
    by_field = {field: title for title, field in BENCH_COLUMNS.items()}
    found = [by_field.get(name, name) for name in asked.split(",")]
    unknown = [name for name in found if name not in BENCH_COLUMNS]
    if unknown:
        return f"--columns: no {unknown[0]!r}; of {', '.join(by_field)}"
    return found


def cell(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return "–"
    if field == "memory_bytes":
        return size(value)
    return format(value, FORMS.get(field, "")) if field in FORMS else str(value)


def bench(content: dict[str, Any], shown: Sequence[str]) -> RenderableType:
    from flash.study.cases import of_row
    from flash.study.measure import describe

    rows = content["rows"]
    shown = [t for t in shown if any(BENCH_COLUMNS[t] in row for row in rows)]
    lines, last = [], ""
    for row in rows:
        case = describe(of_row(row))
        cells = [cell(row, BENCH_COLUMNS[title]) for title in shown]
        lines.append(["" if case == last else case, row["competitor"], row["ran"], *cells])
        last = case
    notes = [f"left out: {r['competitor']}, {describe(of_row(r))}: {r['why']}"
             for r in content["skipped"]]  # fmt: skip
    notes.append("Error: relative L2 against fp64 on the timed inputs, one head. Time: a burst.")
    if any(row["ran"] == "schedule" for row in rows):
        notes.append("A schedule is the algorithm in plain PyTorch: its time says nothing.")
    title = f"flash bench on {device_name(content)}"
    return Group(table(title, ("case", "backend", "ran as", *shown), lines),
                 Text("\n".join(notes), "dim"))  # fmt: skip


STYLES = {"slower": "bold red", "faster": "green", "same": "", "modelled": "dim"}


def comparison(found: Comparison) -> RenderableType:
    rows = [(Text(line[0], STYLES[line[0]]), *line[1:]) for line in found.lines()]
    a, b = found.names
    sides = (name[:1].upper() + name[1:] for name in (a, b))
    head = ("verdict", "case", "backend", *sides, "Ratio", "95 %")
    parts: list[RenderableType] = [table(found.summary(), head, rows)]
    if found.winners:
        columns = ("device", "cases", "fastest generation", "ahead by")
        parts.append(table("Which generation wins where", columns, found.winners))
    parts.append(Text("Ratio: time before over time after, above 1 is faster.", "dim"))
    return Group(*parts)
