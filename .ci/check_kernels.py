"""Compiles a sample of every version's kernels without a GPU and inspects what came out.

Fails on a spilled register (but for the few bytes that cmake/compile.py names) or serialized WGMMA,
on a version that lost its tensor-core instructions, on a symbol of PyTorch, and on a module that
does not load.
usage: check_kernels.py BUILD_FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from compile import FINDING, known  # the judge of the strict build

from bench import digest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = os.environ.get("FLASH_ARCHS", "80;90a")
SAMPLE = {"FLASH_DTYPES": "bf16;e4m3", "FLASH_HEAD_DIMS": "128", "FLASH_STRICT": "ON",
          "FLASH_UNPROVEN": "ON"}  # fmt: skip
# What the machine code of a version must contain, by dtype of the kernels.
NEEDED = {
    "v1_tiling": {"bf16": "HMMA"},
    "v2_parallel": {"bf16": "HMMA"},
    "v3_hopper": {"bf16": "HGMMA", "e4m3": "QGMMA"},
}
FOREIGN = re.compile(r"c10|at::|torch", re.I)
OPCODE = re.compile(r"\b(HMMA|HGMMA|QGMMA)\b")


def main(folder: Path) -> int:
    build(folder)
    problems = []
    for version in digest.VERSIONS:
        every = [digest.instances(version, unproven=flag) for flag in (False, True)]
        listed = [i for found in every for names in found.values() for i in names if sampled(i)]
        if not listed:
            print(f"{version}: no kernel of the sample is listed")
            continue
        modules = list((folder / "flash" / version).glob("_kernels*.so"))
        if not modules:
            problems.append(f"{version}: no module was built")
            continue
        problems += inspect(version, modules[0], listed)
        problems += findings(folder, version)
    print("\n".join(problems) or "kernels: every check passed")
    return len(problems)


def sampled(instance: str) -> bool:
    dtype, dim = instance.split(":")[:2]
    wanted = SAMPLE["FLASH_DTYPES"].split(";"), SAMPLE["FLASH_HEAD_DIMS"].split(";")
    return dtype in wanted[0] and dim in wanted[1]


def build(folder: Path) -> None:
    """Configure and build with this interpreter's CMake and ninja, where they are installed."""
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    os.environ["FLASH_ARCHS"] = ARCHS
    options = [f"-D{name}={value}" for name, value in SAMPLE.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    if subprocess.run(["cmake", "--build", str(folder), "--", "-k", "0"], check=False).returncode:
        sys.exit("kernels: the strict build failed, see above")


def inspect(version: str, module: Path, listed: list[str]) -> list[str]:
    """Symbols, loading, and machine code of one module."""
    problems = []
    symbols = run("nm", "-D", "-C", str(module))
    foreign = [line for line in symbols.splitlines() if FOREIGN.search(line)]
    if foreign:
        problems.append(f"{version}: refers to PyTorch: {foreign[:3]}")
    count = count_kernels(module)
    if count != len(listed):
        problems.append(f"{version}: holds {count} kernels, CMakeLists.txt lists {len(listed)}")
    found = set(OPCODE.findall(run(cuobjdump(), "-sass", str(module))))
    for dtype, opcode in NEEDED[version].items():
        if any(name.startswith(dtype) for name in listed) and opcode not in found:
            problems.append(f"{version}: no {opcode} in its {dtype} machine code")
    print(f"{version}: {count} kernels, {', '.join(sorted(found))}, {module.stat().st_size} bytes")
    return problems


def findings(folder: Path, version: str) -> list[str]:
    """Spills and serialized WGMMA in what ptxas said, for builds that were not strict."""
    bad = []
    for report in sorted(folder.rglob(f"{version}_kernels.dir/**/*.ptxas")):
        text = report.read_text()
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
        print(f"  {report.stem}: at most {max(registers, default=0)} registers")
        found = [line.strip() for line in text.splitlines() if FINDING.search(line)]
        if not known(str(report), found):
            bad += [f"{report.stem}: {line}" for line in found]
    return bad


COUNT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(len(module.instances()))
"""


def count_kernels(module: Path) -> int:
    """In a process of its own: a second module of the same name would answer as the first."""
    return int(run(sys.executable, "-c", COUNT, str(module)))


def cuobjdump() -> str:
    """From the system, or from the nvidia-cuda-cuobjdump wheel (which finds nvdisasm on PATH)."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for tool in sorted(Path(place).glob("*/bin/cuobjdump")):
            tool.chmod(0o755)
            os.environ["PATH"] = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
            return str(tool)
    return shutil.which("cuobjdump") or sys.exit("no cuobjdump: pip install nvidia-cuda-cuobjdump")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
