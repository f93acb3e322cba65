"""Measures the ceilings of this GPU in seconds: `python -m bench.limits`.

Compiles limits.cu beside it for this GPU and writes bench/results/<gpu>/limits.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import script
from bench.digest import ROOT

SOURCE = Path(__file__).with_name("limits.cu")


def compiler() -> str:
    """nvcc as the build finds it."""
    path = ROOT / "cmake" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("toolchain", path)
    assert spec is not None
    assert spec.loader is not None
    toolchain: Any = importlib.util.module_from_spec(spec)
    sys.modules["toolchain"] = toolchain
    spec.loader.exec_module(toolchain)
    found = toolchain.system_nvcc()
    if found is None:
        raise FileNotFoundError("bench.limits needs nvcc: CUDACXX, CUDA_HOME or PATH")
    return str(found.path)


def build(target: Path, capability: tuple[int, int]) -> None:
    major, minor = capability
    name = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [
        compiler(), "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT}",
        f"-gencode=arch=compute_{name},code=sm_{name}", str(SOURCE), "-o", str(target),
    ]  # fmt: skip
    if os.environ.get("CUTLASS_INCLUDE"):
        command.append(f"-I{os.environ['CUTLASS_INCLUDE']}")
    subprocess.run(command, check=True)


def measure() -> list[dict[str, Any]]:
    """One row for each limit; `rate` is a burst, per second."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "limits"
        build(target, torch.cuda.get_device_capability(0))
        run = subprocess.run([str(target)], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def main() -> int:
    parser = script.parser(__doc__)
    args = parser.parse_args()
    if script.lacks_gpu("limits"):
        return 2
    rows = measure()
    for row in rows:
        share = row.get("per_clock_and_processor")
        detail = f"{share:10.1f} per clock and SM at {row['clock_mhz']} MHz" if share else ""
        print(f"{row['name']:14} {row['rate']:.4g} {row['unit']:9} {detail}")
    print(f"wrote {script.leave(args.out, 'limits', {'limits': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
