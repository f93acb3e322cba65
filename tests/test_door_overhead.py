"""What a door adds to a direct call of flash.attention, per call, in eager mode.

On a CPU the engine does no work, so that microseconds stand out; on a GPU the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import DEVICE, ON_GPU
from test_overhead import best
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import flash
from flash import context_parallel
from flash.compat.flash_attn import flash_attn_func
from flash.compat.transformers import register
from flash.engines import reference
from flash.spec import Result

LIMIT = 15e-6
BACKEND = "auto" if ON_GPU else "reference"
Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def engine_of_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then do a few microseconds stand out on a shared machine."""
    if ON_GPU:
        return
    lse = torch.zeros(1, 2, 8)
    monkeypatch.setattr(reference, "forward", lambda q, *_, **__: Result(q, lse))


def draw(*shape: int) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3)]


def added(door: Callable[[], Any], direct: Callable[[], Any]) -> float:
    """Seconds, once both sides met quiet moments; they take turns."""
    slow = fast = float("inf")
    for attempt in range(100):
        fast = min(fast, best(direct, rounds=10))
        slow = min(slow, best(door, rounds=10))
        if attempt >= 10 and slow - fast < LIMIT:
            break
    return slow - fast


def check(seconds: float, record: Record) -> None:
    record("overhead_us", 1e6 * seconds)
    assert seconds < LIMIT, f"{1e6 * seconds:.1f} us"


def test_flash_attn(record_property: Record) -> None:
    q, k, v = draw(1, 8, 2, 16)
    options = {"causal": True, "backend": BACKEND}
    door = added(
        lambda: flash_attn_func(q, k, v, **options),
        lambda: flash.attention(q, k, v, **options),
    )
    check(door, record_property)


@pytest.mark.parametrize("door", ["as_sdpa", "activate"])
def test_sdpa(door: str, record_property: Record) -> None:
    q, k, v = draw(1, 2, 8, 16)

    def inside() -> None:
        scaled_dot_product_attention(q, k, v)

    def direct() -> None:
        flash.attention(q, k, v, layout="bhsd", backend=BACKEND)

    slow = fast = float("inf")
    for attempt in range(100):  # the direct call is measured outside
        fast = min(fast, best(direct, rounds=10))
        if door == "as_sdpa":
            with flash.as_sdpa(BACKEND):
                slow = min(slow, best(inside, rounds=10))
        else:
            flash.activate(BACKEND)
            try:
                slow = min(slow, best(inside, rounds=10))
            finally:
                flash.deactivate()
        if attempt >= 10 and slow - fast < LIMIT:
            break
    check(slow - fast, record_property)


def test_transformers(record_property: Record) -> None:
    attend = AttentionInterface()[register(backend=BACKEND)]
    q, k, v = draw(1, 2, 8, 16)
    layer, given = torch.nn.Identity(), {"scaling": 0.25, "position_ids": None, "use_cache": False}
    door = added(
        lambda: attend(layer, q, k, v, None, **given),
        lambda: flash.attention(q, k, v, causal=True, layout="bhsd", scale=0.25, backend=BACKEND),
    )
    check(door, record_property)


def test_context_parallel(record_property: Record) -> None:
    """In a group of one nothing is exchanged."""
    q, k, v = draw(1, 8, 2, 16)
    door = added(
        lambda: context_parallel.attention(q, k, v, causal=True, backend=BACKEND),
        lambda: flash.attention(q, k, v, causal=True, backend=BACKEND),
    )
    check(door, record_property)
