"""What every script here does around its measuring: options, a GPU or a plain refusal, a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import record
from flash.study.timing import Board


def parser(about: str | None) -> argparse.ArgumentParser:
    """Options of a script, described by the first line of its docstring."""
    found = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    found.add_argument("--out", type=Path, default=record.RESULTS, help="folder of all results")
    return found


def lacks_gpu(name: str) -> bool:
    """Says so where there is none; a script then ends with status 2."""
    if not torch.cuda.is_available():
        print(f"bench.{name} needs a CUDA device; this machine has none", file=sys.stderr)
    return not torch.cuda.is_available()


def path_of(out: Path, name: str) -> Path:
    return out / record.slug(torch.cuda.get_device_name(0)) / f"{name}.json"


def leave(out: Path, name: str, found: dict[str, Any], command: str = "") -> Path:
    """One file of evidence: the machine, the sources, the date, the command, what was found."""
    path, command = path_of(out, name), f"python -m bench.{command or name}"
    head = record.head(Board().facts())
    record.write(path, {**head, "date": record.now(), "command": command, **found})
    return path
