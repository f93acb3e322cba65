"""Settings of every test run; GPU tests are collected only where a GPU is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests import grid.py by its name
torch.set_num_threads(1)

# FLASH_TEST_GPU=1 collects tests/gpu on a CPU as well, to run their logic on the schedules.
collect_ignore = []
if not (torch.cuda.is_available() or os.environ.get("FLASH_TEST_GPU")):
    collect_ignore.append("gpu")

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, max_examples=10,
    suppress_health_check=QUIET,
)  # fmt: skip
settings.register_profile("long", deadline=None, max_examples=300, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: one minute on a GPU, every kernel touched")
    config.addinivalue_line("markers", "timeout(seconds): where pytest-timeout is installed")


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)
