"""What the build decides without a compiler: architectures, requirements, a wheel's content."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from bench import digest
from bench.digest import ROOT
from flash.capability import capability

sys.path.insert(0, str(ROOT / "cmake"))
import compile as launcher
import toolchain

DTYPES = {"fp16", "bf16", "fp32", "e4m3"}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a GPU, without a toolkit and without settings."""
    for name in ("FLASH_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUTLASS_INCLUDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "DEFAULT_NVCC", tmp_path / "missing")
    return tmp_path


def program(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("75;80;90a", ["75", "80", "90a"]),
        ("80 90a", ["80", "90a"]),
        ("80,86", ["80", "86"]),
        ("90a", ["90a"]),
        ("80;90", ["80", "90a"]),
        ("", []),
        (" ; ", []),
    ],
)
def test_architectures_as_asked(
    bare: Path, monkeypatch: pytest.MonkeyPatch, asked: str, expected: list[str]
) -> None:
    program(bare, "nvidia-smi", "8.0")
    monkeypatch.setenv("FLASH_ARCHS", asked)
    assert toolchain.architectures() == (expected, "FLASH_ARCHS")


@pytest.mark.parametrize("wrong", ["sm_90a", "8.0", "hopper", "80+PTX"])
def test_what_is_no_architecture_is_refused(
    bare: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("FLASH_ARCHS", f"80;{wrong}")
    with pytest.raises(SystemExit, match=re.escape(wrong)):
        toolchain.architectures()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("FLASH_DTYPES=bfloat16", "FLASH_DTYPES names bfloat16; there is fp16 bf16"),
        ("FLASH_VERSIONS=v2", "FLASH_VERSIONS names v2; there is v2_parallel"),
        ("FLASH_VERSIONS=v2_parallel;v9", "FLASH_VERSIONS names v9"),
        ("FLASH_DTYPES=bf16;fp16", ""),
    ],
)
def test_a_part_that_does_not_exist_is_refused(
    tmp_path: Path, setting: str, complaint: str
) -> None:
    """Otherwise a slip of the pen would build no kernels and say nothing."""
    cmake = shutil.which("cmake", path=os.pathsep.join([
        sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))  # fmt: skip
    assert cmake, "of the test extra"
    script = tmp_path / "check.cmake"
    script.write_text(
        f"include({ROOT}/cmake/FlashVersion.cmake)\n"
        "flash_wanted(ignored VERSIONS v2_parallel)\n"
        "flash_wanted(ignored DTYPES fp16)\nflash_wanted(ignored DTYPES bf16)\n"
        "flash_check_wanted()\n"
    )
    command = [cmake, f"-D{setting}", "-P", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == bool(complaint)
    assert complaint in " ".join(done.stderr.split())


def test_the_last_line_checks_what_was_asked_for() -> None:
    assert (ROOT / "CMakeLists.txt").read_text().endswith("\nflash_check_wanted()\n")


@pytest.mark.parametrize(
    ("says", "expected"),
    [("9.0", ["90a"]), ("8.6", ["86"]), ("12.0", ["120"]), ("NVIDIA-SMI has failed", [])],
)
def test_architectures_of_this_machine(bare: Path, says: str, expected: list[str]) -> None:
    program(bare, "nvidia-smi", says)
    assert toolchain.architectures()[0] == expected


def test_without_a_gpu_nothing_is_downloaded(bare: Path) -> None:
    assert toolchain.architectures() == ([], "no FLASH_ARCHS and no nvidia-smi")
    assert toolchain.requirements() == []
    assert toolchain.summary().startswith("flash: Python part and schedules only")


def test_without_nvcc_the_pinned_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ARCHS", "90a")
    needed = toolchain.requirements()
    assert needed == [*toolchain.NVCC_WHEELS, toolchain.CUTLASS_WHEEL]
    assert len(needed) == 6
    assert all("==" in name for name in needed)


@pytest.mark.parametrize(("release", "good"), [("13.0", True), ("12.4", True), ("12.3", False)])
def test_nvcc_of_the_system(
    bare: Path, monkeypatch: pytest.MonkeyPatch, release: str, good: bool
) -> None:
    monkeypatch.setenv("FLASH_ARCHS", "80")
    path = program(bare, "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    found = toolchain.system_nvcc()
    assert (found is not None and found.path == path) == good
    assert toolchain.requirements() == (
        [toolchain.CUTLASS_WHEEL] if good else [*toolchain.NVCC_WHEELS, toolchain.CUTLASS_WHEEL]
    )


def test_given_cutlass_is_used(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "nvcc", "release 13.0")
    monkeypatch.setenv("FLASH_ARCHS", "80")
    monkeypatch.setenv("CUTLASS_INCLUDE", str(bare))
    assert toolchain.requirements() == []
    assert toolchain.cutlass_include() == bare.resolve()


@pytest.mark.parametrize("version", digest.VERSIONS)
def test_instances_are_well_formed(version: str) -> None:
    """dtype:head_dim[:head_dim_v], smallest first, since dispatch takes the first that fits."""
    for direction, names in digest.instances(version).items():
        assert len(set(names)) == len(names), direction
        assert direction in ("forward", "backward")
        dims: dict[str, list[tuple[int, ...]]] = {}
        for name in names:
            dtype, *sizes = name.split(":")
            assert dtype in DTYPES
            assert all(int(size) % 8 == 0 and 0 < int(size) <= 256 for size in sizes)
            dims.setdefault(dtype, []).append((int(sizes[0]), int(sizes[-1])))
        for found in dims.values():
            assert found == sorted(found)


@pytest.mark.parametrize("version", digest.VERSIONS)
def test_the_capability_table_lists_what_is_built(version: str) -> None:
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "e4m3": "float8_e4m3fn"}
    built, claimed = set(), set()
    for direction, instances in digest.instances(version).items():
        for instance in instances:
            dtype, *dims = instance.split(":")
            built.add((direction, names[dtype], int(dims[0]), int(dims[-1])))
    for row in capability(version).rows:
        for direction in ("forward", "backward"):
            claimed |= {
                (direction, dtype, *pair) for dtype in row.dtypes for pair in row.dims(direction)
            }
    assert claimed == built, f"{version}: CMakeLists.txt and {version}/__init__.py disagree"


def test_the_tiles_of_v3_are_those_of_its_kernels() -> None:
    """What `flash.explain` says without a GPU: the tuned sizes of the forward pass."""
    table = capability("v3_hopper")
    text = (ROOT / "v3_hopper" / "traits.cuh").read_text()
    plain = {key[1:]: tile for key, tile in table.tiles.items() if key[0] == "forward"}
    long = {key[1:]: tile for key, tile in table.long_tiles.items()}
    general, *tuned = re.findall(r"struct Tuning(<[\d, true]+>)? \{(.*?)\};", text, re.S)
    found: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    for which, body in [("<96, 96>", general[1]), ("<128, 128>", general[1]), *tuned]:
        dim, dim_v = (int(n) for n in re.findall(r"\d+", which))
        size = {name: int(n) for name, n in re.findall(r"(k\w+) = (\d+)", body)}
        tile = (long if "true" in which else plain)[dim, dim_v]
        found["true" in which].add((dim, dim_v))
        assert tile.block_q == 64 * size["kConsumers"]
        assert (tile.block_kv, tile.stages) == (size["kBlockKV"], size["kStages"])
        assert tile.threads == 128 * (1 + size["kConsumers"])
    assert (found[False], found[True]) == (set(plain), set(long))
    rows = dict(re.findall(r"(kLongRows\w*) = ([\d <]+);", text))
    base, shift = rows["kLongRowsOfAllHeads"].split("<<")
    assert table.long_rows == int(rows["kLongRows"])
    assert table.long_rows_full == int(rows["kLongRowsFull"])
    assert table.long_rows_of_all_heads == int(base) << int(shift)


def test_the_fp8_tiles_of_v3_are_those_of_its_kernels() -> None:
    text = (ROOT / "v3_hopper" / "fp8_traits.cuh").read_text()
    assert "kBlockKV = 128;" in text
    general, *tuned = re.findall(r"struct Tuning(<\d+, \d+>)? \{(.*?)\};", text, re.S)
    bodies = {"<96, 96>": general[1], "<128, 128>": general[1], **dict(tuned)}
    table = capability("v3_hopper").fp8_tiles
    assert len(table) == len(bodies)
    for which, body in bodies.items():
        dim, dim_v = (int(n) for n in re.findall(r"\d+", which))
        size = {name: int(n) for name, n in re.findall(r"(k\w+) = (\d+)", body)}
        tile = table["forward", dim, dim_v]
        assert (tile.block_q, tile.block_kv) == (64 * size["kConsumers"], 128)
        assert (tile.stages, tile.threads) == (size["kStages"], 128 * (1 + size["kConsumers"]))


@pytest.mark.parametrize(
    ("said", "strict", "expected"),
    [
        ("ptxas info : 0 bytes spill stores, 0 bytes spill loads", "ON", 0),
        ("ptxas info : 8 bytes spill stores, 8 bytes spill loads", "ON", 1),
        ("ptxas info : 8 bytes spill stores, 8 bytes spill loads", "OFF", 0),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma", "ON", 1),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma", "OFF", 0),
    ],
)
def test_what_ptxas_says_is_judged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], said: str, strict: str, expected: int
) -> None:
    tool = program(tmp_path, "nvcc", said)
    command = [f"--strict={strict}", "sh", "-c", f'"{tool}"', "-o", str(tmp_path / "x.o")]
    assert launcher.main(command) == expected
    assert (tmp_path / "x.ptxas").read_text().strip() == said
    assert ("ptxas findings" in capfd.readouterr().err) == ("C7510" in said or "8 bytes" in said)


def test_a_failed_compiler_fails() -> None:
    assert launcher.main(["--strict=OFF", "sh", "-c", "exit 3"]) == 3


def wheel(folder: Path) -> zipfile.ZipFile:
    """The wheel of a machine without a GPU, built by this Python's own backend."""
    code = (
        "import sys; sys.path.insert(0, 'cmake'); import build_backend as b\n"
        f"print(b.build_wheel({str(folder)!r}))"
    )
    bare = {"FLASH_ARCHS": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=bare, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Python part and schedules only" in done.stdout
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_without_a_gpu(tmp_path: Path) -> None:
    archive = wheel(tmp_path)
    names = set(archive.namelist())
    assert "none-any" in archive.filename
    wanted = ["flash/__init__.py", "flash/cli.py", "flash/engines/kernels.py", "flash/py.typed"]
    wanted += [f"flash/{v}/{name}" for v in digest.VERSIONS for name in ("__init__.py",
               "schedule.py", "README.md")]  # fmt: skip
    assert set(wanted) <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"flash", "flash_generations-0.1.0.dist-info"}
    foreign = [name for name in names if name.endswith((".cuh", ".cu", ".h", ".cpp", ".so"))]
    assert not foreign
    text = next(name for name in names if name.endswith("METADATA"))
    metadata = message_from_string(archive.read(text).decode())
    always = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert always == ["torch>=2.6"]
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "flash = flash.cli:main" in archive.read(entry).decode()
