"""Builds changed copies of a version's kernels: an idea taken out, or a clock put in.

The kernels themselves carry no switch for this: a variant is a list of replacements in a copy of
the sources, so it costs nothing where it is not asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.digest import ROOT
from flash.study.files import slug

COPIED = ("common", "cmake", "v1_tiling", "v2_parallel", "v3_hopper", "CMakeLists.txt",
          "pyproject.toml", "README.md", "LICENSE")  # fmt: skip
Edit = tuple[str, str, str]  # file, the text there, what it becomes


@dataclass(frozen=True)
class Variant:
    """One version with edits; none of them: as it is."""

    version: str  # v1, v2 or v3
    folder: str
    without: str = ""
    edits: tuple[Edit, ...] = ()
    added: tuple[tuple[str, str], ...] = ()  # a file of this repository, its name among the sources
    directions: str = "forward"  # what of it is worth building
    dims: str = "64;128"

    @property
    def name(self) -> str:
        return slug(f"{self.version} {self.without}")


def edited(text: str, old: str, new: str) -> str:
    """Every occurrence replaced; an edit that finds nothing is an error."""
    if old not in text:
        raise ValueError(f"no {old!r}: the sources have changed and the variant has not")
    return text.replace(old, new)


def copy(variant: Variant, target: Path) -> None:
    """The sources with the variant's edits."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, target / name, ignore=skip, dirs_exist_ok=True)
        else:
            shutil.copy(source, target / name)
    for file, name in variant.added:
        shutil.copy(ROOT / file, target / name)
    for file, old, new in variant.edits:
        path = target / file
        path.write_text(edited(path.read_text(), old, new))


def build(variant: Variant, place: Path, dims: str, dtypes: str = "bf16",
          directions: str = "forward") -> Path:  # fmt: skip
    """Some of the variant's kernels, installed into a folder of their own."""
    installed = place / variant.name / "installed"
    if installed.is_dir():
        return installed
    copy(variant, place / variant.name / "source")
    environment = {
        **os.environ, "FLASH_VERSIONS": variant.folder, "FLASH_DTYPES": dtypes,
        "FLASH_HEAD_DIMS": dims, "FLASH_DIRECTIONS": directions, "FLASH_UNPROVEN": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation",
               "--no-deps", "--no-index", "--target", str(installed),
               str(place / variant.name / "source")]  # fmt: skip
    subprocess.run(command, env=environment, check=True)
    return installed


def python(installed: Path, *arguments: str) -> str:
    """Output of a Python process that imports this build of flash."""
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    run = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, check=True,
                         capture_output=True, text=True)  # fmt: skip
    return run.stdout
