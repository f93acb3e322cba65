"""Result files: JSON, an environment block, one row a line, merged by key, written at once."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("flash-generations", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "triton",
            "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # fmt: skip
Row = dict[str, Any]


def slug(gpu: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200": a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def environment(board: dict[str, Any], device: str = "cuda") -> Row:
    """Everything about this machine that a figure depends on."""
    import torch

    common = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device != "cuda":
        return {"device": processor(), "threads": torch.get_num_threads(), **common}
    props = torch.cuda.get_device_properties(0)
    return {
        "gpu": props.name,
        "compute_capability": f"{props.major}.{props.minor}",
        "multiprocessors": props.multi_processor_count,
        **board,
        **common,
        "cudnn": torch.backends.cudnn.version(),
    }


def device_name(content: Row) -> str:
    """The GPU, or the CPU, that a file speaks of."""
    found = content.get("environment", {})
    return str(found.get("gpu") or found.get("device") or "unknown device")


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"model name\s*: (.*)", text)
    return match[1] if match else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(path: Path) -> Row:
    if not path.is_file():
        return {}
    found: Row = json.loads(path.read_text())
    return found


def text_of(content: Row) -> str:
    """One row a line, so that a diff shows what moved."""
    rows = content.get("rows")
    head = {k: v for k, v in content.items() if k != "rows"}
    text = json.dumps(head, indent=1)
    if rows is not None:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        before = f"{text[:-2]}," if head else "{"
        text = f'{before}\n "rows": [\n  {lines}\n ]\n}}'
    return text + "\n"


def write(path: Path, content: Row) -> None:
    """Written beside the file and renamed over it: an interrupted run loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text_of(content))
    os.replace(draft, path)


def merge(rows: Iterable[Row], new: Row, key: tuple[str, ...]) -> list[Row]:
    """`rows` with `new` in the place of the row of the same key."""
    wanted = tuple(new.get(name) for name in key)
    kept = [row for row in rows if tuple(row.get(name) for name in key) != wanted]
    return sorted([*kept, new], key=lambda row: [str(row.get(n)).rjust(12) for n in key])


def to_csv(rows: Sequence[Row]) -> str:
    """Every field of any row as a column, in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        writer.writerow(cells)
    return lines.getvalue()
