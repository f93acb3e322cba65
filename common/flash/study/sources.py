"""What a report is drawn from: every result file of a device, read into one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash.study import rows
from flash.study.cases import KEY
from flash.study.files import device_name, merge, read

Row = dict[str, Any]
PARTS = ("limits", "memory", "curves", "steps", "traffic", "ablations", "fp8", "accuracy",
         "quantizer", "timeline", "spread", "host")  # fmt: skip


@dataclass
class Source:
    """All figures of one device; a part that was not measured is empty."""

    device: str
    environment: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)  # of timed calls
    sustained: list[Row] = field(default_factory=list)
    parts: dict[str, list[Row]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def limit(self, name: str) -> float:
        """A measured ceiling, per second; 0 where there is none."""
        found = [row["rate"] for row in self.parts.get("limits", []) if row["name"] == name]
        return float(found[0]) if found else 0.0

    def ceiling(self, row: Row) -> float:
        """FLOP/s that the instructions of this row's kernel could reach here."""
        if row["dtype"] == "float8_e4m3fn" or row["competitor"] == "fp8":
            return self.limit("wgmma e4m3")
        older = row["competitor"] in ("v1", "v2", "sdpa-flash", "fa2")
        return self.limit("mma.sync" if older else "wgmma bf16") or self.limit("mma.sync")

    def share(self, row: Row) -> float | None:
        """Measured rate as a part of that ceiling."""
        ceiling = self.ceiling(row)
        return row["tflops"] * 1e12 / ceiling if ceiling else None


def paths_of(given: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in given:
        found += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return found


def collect(given: Iterable[Path]) -> list[Source]:
    """One source for each device, in order of first appearance."""
    devices: dict[str, Source] = {}
    for path in paths_of(given):
        content = read(path)
        if not isinstance(content, dict) or "environment" not in content:
            continue
        rows.check(content, path)
        name = device_name(content)
        add(devices.setdefault(name, Source(name)), path, content)
    return [source for source in devices.values() if source.rows or source.parts]


def add(source: Source, path: Path, content: Row) -> None:
    source.environment = {**content["environment"], **source.environment}
    source.files.append(path.name)
    if path.stem == "sustained":
        source.sustained += content.get("rows", [])
    else:
        for row in content.get("rows", []):
            source.rows = merge(source.rows, row, KEY)
    for part in PARTS:
        if content.get(part):
            source.parts[part] = source.parts.get(part, []) + content[part]
