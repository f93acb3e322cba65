"""A fingerprint of each version's kernel sources: what a GPU result speaks of.

Comments and white space do not count, so a better sentence costs no GPU time; every other change of
a source that the version includes does. `python -m bench.digest` prints them.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("v1_tiling", "v2_parallel", "v3_hopper")
SHARED = ("common/backend.cpp", "common/binding.cpp")
TEMPLATES = ("cmake/instance.cu.in", "cmake/instances.h.in")
OPTIONS = "cmake/FlashVersion.cmake"

_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')|\s+', re.S)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def significant(source: str) -> str:
    """The source without comments and white space; literals are kept as they are."""
    return _TOKEN.sub(lambda match: match[1] or "", source)


def sources(version: str, root: Path = ROOT) -> list[Path]:
    """Every file of this repository that the version's kernels include, in a fixed order; a module
    of its own (v3's quantizer) belongs to them."""
    own = [path for kind in ("*.cu", "*.cpp") for path in (root / version).glob(kind)]
    todo = [root / version / "launch.cuh", *own, *(root / name for name in SHARED)]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            todo += [path.parent / name, root / name]
    return sorted({path.resolve() for path in found})


def digest(version: str, root: Path = ROOT) -> str:
    """Twelve hex digits; empty when the version has no kernels."""
    if not (root / version / "launch.cuh").is_file():
        return ""
    total = hashlib.sha256()
    for path in sources(version, root):
        total.update(path.relative_to(root.resolve()).as_posix().encode())
        total.update(significant(path.read_text()).encode())
    return total.hexdigest()[:12]


def build(root: Path = ROOT) -> str:
    """Twelve hex digits of how sources become kernels: what CMake writes around them, and options.

    Apart from the digest, for an option of the build speaks of every version at once.
    """
    total = hashlib.sha256()
    for name in TEMPLATES:
        total.update(significant((root / name).read_text()).encode())
    text = re.sub(r"#[^\n]*", "", (root / OPTIONS).read_text())
    for call in re.findall(r"target_compile_(?:options|definitions)\(([^)]*)\)", text):
        total.update(" ".join(call.split()).encode())
    return total.hexdigest()[:12]


def instances(version: str, root: Path = ROOT, *, unproven: bool = False) -> dict[str, list[str]]:
    """The kernels that CMakeLists.txt lists: direction -> dtype:head_dim[:head_dim_v].

    Those marked as unproven on a GPU are left out, or with `unproven` the only ones.
    """
    text = re.sub(r"#[^\n]*", "", (root / "CMakeLists.txt").read_text())
    call = re.search(rf"flash_add_version\({version}\b(.*?)\)", text, re.S)
    words = call[1].split() if call else []
    listed: dict[str, list[str]] = {"forward": [], "backward": []}
    prefix = "unproven_" if unproven else ""
    heading = ""
    for word in words:
        if word.isupper() and ":" not in word:
            heading = word.lower()
        elif ":" in word and heading in {prefix + direction for direction in listed}:
            listed[heading.removeprefix(prefix)].append(word)
    return listed


def has_kernels(version: str, root: Path = ROOT) -> bool:
    return any(instances(version, root).values())


if __name__ == "__main__":
    print("build", build())
    for name in VERSIONS:
        print(name, digest(name) or "(no kernels)", instances(name))
