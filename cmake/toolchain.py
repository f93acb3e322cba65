"""What this machine can compile: GPU architectures, nvcc, CUTLASS headers.

The one answer that the build backend (what to download) and CMake (what to build) share.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_NVCC = (12, 4)
DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")
# The compiler as PyPI wheels. All five are pinned: the nvcc wheel leaves its own parts unpinned.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
CUTLASS_WHEEL = "nvidia-cutlass==4.2.0.0"


ARCHITECTURE = re.compile(r"[1-9]\d{1,2}[af]?")
HOPPER = {"90": "90a"}  # v3's instructions exist there alone; the others' code is the same


@dataclass(frozen=True)
class Compiler:
    path: Path
    version: tuple[int, int]
    wheel: bool  # from PyPI wheels: another folder layout than a toolkit's

    @property
    def root(self) -> Path:
        return self.path.parent.parent


def architectures() -> tuple[list[str], str]:
    """GPU architectures to build for, and where that answer came from."""
    asked = os.environ.get("FLASH_ARCHS")
    if asked is not None:
        names = [HOPPER.get(name, name) for name in re.split(r"[;,\s]+", asked) if name]
        wrong = [name for name in names if not ARCHITECTURE.fullmatch(name)]
        if wrong:
            raise SystemExit(
                f"flash: FLASH_ARCHS names {wrong[0]}; write 75, 80, 86, 89, 90a, 100, ..."
            )
        return names, "FLASH_ARCHS"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [], "no FLASH_ARCHS and no nvidia-smi"
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = {line.strip().replace(".", "") for line in answer.splitlines()}
    names = sorted(HOPPER.get(arch, arch) for arch in found if arch.isdigit())
    return names, "the GPUs of this machine" if names else "no FLASH_ARCHS and no GPU"


def nvcc_version(path: Path) -> tuple[int, int] | None:
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return (int(match[1]), int(match[2])) if match else None


def system_nvcc() -> Compiler | None:
    """The first nvcc that is new enough: CUDACXX, CUDA_HOME, PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        shutil.which("nvcc"),
        DEFAULT_NVCC,
    ]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            version = nvcc_version(Path(candidate))
            if version and version >= OLDEST_NVCC:
                return Compiler(Path(candidate), version, wheel=False)
    return None


def wheel_nvcc() -> Compiler | None:
    """nvcc from the wheels above, when they are installed for this Python."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "cu13" / "bin" / "nvcc"
        version = nvcc_version(path)
        if version:
            return Compiler(path, version, wheel=True)
    return None


def cutlass_include() -> Path | None:
    """CUTLASS_INCLUDE, or the headers inside the nvidia-cutlass wheel."""
    asked = os.environ.get("CUTLASS_INCLUDE")
    if asked:
        return Path(asked).resolve()
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "source" / "include"
        if (path / "cute").is_dir():
            return path
    return None


def requirements() -> list[str]:
    """Wheels that a kernel build on this machine needs; none when no kernel will be built."""
    if not architectures()[0]:
        return []
    needed = [] if system_nvcc() else list(NVCC_WHEELS)
    return needed if os.environ.get("CUTLASS_INCLUDE") else [*needed, CUTLASS_WHEEL]


def summary() -> str:
    archs, origin = architectures()
    if not archs:
        return f"flash: Python part and schedules only ({origin})"
    compiler = system_nvcc() or wheel_nvcc()
    tool = f"{compiler.path} {compiler.version}" if compiler else f"PyPI wheels {NVCC_WHEELS[0]}"
    return f"flash: kernels for {';'.join(archs)} ({origin}), compiled by {tool}"


def cmake_answers() -> str:
    """The same as lines NAME=VALUE for CMake."""
    archs, _ = architectures()
    compiler = system_nvcc() or wheel_nvcc()
    answers = {
        "ARCHS": ";".join(archs),
        "NVCC": compiler.path if compiler else "",
        "NVCC_VERSION": ".".join(map(str, compiler.version)) if compiler else "",
        "WHEEL_ROOT": compiler.root if compiler and compiler.wheel else "",
        "CUTLASS": cutlass_include() or "",
    }
    return "\n".join(f"{name}={value}" for name, value in answers.items())


if __name__ == "__main__":
    if "--cmake" in sys.argv:
        print(cmake_answers())
    elif "--requirements" in sys.argv:
        print(" ".join(requirements()))
    else:
        print(summary())
