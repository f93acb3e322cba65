"""Device memory of a call, measured: O(N), and no more than the design allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import DEVICE, Case, attend, draw, versions

import flash

HEADS, DIM = 8, 64


def extra_bytes(run: Callable[[], object]) -> int:
    """Most bytes allocated at a time beyond what was there, results included."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated(DEVICE) - before


def measured(version: str, rows: int) -> tuple[int, int]:
    case = Case(rows, rows, DIM, heads_q=HEADS, heads_kv=HEADS, causal=True)
    given = draw(case)
    q, k, v, dout, _ = given
    out, lse = attend(version, given, case)
    into = [torch.empty_like(x) for x in (q, k, v)]

    def backward() -> object:
        return flash.attention_backward(dout, q, k, v, out, lse, dq=into[0], dk=into[1],
                                        dv=into[2], causal=True, backend=version)  # fmt: skip

    forward = extra_bytes(lambda: attend(version, given, case, out=into[0]))
    return forward, extra_bytes(backward)


@pytest.mark.parametrize("version", versions())
def test_memory_grows_with_n(version: str) -> None:
    one, two, four = (measured(version, n) for n in (2048, 4096, 8192))
    for a, b, c in zip(one, two, four, strict=True):
        assert b - a <= 2.1 * a + (1 << 20)
        assert c - b <= 2.2 * max(b - a, 0) + (1 << 20)


@pytest.mark.smoke
@pytest.mark.parametrize("version", versions())
def test_extra_memory_is_what_the_algorithm_needs(version: str) -> None:
    rows, slack = 8192, 1 << 21  # what a grid-sized schedule may take beside
    forward, backward = measured(version, rows)
    statistic = HEADS * rows * 4
    accumulator = HEADS * rows * DIM * 4
    state = accumulator + 2 * statistic if version == "v1_tiling" else 0  # O, m, l
    assert forward <= statistic + state + slack
    assert backward <= accumulator + 2 * statistic + slack


@pytest.mark.parametrize("version", versions())
def test_a_thousand_calls_leave_memory_as_it_was(version: str) -> None:
    case = Case(256, 256, causal=True)
    given = draw(case)
    attend(version, given, case)
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(1000):
        attend(version, given, case)
    assert torch.cuda.memory_allocated(DEVICE) == before
