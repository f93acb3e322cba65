"""What every command shares: where its output goes, how it fails, how options are read."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from flash.errors import FlashError

USAGE_ERROR = 2
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]


class Dtype(str, Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"
    e4m3 = "e4m3"

    @property
    def torch(self) -> torch.dtype:
        names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "e4m3": "float8_e4m3fn"}
        found: torch.dtype = getattr(torch, names[self.value])
        return found


def say(content: Any) -> None:
    """Tables as wide as the terminal, or as wide as they need when nobody looks."""
    Console(width=None if sys.stdout.isatty() else 160).print(content)


def say_json(content: Any) -> None:
    print(json.dumps(content, indent=2, default=str))


def progress() -> Console:
    """Where progress goes: standard error, so that standard output stays clean."""
    return Console(stderr=True)


def fail(error: Exception | str) -> typer.Exit:
    progress().print(f"flash: {error}", style="red", highlight=False, markup=False)
    return typer.Exit(USAGE_ERROR)


def load(path: Path, part: str, hint: str) -> dict[str, Any]:
    """A result file that holds this part."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise fail(f"{path} is no result file: {error}; {hint}") from error
    if not isinstance(content, dict) or not content.get(part):
        raise fail(f"{path} is no result file: it has no {part} ({hint})")
    return content


def load_rows(path: Path) -> dict[str, Any]:
    """A result file of timed calls, whose rows say all that a comparison reads."""
    from flash.study import rows

    content = load(path, "rows", "flash bench --out writes one")
    try:
        rows.check(content, path)
    except FlashError as error:
        raise fail(f"{path} is no result file: {error}") from error
    return content


def chosen_device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked not in ("cpu", "cuda"):
        raise fail(f"--device must be auto, cpu or cuda, got {asked!r}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise fail("--device cuda: torch sees no CUDA device here; see flash doctor")
    return asked


def numbers(name: str, text: str, count: int) -> list[int]:
    """ "4,1024,16,64" -> [4, 1024, 16, 64]."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise fail(f"{name} takes {count} whole numbers separated by commas, got {text!r}")
    return found


def sides(text: str) -> tuple[int | None, ...]:
    """ "128,none" -> (128, None)."""
    parts = text.lower().replace("none", "-1").split(",")
    found = numbers("--window", ",".join(parts), 2)
    return tuple(None if side == -1 else side for side in found)
