"""Spans of one CTA's roles: as a Perfetto file, in words, and cut to what a picture can show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CLOCKS_PER_US = 1000  # Perfetto counts time: a clock is shown as a nanosecond


def perfetto(rows: Sequence[Row]) -> Row:
    """Chrome's trace format, which ui.perfetto.dev opens; one track for each role."""
    roles = list(dict.fromkeys(row["role"] for row in rows))
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": n, "args": {"name": role}}
             for n, role in enumerate(roles)]  # fmt: skip
    events = [{"name": row["what"], "ph": "X", "pid": 0, "tid": roles.index(row["role"]),
               "ts": row["begin"] / CLOCKS_PER_US,
               "dur": (row["end"] - row["begin"]) / CLOCKS_PER_US} for row in rows]  # fmt: skip
    return {"displayTimeUnit": "ns", "traceEvents": [*names, *events],
            "otherData": {"unit": "one nanosecond is one SM clock"}}  # fmt: skip


def write_perfetto(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(perfetto(rows)) + "\n")


def summary(rows: Sequence[Row]) -> str:
    """Share of its own time that each role spends on each thing."""
    lines = []
    for role in dict.fromkeys(row["role"] for row in rows):
        own = [row for row in rows if row["role"] == role]
        total = max(r["end"] for r in own) - min(r["begin"] for r in own)
        parts = [
            f"{what} {sum(r['end'] - r['begin'] for r in own if r['what'] == what) / total:.0%}"
            for what in dict.fromkeys(r["what"] for r in own)
        ]
        lines.append(f"{role}: {', '.join(parts)} of {total} clocks")
    return "\n".join(lines)


def window(rows: Sequence[Row], clocks: int) -> list[Row]:
    """The spans of this many clocks from the middle, counted from there."""
    if not rows:
        return []
    last = max(row["end"] for row in rows)
    begin = max(0, (last - clocks) // 2)
    return [
        {**row, "begin": max(0, row["begin"] - begin), "end": min(clocks, row["end"] - begin)}
        for row in rows
        if row["end"] > begin and row["begin"] < begin + clocks
    ]
