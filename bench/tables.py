"""Writes the tables of README.md and of bench/results/<gpu>/README.md; nobody writes them by hand.

`python -m bench.tables` rewrites them from the capability table and the recorded results, and draws
the plots again where these have changed; `python -m bench.tables --check` only says what is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import ages, breadth, plots, proof_tables, record, study_tables, sweep_tables
from bench.digest import ROOT, instances
from bench.study_tables import markdown
from flash.study.sources import Source, collect

ORDER = ("v1", "v2", "v3", "v3-keys", "fp8", "sdpa-flash", "sdpa-cudnn", "fa3", "fa4")
OVERVIEW_SEQLEN = 8192
FP8_SEQLENS = (512, 1024, 8192, 32768, 131072)
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "e4m3"}
Row = dict[str, Any]


def support() -> str:
    """What every generation serves, one line per row of the capability table."""
    import flash

    rows = []
    for name, table in flash.capabilities().items():
        if name in ("torch", "reference"):
            continue
        for row in table.rows:
            dims = [", ".join(_dims(row.dims(way))) or "–" for way in ("forward", "backward")]
            where = row.where() + _reservation(name, row.dtypes)
            rows.append((f"`{name}`", where, ", ".join(row.dtypes), *dims))
    columns = ("backend", "compute capability", "dtypes", "head dims forward", "backward")
    features = [
        f"- `{name}`: {', '.join(table.features)}" for name, table in flash.capabilities().items()
    ]
    note = (
        "Head dims are those compiled; any multiple of 8 up to the largest is padded on chip, not "
        "of float8. `torch` and `reference` take all of these and float64, on every device."
    )
    return "\n".join([markdown(columns, rows), "", note, "", *features])


def _reservation(version: str, dtypes: Sequence[str]) -> str:
    """What a row of the table cannot promise yet."""
    for unproven, text in ((False, ""), (True, "; unproven, built with `FLASH_UNPROVEN=1`")):
        kernels = instances(version, unproven=unproven).values()
        if {i.split(":")[0] for names in kernels for i in names} & {SHORT[d] for d in dtypes}:
            return text
    return "; no kernel yet, schedule only"


def _dims(pairs: Iterable[tuple[int, int]]) -> list[str]:
    return [str(d) if d == dv else f"({d}, {dv})" for d, dv in pairs]


def folders(results: Path) -> list[Path]:
    return sorted(path for path in results.glob("*") if any(path.glob("*.json")))


def speeds(content: Row, seqlens: Sequence[int] = ()) -> str:
    """TFLOP/s of every competitor, one line per head dim, mask and length."""
    rows: list[Row] = [r for r in content["rows"] if not seqlens or r["seqlen"] in seqlens]
    names = [name for name in ORDER if any(row["competitor"] == name for row in rows)]
    cases = sorted({(r["head_dim"], r["mask"] != "full", r["seqlen"]) for r in rows})
    lines = []
    for dim, causal, seqlen in cases:
        mask = "causal" if causal else "full"
        cells = {
            r["competitor"]: f"{r['tflops']:.0f}"
            for r in rows
            if (r["head_dim"], r["mask"], r["seqlen"]) == (dim, mask, seqlen)
        }
        lines.append((dim, mask, seqlen, *(cells.get(name, "–") for name in names)))
    return markdown(("d", "mask", "S", *names), lines)


def worst_errors(content: Row) -> str:
    worst: dict[str, float] = {}
    for row in content["rows"]:
        name = row["competitor"]
        worst[name] = max(worst.get(name, 0.0), row["error"])
    shown = ", ".join(f"{name} {worst[name]:.1e}" for name in ORDER if name in worst)
    return f"Largest relative L2 error against fp64: {shown}."


def heading(content: Row) -> str:
    e = content["environment"]
    parts = [e["gpu"], f"driver {e.get('driver', '?')}", f"torch {e['torch']}", f"CUDA {e['cuda']}",
             f"cuDNN {e['cudnn']}"]  # fmt: skip
    return f"{', '.join(parts)}; {dates(content['rows'])}."


def dates(rows: Iterable[Row]) -> str:
    """The day, or the first and the last."""
    found = sorted({row["date"][:10] for row in rows})
    return " to ".join(dict.fromkeys((found[0], found[-1])))


def title(path: Path) -> str:
    direction, dtype = path.stem.split("_", 1)
    return f"{direction.capitalize()}, {dtype}, TFLOP/s"


def overview(results: Path) -> str:
    """The README's share: one length per head dim and mask; the rest stands beside the data."""
    parts = []
    for version, entry in sorted(record.pending(results).items()):
        parts += [f"**`{version}` has not passed its GPU tests with its present sources** "
                  f"({entry['digest']}): {entry['why']}", ""]  # fmt: skip
    for folder in folders(results):
        link = f"bench/results/{folder.name}"
        for path in speed_files(folder):
            content = record.read(path)
            if any(row["seqlen"] == OVERVIEW_SEQLEN for row in content["rows"]):
                parts += [f"**{title(path)}** — {heading(content)}", "",
                          speeds(content, [OVERVIEW_SEQLEN]), "",
                          worst_errors(content), ""]  # fmt: skip
        if speed_files(folder):
            parts += ["16384 tokens, 2048 / d heads, N(0, 1), median of a burst.", ""]
        for drawn in study_tables.pictures(folder, f"{link}/plots", ("speed",)):
            parts += [drawn, ""]
        parts += [proof_tables.summary(folder), ""]
        parts += [f"GPU tests, all lengths and the raw data: [{link}]({link}/README.md)."]
    return "\n".join(parts) or "Nothing has been measured yet."


def source_of(folder: Path) -> Source | None:
    """Everything that was measured on this folder's GPU."""
    found = collect(sorted(folder.glob("*.json")))
    return found[0] if found else None


def evolution(results: Path) -> str:
    """What changed from v1 to v3 and what it brought, for each GPU."""
    parts = []
    for folder in folders(results):
        source = source_of(folder)
        if source is None or not (source.rows or source.parts.get("traffic")):
            continue
        parts += [f"On one {source.device}, bf16, d = 128, full, S = 8192 (DRAM: S = 4096), "
                  "TFLOP/s and share of what its tensor-core instruction gives at most:", "",
                  study_tables.generations(source), ""]  # fmt: skip
        table = study_tables.officials(source)
        if table:
            parts += ["Speed over that of the official kernel of its generation in the same race, "
                      "bf16, all masks and lengths (geometric means):", "", table, ""]  # fmt: skip
        drawn = study_tables.pictures(folder, f"bench/results/{folder.name}/plots",
                                      ("roofline", "ablations", "traffic", "training"))  # fmt: skip
        parts += [line for one in drawn for line in (one, "")]
    return "\n".join(parts).rstrip() or "Nothing has been measured yet."


def traced(results: Path) -> str:
    """For the page of v3: one CTA's timeline, as seen from a version's folder."""
    parts = []
    for folder in folders(results):
        source = source_of(folder)
        drawn = study_tables.pictures(
            folder, f"../bench/results/{folder.name}/plots", ("timeline",)
        )
        if source is not None and source.parts.get("timeline") and drawn:
            parts += [*drawn, "", study_tables.roles(source), ""]
    return "\n".join(parts).rstrip() or "Nothing has been recorded yet."


def broad(results: Path, way: str) -> str:
    """For the page of v3: one direction off the papers' sweep."""
    parts = []
    for folder in folders(results):
        content = record.read(folder / "breadth.json")
        found = breadth.by_question(content.get("breadth", []))
        rows = [row for (asked, _), part in found.items() if asked == way for row in part]
        if rows:
            where = f"{content['environment']['gpu']}, {dates(rows)}"
            command = f"`python -m bench.breadth --direction {way}`"
            parts += [f"{where}, {command}:", "", breadth.table(rows), ""]
    return "\n".join(parts).rstrip() or "Nothing has been recorded yet."


def fp8(results: Path) -> str:
    """For the README: errors at d = 128 by who shares a scale."""
    parts = []
    for folder in folders(results):
        source = source_of(folder)
        rows = source.parts.get("accuracy", []) if source else []
        if source and rows:
            few = [r for r in rows if r["head_dim"] == 128 and r["seqlen"] in FP8_SEQLENS]
            table = study_tables.fp8_errors(Source(source.device, parts={"accuracy": few}))
            parts += [f"On one {source.device}:", "", table, ""]
    return "\n".join(parts).rstrip() or "Nothing has been measured yet."


def for_each_gpu(results: Path, make: Callable[[Path], str]) -> str:
    """A sentence for each GPU; with its name where there are several."""
    found = folders(results)
    texts = [make(folder) if len(found) == 1 else f"{folder.name}: {make(folder)}"
             for folder in found]  # fmt: skip
    return "\n\n".join(texts) or "Nothing has been recorded yet."


def speed_files(folder: Path) -> list[Path]:
    return [
        path for way in ("forward", "backward") for path in sorted(folder.glob(f"{way}_*.json"))
    ]


def page(folder: Path) -> str:
    """bench/results/<gpu>/README.md."""
    parts = [f"# {folder.name}", "", "Written by `python -m bench.tables` from the files here."]
    for heading_text, table in proof_tables.sections(folder):
        parts += ["", f"## {heading_text}", "", table]
    parts += ["", "## Of which kernels each file speaks", "", ages.table(folder)]
    for path in speed_files(folder):
        content = record.read(path)
        parts += ["", f"## {title(path)}", "", heading(content), "", speeds(content), "",
                  worst_errors(content)]  # fmt: skip
    sustained = record.read(folder / "sustained.json")
    if sustained.get("rows"):
        parts += ["", "## Under seconds of load, S = 8192", "", load_table(sustained)]
    source = source_of(folder)
    for heading_text, table in study_tables.sections(source) if source else ():
        parts += ["", f"## {heading_text}", "", table]
    drawn = study_tables.pictures(folder, "plots")
    parts += ["", "## Pictures", ""] if drawn else []
    parts += ["\n\n".join(drawn)] if drawn else []
    return "\n".join(parts) + "\n"


def load_table(content: Row) -> str:
    columns = ("direction", "d", "backend", "TFLOP/s", "SM MHz", "W", "J per call")
    rows = []
    for row in content["rows"]:
        cells = [row["direction"], row["head_dim"], row["competitor"], f"{row['tflops']:.0f}"]
        for name, digits in (("clock_mhz", 0), ("power_w", 0), ("joules", 3)):
            cells.append(f"{row[name]:.{digits}f}" if name in row else "–")
        rows.append(cells)
    return markdown(columns, rows)


def filled(text: str, results: Path) -> str:
    """README text with the content between its markers replaced."""
    tables = {
        "support": support,
        "results": lambda: overview(results),
        "ages": lambda: for_each_gpu(results, ages.sentence),
        "reached": lambda: for_each_gpu(results, proof_tables.reached),
        "evolution": lambda: evolution(results),
        "timeline": lambda: traced(results),
        "fp8": lambda: fp8(results),
        **sweep_tables.makers(lambda make: for_each_gpu(results, make)),
        "breadth": lambda: broad(results, "forward"),
        "breadth_backward": lambda: broad(results, "backward"),
    }

    def put(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", put, text, flags=re.S)


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """Every generated page and what it should hold."""
    results = root / "bench" / "results"
    own = [root / "README.md", root / "v3_hopper" / "README.md"]
    pages = {folder / "README.md": page(folder) for folder in folders(results)}
    return {**{path: filled(path.read_text(), results) for path in own}, **pages}


def stale(root: Path = ROOT) -> list[Path]:
    pages = wanted(root).items()
    return [path for path, text in pages if not path.is_file() or path.read_text() != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    if parser.parse_args().check:
        old = [*plots.stale(), *stale()]
        print("\n".join(f"stale: {path}" for path in old) or "tables: up to date")
        return int(bool(old))
    if plots.stale():
        plots.draw_all()
    for path, text in wanted().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
