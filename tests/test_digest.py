"""The fingerprint of kernel sources: deaf to comments and white space, awake to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import digest

CMAKE = """
# flash_add_version(v2_parallel NAMESPACE v2 FORWARD fp64:8): a comment does not count
flash_add_version(v2_parallel NAMESPACE v2 OLDEST_ARCH 80
  FORWARD
    fp16:64 bf16:192:128  # and neither does this one: bf16:999
  BACKWARD bf16:64)
flash_add_version(v3_hopper NAMESPACE v3 ONLY_ARCH 90a
  FORWARD
  BACKWARD)
"""
LAUNCH = """// Launches.
#include "common/mask.cuh"
#include "v2_parallel/forward.cuh"
int launch() { return forward("a  b"); }
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "CMakeLists.txt": CMAKE,
        "common/mask.cuh": "int mask() { return 1; }\n",
        "common/backend.cpp": "int backend;\n",
        "common/binding.cpp": "int binding;\n",
        "common/unused.cuh": "int unused;\n",
        "v2_parallel/launch.cuh": LAUNCH,
        "v2_parallel/forward.cuh": "int forward(const char*);  /* the algorithm */\n",
        "v2_parallel/extra.cu": '#include "v2_parallel/extra.h"\nint extra;\n',
        "v2_parallel/extra.h": "int within;\n",
        "v3_hopper/README.md": "nothing yet\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("v2_parallel/launch.cuh", "// Launches.", "// Starts, as one says.\n// Twice."),
        ("v2_parallel/launch.cuh", "int launch() {", "int\n  launch()\n{\n"),
        ("v2_parallel/forward.cuh", "/* the algorithm */", "/* another\n sentence */"),
        ("common/mask.cuh", "return 1;", "return  1 ;"),
        ("common/unused.cuh", "unused", "changed"),
    ],
)
def test_what_does_not_count(repository: Path, name: str, old: str, new: str) -> None:
    before = digest.digest("v2_parallel", repository)
    edit(repository, name, old, new)
    assert digest.digest("v2_parallel", repository) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("v2_parallel/launch.cuh", '"a  b"', '"a b"'),
        ("v2_parallel/launch.cuh", "return forward", "return -forward"),
        ("v2_parallel/forward.cuh", "const char*", "char*"),
        ("common/mask.cuh", "1", "2"),
        ("v2_parallel/extra.cu", "int extra", "int other"),  # a module of its own
        ("v2_parallel/extra.h", "within", "inside"),
        ("common/backend.cpp", "backend", "other"),
        ("common/binding.cpp", "binding", "other"),
    ],
)
def test_what_counts(repository: Path, name: str, old: str, new: str) -> None:
    before = digest.digest("v2_parallel", repository)
    edit(repository, name, old, new)
    assert digest.digest("v2_parallel", repository) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (digest.OPTIONS, "-O3", "-O3 --use_fast_math"),
        (digest.OPTIONS, "--expt-relaxed-constexpr;-Xptxas=-v", "-Xptxas=-v"),
        (digest.OPTIONS, "FLASH_NAMESPACE=", "FLASH_SPACE="),
        (digest.TEMPLATES[0], "template", "extern template"),
        (digest.TEMPLATES[1], "Instances", "Others"),
    ],
)
def test_how_kernels_are_built_counts(tmp_path: Path, name: str, old: str, new: str) -> None:
    for path in (*digest.TEMPLATES, digest.OPTIONS):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((digest.ROOT / path).read_text())
    assert digest.build(tmp_path) == digest.build()
    edit(tmp_path, digest.OPTIONS, "# The quantizer of v3:", "# v3's quantizer:")
    assert digest.build(tmp_path) == digest.build()
    edit(tmp_path, name, old, new)
    assert digest.build(tmp_path) != digest.build()


def test_comment_marks_inside_literals_are_kept() -> None:
    assert digest.significant('f("// no", \'"\', "/*"); // yes') == 'f("// no",\'"\',"/*");'


def test_no_kernels_no_digest(repository: Path) -> None:
    assert digest.digest("v3_hopper", repository) == ""
    assert not digest.has_kernels("v3_hopper", repository)


def test_instances_come_from_cmake(repository: Path) -> None:
    listed = digest.instances("v2_parallel", repository)
    assert listed == {"forward": ["fp16:64", "bf16:192:128"], "backward": ["bf16:64"]}
    assert digest.instances("v3_hopper", repository) == {"forward": [], "backward": []}


@pytest.mark.parametrize("version", digest.VERSIONS)
def test_sources_of_this_repository(version: str) -> None:
    names = {path.relative_to(digest.ROOT).as_posix() for path in digest.sources(version)}
    assert {"common/backend.cpp", "common/params.h", "common/dispatch.h"} <= names
    others = [name for name in digest.VERSIONS if name != version]
    assert not any(name.startswith(tuple(others)) for name in names)
    if version == "v3_hopper":
        assert {"v3_hopper/fp8_quantize.cu", "v3_hopper/fp8_rotate.cuh"} <= names
