"""Context parallelism on 2 and 4 processes against one: results, gradients, and the schedule."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from door_pages import run_example

import flash
from flash import context_parallel as cp
from flash.context_parallel.ring import step_of
from flash.context_parallel.shards import ends_of, rows_of

WORKER = Path(__file__).parent / "context_worker.py"
BARS = {"torch.float64": 1e-12, "torch.float32": 1e-5, "torch.bfloat16": 2e-2}
worlds = pytest.mark.parametrize("world", [2, 4])


@functools.lru_cache
def report(world: int) -> tuple[tuple[str, ...], ...]:
    """The worker's lines; its processes run once for all tests."""
    run = subprocess.run(
        [sys.executable, str(WORKER), str(world)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return tuple(tuple(line.split()) for line in run.stdout.splitlines())


@worlds
@pytest.mark.parametrize("way", ["ring", "ulysses", "both"])
def test_results_and_gradients(world: int, way: str) -> None:
    cases = [line for line in report(world) if line[0] == "case" and line[1].startswith(way)]
    if way == "both" and world == 2:
        assert not cases
        return
    count = 22 if way == "ulysses" else 20
    assert cases
    assert len(cases) == count or torch.cuda.device_count() >= world  # kernels that were built
    wrong = [line for line in cases if not float(line[3]) <= BARS[line[2]]]
    assert not wrong


@worlds
def test_torchs_own_context_parallel(world: int) -> None:
    """Its ring calls the operators that flash.activate replaces, then merges and sums by itself."""
    found = [line for line in report(world) if line[0] == "torch"]
    assert [line[1] for line in found] == ["v1", "v2", "v3"] or torch.cuda.device_count() >= world
    assert not [line for line in found if not float(line[3]) <= 2 * BARS[line[2]]]


@worlds
def test_refusals(world: int) -> None:
    found = {line[1]: line[2] for line in report(world) if line[0] == "refusal"}
    expected = {
        "ring_rows_differ": "ArgumentValueError", "ring_shard": "ArgumentValueError",
        "ring_packed": "ArgumentValueError", "ulysses_packed": "ArgumentValueError",
        "ring_window": "UnsupportedError", "ulysses_rows_differ": "ArgumentValueError",
        "ulysses_shard": "ArgumentValueError", "ulysses_heads": "ArgumentValueError",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("rings", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_row_has_one_place(rings: int, parts: int) -> None:
    held = [rows_of(24 * 2, (r, rings), (u, parts)) for r in range(rings) for u in range(parts)]
    assert torch.cat(held).sort().values.tolist() == list(range(48))
    assert len({len(rows) for rows in held}) == 1


@pytest.mark.parametrize("rings", [2, 3, 4])
def test_steps_cover_the_triangle_once_and_evenly(rings: int) -> None:
    seqlen = 12 * rings
    seen = torch.zeros(seqlen, seqlen, dtype=torch.int64)
    for own in range(rings):
        mine, work = rows_of(seqlen, (own, rings), (0, 1)), []
        for source in range(rings):
            step = step_of(own, source, True, len(mine))
            rows, keys = mine[step.rows], rows_of(seqlen, (source, rings), (0, 1))[step.keys]
            block = torch.ones(len(rows), len(keys), dtype=torch.int64)
            seen[rows[:, None], keys] += block.tril() if step.causal else block
            work.append(block.tril().sum() if step.causal else block.sum())
        assert int(sum(work)) == seqlen * (seqlen + 1) // 2 // rings
    assert torch.equal(seen, torch.ones_like(seen).tril())


@pytest.mark.parametrize("ends", [None, 3, [0, 1.5], torch.tensor(3), torch.tensor([0.0, 2.0])])
def test_ends_are_ints(ends: Any) -> None:
    with pytest.raises((flash.ArgumentTypeError, flash.ArgumentValueError), match="cu_seqlens"):
        ends_of(ends)


ROWS = torch.zeros(1, 8, 4, 16)
WRONG: list[tuple[str, Any, type[Exception]]] = [
    ("dim", 9, ValueError), ("dim", -5, ValueError), ("dim", 1.5, TypeError),
    ("dim", "rows", TypeError), ("dim", True, TypeError), ("dim", None, TypeError),
    ("x", [1.0], TypeError), ("x", None, TypeError), ("x", torch.tensor(1.0), ValueError),
    ("x", ROWS.to_sparse(), NotImplementedError), ("cu_seqlens", 5, TypeError),
    ("cu_seqlens", [0, 3], ValueError), ("ring", 5, TypeError), ("ulysses", "all", TypeError),
]  # fmt: skip


@pytest.mark.parametrize("function", [cp.shard, cp.unshard], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "value", "error"), WRONG, ids=str)
def test_wrong_shards(name: str, value: Any, error: type[Exception], function: Any) -> None:
    with pytest.raises(error) as caught:
        function(**{"x": ROWS, name: value})
    assert isinstance(caught.value, flash.FlashError)
    assert torch.equal(function(ROWS, dim=-3), ROWS)


@pytest.mark.parametrize("name", ["ring", "ulysses"])
@pytest.mark.parametrize("group", [5, "world", [0, 1], -100, True])
def test_wrong_groups(name: str, group: Any) -> None:
    """-100 is what torch gives to processes that are not in a new group."""
    with pytest.raises(flash.ArgumentTypeError, match=f"{name} must be a process group or None"):
        cp.attention(ROWS, ROWS, ROWS, **{name: group})
    with pytest.raises(flash.ArgumentTypeError, match=f"{name} must be a process group or None"):
        cp.attention_varlen(ROWS[0], ROWS[0], ROWS[0], [0, 8], **{name: group})


def test_page() -> None:
    try:
        run_example("context_parallel")
    finally:
        dist.destroy_process_group()
