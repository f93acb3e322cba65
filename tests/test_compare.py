"""compare: every backend measured on the same inputs against fp64."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import flash
from flash.capability import BACKENDS
from flash.compare import Comparison


def draw(dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> list[Tensor]:
    return [torch.randn(1, n, h, dim, dtype=dtype) for n, h in ((40, 4), (70, 2), (70, 2))]


@pytest.fixture(scope="module")
def found() -> Comparison:
    torch.manual_seed(0)
    return flash.compare(*draw(), causal=True, repeats=2)


def test_every_backend_is_there(found: Comparison) -> None:
    rows = found.rows
    assert [row.backend for row in rows] == list(BACKENDS)
    for row in rows:
        assert row.milliseconds > 0
        assert 0 <= row.max_error < 0.05
        assert 0 <= row.relative_error < 0.02
        assert row.lse_error < 1e-2
        assert row.memory_bytes > 0
        assert row.moved_bytes > 0
        assert row.note == ""


def test_reference_rounds_once(found: Comparison) -> None:
    errors = {row.backend: row.relative_error for row in found.rows}
    assert errors["reference"] == min(errors.values())


def test_table_and_data(found: Comparison) -> None:
    text = str(found)
    assert all(name in text for name in (*BACKENDS, "max error", "ms"))
    data = json.loads(json.dumps(found.as_dict()))
    assert data["device"] == "cpu"
    assert found["v2"].backend == "v2_parallel"


def test_what_cannot_run_says_why() -> None:
    found = flash.compare(*draw(torch.float32), backends=["v2", "v1"], repeats=1)
    assert found["v2"].milliseconds is None
    assert "not float32" in found["v2"].note
    assert found["v1"].milliseconds is not None
    assert "not float32" in str(found)


def test_fp8_loses_digits() -> None:
    given = draw()
    full = flash.compare(*given, backends=["torch"], repeats=1)["torch"].relative_error
    low = flash.compare(*given, backends=["torch"], repeats=1, precision="fp8")["torch"]
    assert low.relative_error > 4 * full


def test_float8_inputs() -> None:
    stored = flash.quantize_fp8(*draw())
    scales = dict(zip(("q_descale", "k_descale", "v_descale"), stored[3:], strict=True))
    found = flash.compare(*stored[:3], repeats=1, **scales)
    assert found["v3"].relative_error < 0.05
    assert found["v1"].note


def test_a_backend_can_be_named_twice() -> None:
    found = flash.compare(*draw(), backends=["torch", "torch"], repeats=1)
    assert len(found.rows) == 1


def test_what_was_not_compared_is_not_there(found: Comparison) -> None:
    some = Comparison(found.device, found.rows[:1])
    with pytest.raises(ValueError, match=f"one of those compared: {found.rows[0].backend}"):
        some["reference"]


def test_tensors_without_values_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"q\.device"):
        flash.compare(*(x.to("meta") for x in draw()))
