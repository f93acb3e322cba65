"""What flash.attention adds to the engine that it calls, per call, in eager mode on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash
from flash import memory
from flash.engines import torch_sdpa
from flash.spec import Spec

LIMIT = 25e-6


def best(run: Callable[[], Any], calls_each: int = 40, rounds: int = 150) -> float:
    """Seconds of this thread's processor time per call, in the quietest round."""
    quietest = float("inf")
    collects = gc.isenabled()
    gc.disable()  # as timeit does: what other tests left behind is not this call's cost
    try:
        for _ in range(rounds):
            begin = time.thread_time()
            for _ in range(calls_each):
                run()
            quietest = min(quietest, (time.thread_time() - begin) / calls_each)
    finally:
        if collects:
            gc.enable()
    return quietest


def tensors(layout: str) -> list[torch.Tensor]:
    shape = (1, 8, 2, 16) if layout == "bshd" else (1, 2, 8, 16)
    return [torch.randn(shape) for _ in range(3)]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("lse", [False, True])
def test_overhead(layout: str, lse: bool, record_property: Callable[[str, object], None]) -> None:
    """Checks, choice of backend and bookkeeping; the views that "bhsd" needs are the engine's."""
    q, k, v = tensors(layout)
    views = (lambda x: x) if layout == "bshd" else (lambda x: x.transpose(1, 2))
    spec = Spec(16**-0.5)
    run = torch_sdpa.forward
    engine = whole = float("inf")
    for _ in range(25):  # until both met a quiet moment
        engine = min(engine, best(lambda: views(run(views(q), views(k), views(v), spec)[0])))
        whole = min(whole, best(lambda: flash.attention(q, k, v, layout=layout, return_lse=lse)))
        if whole - engine < LIMIT:
            break
    record_property("overhead_us", 1e6 * (whole - engine))
    assert whole - engine < LIMIT, f"{1e6 * (whole - engine):.1f} us"


def test_remembered_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_KEPT", 8)
    memory.kept.clear()
    for rows in range(1, 40):
        q = torch.randn(1, rows, 2, 16)
        flash.attention(q, q, q)
        assert len(memory.kept) <= 8


def test_a_window_may_be_a_list() -> None:
    q = torch.randn(1, 8, 2, 16)
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert torch.equal(
        flash.attention(q, q, q, window=[2, 0]), flash.attention(q, q, q, window=(2, 0))
    )
    packed = (q[0], q[0], q[0], lengths, lengths)
    assert torch.equal(
        flash.attention_varlen(*packed, window=[2, 0]),
        flash.attention_varlen(*packed, window=(2, 0)),
    )


def test_memory_holds_no_tensor() -> None:
    q = torch.randn(1, 8, 2, 16)
    flash.attention(q, q, q)
    flat: list[Any] = []
    for key, ready in memory.kept.items():
        flat += [*key, *ready]
    assert not any(isinstance(x, torch.Tensor) for x in flat)
