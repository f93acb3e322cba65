"""How old each study is: which of its figures are of the kernels as they are now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import digest, record
from bench.study_tables import markdown
from flash.study.competitors import SOURCES

Row = dict[str, Any]
PRESENT, EARLIER, BOTH, UNKNOWN = "present", "earlier", "some earlier", "not recorded"
NAMES = {
    "ablations": "ablations", "backward_bfloat16": "backward speed", "breadth": "breadth",
    "context_parallel": "context parallelism", "dram": "DRAM bytes", "end_to_end": "training",
    "forward_bfloat16": "forward speed", "forward_float8_e4m3fn": "FP8 speed",
    "fp8": "errors of FP8", "host": "host time", "limits": "ceilings", "memory": "memory",
    "repeat": "repeated runs", "sanitizer": "sanitizer", "sustained": "sustained load",
    "tests": "GPU tests", "timeline": "timeline",
}  # fmt: skip
USES: dict[str, tuple[str, ...]] = {  # of what a file's sources say, where it is less than all
    "limits": (), "timeline": ("v3_hopper",), "fp8": ("v3_hopper",),
}  # fmt: skip
PROOFS = ("tests", "sanitizer", "repeat")  # bench.proof_tables says what these have reached


def rows_of(content: Row) -> Iterator[Row]:
    yield from content.get("versions", {}).values()
    for part in content.values():
        if isinstance(part, list):
            yield from (row for row in part if isinstance(row, dict))


def sources(content: Row) -> dict[str, set[str]]:
    """Version -> the sources its figures are of: by row where rows say so, else by file."""
    found: dict[str, set[str]] = {}
    for name, run in content.get("versions", {}).items():
        found.setdefault(name, set()).add(run["digest"])
    for row in rows_of(content):
        version = row.get("version") or SOURCES.get(row.get("competitor", ""))
        if version and row.get("digest"):
            found.setdefault(version, set()).add(row["digest"])
    return found or {name: {value} for name, value in (content.get("digests") or {}).items()}


def verdict(found: set[str] | None, version: str) -> str:
    if not found:
        return "–"
    now = digest.digest(version)
    return PRESENT if found == {now} else BOTH if now in found else EARLIER


def dates(content: Row) -> str:
    """When the figures were measured, in UTC to the minute; or the first day and the last."""
    times = {row["date"] for row in rows_of(content) if row.get("date")}
    times = times or {content.get("date", "")}
    first, last = min(times), max(times)
    return (
        last[:16].replace("T", " ") if first[:10] == last[:10] else f"{first[:10]} to {last[:10]}"
    )


def studies(folder: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(file, when, version -> verdict) of every file of evidence."""
    for path in sorted(folder.glob("*.json")):
        content = record.read(path)
        found = sources(content)
        used = USES.get(path.stem, digest.VERSIONS)
        verdicts = {
            version: "–" if version not in used
            else verdict(found.get(version), version) if found else UNKNOWN
            for version in digest.VERSIONS
        }  # fmt: skip
        yield path.stem, dates(content), verdicts


def table(folder: Path) -> str:
    columns = ("", "measured (UTC)", *(f"`{version}`" for version in digest.VERSIONS))
    lines = [(NAMES.get(name, name), when, *verdicts.values())
             for name, when, verdicts in studies(folder)]  # fmt: skip
    return markdown(columns, lines) + (
        "\n\npresent: measured with the kernels as they are now. earlier: a source has changed "
        "since, in whatever kernel of the version. –: none of its kernels runs there."
    )


def sentence(folder: Path) -> str:
    """For the README: what is of the present kernels, and what is not."""
    fresh, old = [], []
    for name, when, verdicts in studies(folder):
        whose = [v for v, kind in verdicts.items() if kind not in ("–", PRESENT)]
        if name in PROOFS or set(verdicts.values()) == {"–"}:
            continue
        if whose:
            partly = f": {', '.join(whose)}" if PRESENT in verdicts.values() else ""
            old.append(f"{NAMES.get(name, name)} ({when}{partly})")
        else:
            fresh.append(NAMES.get(name, name))
    if not old:
        return "Every figure is of the kernels as they are now."
    parts = [f"Of the kernels as they are now: {', '.join(fresh)}."] if fresh else []
    return " ".join([*parts, f"Of earlier ones: {', '.join(old)}."])
