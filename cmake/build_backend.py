"""The PEP 517 backend: scikit-build-core, which compiles kernels only where there is something to
compile for, and asks PyPI for a CUDA compiler only where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build

sys.path.insert(0, str(Path(__file__).parent))
import toolchain

Settings = dict[str, Any] | None

build_sdist = build.build_sdist
get_requires_for_build_sdist = build.get_requires_for_build_sdist


def with_kernels(settings: Settings) -> dict[str, Any]:
    """Without an architecture to build for, CMake does not run and the wheel is pure Python."""
    chosen = dict(settings or {})
    if not toolchain.architectures()[0]:
        chosen["wheel.cmake"] = "false"
    return chosen


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    needed = build.get_requires_for_build_wheel(with_kernels(config_settings))
    return [*needed, *toolchain.requirements()]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return build.prepare_metadata_for_build_wheel(metadata_directory, with_kernels(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    print(toolchain.summary(), flush=True)
    return build.build_wheel(wheel_directory, with_kernels(config_settings), metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    print(toolchain.summary(), flush=True)
    return build.build_editable(wheel_directory, with_kernels(config_settings), metadata_directory)
