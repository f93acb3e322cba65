"""The tables of what was proven on a GPU: tests, sanitizer, the same bits every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from bench import digest, record, repeat
from bench.sanitize import TOOLS
from bench.study_tables import markdown

Row = dict[str, Any]
CODES = {"fp16": 0, "bf16": 1, "fp32": 2, "e4m3": 3}


def tested(folder: Path) -> str:
    versions = record.read(folder / "tests.json").get("versions", {})
    lines = [
        (f"`{name}`", found["passed"], found["failed"], found["digest"], found["date"][:10])
        for name, found in sorted(versions.items())
    ]
    table = markdown(("version", "passed", "failed", "sources", "date"), lines)
    notes = [f"`{name}`: {row['note']}" for name, row in versions.items() if "note" in row]
    return "\n\n".join([table, *notes]) if lines else ""


def sanitized(folder: Path) -> str:
    """One line for each version and direction, one column for each tool."""
    rows: list[Row] = record.read(folder / "sanitizer.json").get("sanitizer", [])
    tools = sorted({row["tool"] for row in rows})
    lines = []
    for version, way in sorted({(row["version"], row["direction"]) for row in rows}):
        own = {r["tool"]: r for r in rows if (r["version"], r["direction"]) == (version, way)}
        found = max(own.values(), key=lambda row: row["date"])
        earlier = {t for t, row in own.items() if row["digest"] != found["digest"]}
        cells = [verdict(own[t]) + " (of earlier sources)" * (t in earlier) if t in own else "–"
                 for t in tools]  # fmt: skip
        lines.append((f"`{version}`", way, len(found["kernels"]), *cells, found["digest"],
                      found["date"][:10]))  # fmt: skip
    columns = ("version", "direction", "kernels", *tools, "sources", "date")
    return markdown(columns, lines) + note(folder) if lines else ""


def verdict(row: Row) -> str:
    if "why" in row:
        return str(row["why"])
    errors, warnings = row["errors"], row["warnings"]
    return f"{errors} errors, {warnings} warnings" if errors or warnings else "clean"


def note(folder: Path) -> str:
    """What racecheck was given in the place of a kernel, and why."""
    content = record.read(folder / "sanitizer.json")
    copies = [row for row in content.get("sanitizer", []) if row.get("without")]
    if not copies:
        return ""
    where = ", ".join(sorted(f"{r['version']} {r['direction']} {r['tool']}" for r in copies))
    found = ", ".join(f"{name}: {n}" for name, n in content["probe"].items())
    return (f"\n\n{where} saw copies that differ in two idioms which the tools do not follow "
            "(`bench/every_lane.py` says why they are right); reports on each idiom alone, "
            f"`bench/race_probe.cu`: {found}.")  # fmt: skip


def repeated(folder: Path) -> str:
    """One line for each version and direction: how many runs, how many of them differed, and of
    what shapes."""
    rows: list[Row] = record.read(folder / "repeat.json").get("repeat", [])
    lines: list[tuple[object, ...]] = []
    shapes: dict[str, list[str]] = {}  # name -> who ran it
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = row["version"], row["name"].split()[0], row["digest"]
        groups.setdefault(key, []).append(row)
    for (version, way, sources), own in sorted(groups.items()):
        names = list(dict.fromkeys(row["shape"] for row in own))
        lines.append((f"`{version}`", way, len({row["name"] for row in own}), len(names),
                      min(row["runs"] for row in own), sum(row["differing"] for row in own),
                      sources, max(row["date"] for row in own)[:10]))  # fmt: skip
        for name in names:
            shapes.setdefault(name, []).append(f"{version} {way}")
    columns = ("version", "direction", "kernels", "shapes", "runs of each", "runs that differ",
               "sources", "date")  # fmt: skip
    return markdown(columns, lines) + shapes_of(shapes) if lines else ""


def shapes_of(shapes: dict[str, list[str]]) -> str:
    """Which shapes were replayed: those of all, and the others with who ran them."""
    most = max(len(set(names)) for names in shapes.values())
    each = [name + ("" if len(set(by)) == most else f" ({', '.join(sorted(set(by)))} only)")
            for name, by in shapes.items()]  # fmt: skip
    return "\n\nShapes (rows, or rows x keys): " + "; ".join(each) + "."


def sections(folder: Path) -> list[tuple[str, str]]:
    """(heading, table) of each proof that there is."""
    found = (
        ("GPU tests", tested(folder)),
        ("compute-sanitizer, every kernel on small shapes, `python -m bench.sanitize`",
         sanitized(folder)),
        ("The same bits at every run, backward deterministic, `python -m bench.repeat`",
         repeated(folder)),
    )  # fmt: skip
    return [(heading, table) for heading, table in found if table]


def listed(version: str) -> set[tuple[int, ...]]:
    """(direction, dtype code, head dim, head dim of V) of every kernel in CMakeLists.txt."""
    rows: set[tuple[int, ...]] = set()
    for direction, names in digest.instances(version).items():
        for name in names:
            dtype, dim, *dim_v = name.split(":")
            value = int(dim_v[0]) if dim_v else int(dim)
            rows.add((int(direction == "backward"), CODES[dtype], int(dim), value))
    return rows


def current(folder: Path, file: str, part: str, version: str) -> list[Row]:
    """Recorded rows of a version's present sources."""
    now = digest.digest(version)
    return [row for row in record.read(folder / file).get(part, [])
            if row["version"] == version and row["digest"] == now]  # fmt: skip


def seen_by(folder: Path, tool: str, version: str) -> set[tuple[int, ...]]:
    """Kernels of the present sources that ran under this tool, to the end."""
    rows = current(folder, "sanitizer.json", "sanitizer", version)
    return {tuple(k) for r in rows for k in r["kernels"] if r["tool"] == tool and "why" not in r}


def replayed(folder: Path, version: str) -> set[tuple[int, ...]]:
    """Kernels of the present sources that were replayed as often as is asked."""
    runs: Counter[tuple[int, ...]] = Counter()
    for row in current(folder, "repeat.json", "repeat", version):
        runs[tuple(row["kernel"])] += row["runs"]
    forward = repeat.FORWARD.get(version, repeat.OTHERS)
    return {k for k, count in runs.items() if count >= (repeat.OTHERS if k[0] else forward)}


def gaps(folder: Path, tools: tuple[str, ...]) -> list[str]:
    """Kernels of the present sources that a proof has not reached."""
    found = []
    for version in digest.VERSIONS:
        every = listed(version)
        found += [(f"{tool} {version}", len(every - seen_by(folder, tool, version)))
                  for tool in tools]  # fmt: skip
        found.append((f"repeated runs {version}", len(every - replayed(folder, version))))
    return [f"{what} {count} kernels" for what, count in found if count]


def reached(folder: Path, tools: tuple[str, ...] = TOOLS) -> str:
    """The README's limits: of which kernels, as they are now, there are proofs."""
    parts = []
    for what, verb, how, seen in (
        ("compute-sanitizer", "has", f" with all its {len(tools)} tools to the end",
         lambda v: set.intersection(*(seen_by(folder, tool, v) for tool in tools))),
        ("The thousands of repeated runs", "have", "", lambda v: replayed(folder, v)),
    ):  # fmt: skip
        counts = {v: (len(seen(v) & listed(v)), len(listed(v))) for v in digest.VERSIONS}
        whole = [f"`{v}`" for v, (some, every) in counts.items() if some == every]
        partly = [f"{some or 'none'} of {every} of `{v}`" for v, (some, every) in counts.items()
                  if some < every]  # fmt: skip
        every_one = [f"every kernel of {' and '.join(whole)}"] if whole else []
        kernels = ", ".join([*every_one, *partly])
        parts.append(f"{what} {verb} seen {kernels} as they are now{how}.")
        for version in (v for v, (some, every) in counts.items() if how and some < every):
            ended = [tool for tool in tools if listed(version) <= seen_by(folder, tool, version)]
            parts += [f"Of `{version}`, all by {', '.join(ended)}."] if ended else []
    return " ".join(parts)


def summary(folder: Path, tools: tuple[str, ...] = TOOLS) -> str:
    """The README's line: what stands behind the kernels on this GPU."""
    parts = []
    versions = record.read(folder / "tests.json").get("versions", {})
    if versions:
        passed = ", ".join(f"{n} {v['passed']}" for n, v in sorted(versions.items()))
        parts.append(f"GPU tests passed: {passed}.")
    rows = record.read(folder / "sanitizer.json").get("sanitizer", [])
    if rows:
        used = ", ".join(sorted({row["tool"] for row in rows}))
        present = [r for r in rows if r["digest"] == digest.digest(r["version"])]
        odd = [r for r in present if verdict(r) != "clean"]
        said = "; ".join(f"{r['version']} {r['direction']} {r['tool']}: {verdict(r)}" for r in odd)
        parts.append(
            f"compute-sanitizer ({used}): {said or 'clean' if present else 'of earlier sources'}."
        )
    rows = record.read(folder / "repeat.json").get("repeat", [])
    if rows:
        parts.append(f"{sum(r['runs'] for r in rows):,} repeated runs of {len(rows)} kernels and "
                     f"shapes: {sum(r['differing'] for r in rows)} differ in any bit.")  # fmt: skip
    if any((folder / name).is_file() for name in ("sanitizer.json", "repeat.json")):
        missing = gaps(folder, tools)
        parts += [f"Not reached on the present sources: {'; '.join(missing)}."] if missing else []
    return " ".join(parts)
