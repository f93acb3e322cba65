"""The JSON files of bench/results/<gpu>/: read, merged row by row, and written at once."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("flash-attn", "flash-attn-4", "xformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
PENDING = "pending.json"  # versions whose present sources have no passing GPU run, and why
Row = dict[str, Any]


def slug(gpu: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200": the folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def commit() -> str:
    """The commit that was measured: of this clone, or the one that `git archive` wrote down."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    archived = (here / "archived_commit.txt").read_text().strip()
    return found or ("" if archived.startswith("$") else archived[:12])


def environment(board: dict[str, Any]) -> dict[str, Any]:
    """Everything about this machine that a figure depends on."""
    import torch

    props = torch.cuda.get_device_properties(0)
    return {
        "gpu": props.name,
        "compute_capability": f"{props.major}.{props.minor}",
        "multiprocessors": props.multi_processor_count,
        **board,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "peers": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Written beside the file and renamed over it: an interrupted run loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = content.get("rows")
    text = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    if rows is not None:  # one row a line, so that a diff shows what moved
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}'
    draft = path.with_suffix(".tmp")
    draft.write_text(text + "\n")
    os.replace(draft, path)


def pending(results: Path = RESULTS) -> dict[str, Row]:
    """Version -> {digest, why}: the exceptions to the rule that what is listed has passed."""
    return read(results / PENDING)


def merge(rows: Iterable[Row], new: Row, key: tuple[str, ...]) -> list[Row]:
    """`rows` with `new` in the place of the row of the same key."""
    wanted = tuple(new.get(name) for name in key)
    kept = [row for row in rows if tuple(row.get(name) for name in key) != wanted]
    return sorted([*kept, new], key=lambda row: [str(row.get(n)).rjust(12) for n in key])
