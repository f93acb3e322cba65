"""The example that trains on one sequence over several processes: the loss is that of one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import lru_cache

import pytest

from bench.digest import ROOT

EXAMPLE = "examples/long_context.py"
STEPS = ["--device", "cpu", "--seqlen", "64", "--steps", "3"]
LINE = r"step (\d+)/3  loss ([\d.]+)(?:  gradient ([\d.]+)  [\d,]+ tokens/s)?$"


def lines(*command: str) -> list[tuple[float, ...]]:
    """(loss, gradient) of every step, as the progress lines show them."""
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.findall(LINE, run.stdout, re.M)
    assert [int(step) for step, *_ in found] == [1, 2, 3]
    return [tuple(float(x) for x in rest if x) for _, *rest in found]


@lru_cache
def alone() -> list[tuple[float, ...]]:
    return lines(EXAMPLE, *STEPS)


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


def test_two_processes_train_as_one() -> None:
    """A ring under FSDP2, with checkpointing."""
    found = lines(*torchrun(2), EXAMPLE, *STEPS)
    for ours, theirs in zip(found, alone(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_zero_3_trains_as_one() -> None:
    found = lines(*torchrun(2), "tests/zero_worker.py")
    for ours, theirs in zip(found, alone(), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
