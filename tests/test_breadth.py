"""Off the papers' sweep: what is asked, in both directions, and how its rows are kept and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import breadth, record, tables
from flash.study.cases import DIRECTIONS

LENGTHS = (40, 0, 70)


def row(competitor: str, tflops: float, **more: Any) -> dict[str, Any]:
    return {"what": "d = 96", "mask": "full", "length": "512", "competitor": competitor,
            "direction": "backward", "tflops": tflops, "error": 2e-3, **more}  # fmt: skip


@pytest.mark.parametrize("way", DIRECTIONS)
def test_what_is_asked(way: str) -> None:
    found = {what: list(cases) for what, cases in breadth.groups(way).items()}
    assert all(case.direction == way for cases in found.values() for case in cases)
    assert {case.head_dim for case in found["d = 96"]} == {96}
    assert {case.dim_v for case in found["d = 192, V 128"]} == {128}
    assert {case.heads // case.kv_heads for case in found["GQA 8:1, d = 64"]} == {8}
    assert all(case.window for case in found["window, d = 128"])
    assert {case.seqlen for case in found["d = 192"]} == set(breadth.LENGTHS[way])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", DIRECTIONS)
def test_packed_calls_are_right(way: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the schedule runs in v3's place; the peer has no CPU kernels."""
    monkeypatch.setattr(breadth, "present", lambda name: False)
    torch.manual_seed(0)
    tensors = tuple(torch.randn(sum(LENGTHS), 2, 64).bfloat16() for _ in range(4))
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    ends = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70}
    calls = breadth.packed_calls(way, tensors, ends, causal)
    assert list(calls) == ["v3"]
    exact = breadth.last_head(tensors, LENGTHS[-1], causal, way)
    assert len(exact) == (1 if way == "forward" else 3)
    assert breadth.error(calls["v3"](), exact) < 4e-3


def test_rows_are_kept_by_question() -> None:
    """Rows of before there were directions are of the forward pass."""
    old = {"what": "d = 192", "competitor": "v3"}
    found = breadth.by_question([row("v3", 1.0), old, row("fa3", 2.0)])
    assert list(found) == [("backward", "d = 96"), ("forward", "d = 192")]
    assert [r["competitor"] for r in found["backward", "d = 96"]] == ["v3", "fa3"]
    assert found["forward", "d = 192"] == [{"direction": "forward", **old}]


def test_the_best_peer_is_the_measure() -> None:
    refused = {**row("sdpa-cudnn", 0.0), "why": "no"}
    del refused["tflops"]
    rows = [row("v3", 450.0), row("fa3", 500.0), refused]
    assert "| 450 | 500 | – | 0.90 to 0.90 | 2.0e-03 |" in breadth.table(rows)
    alone = breadth.table([row("v3", 450.0), refused])
    assert "| 450 | – | – | – | 2.0e-03 |" in alone


def test_both_directions_have_their_table(tmp_path: Path) -> None:
    now = {"date": "2026-01-02T00:00:00Z", "digest": "abc"}
    ours = [row("v3", 450.0, **now), row("v3", 700.0, **{**now, "direction": "forward"})]
    record.write(tmp_path / "gpu" / "breadth.json",
                 {"environment": {"gpu": "G"}, "breadth": ours})  # fmt: skip
    for way, rate in (("forward", "700"), ("backward", "450")):
        text = tables.broad(tmp_path, way)
        assert rate in text
        assert "G, 2026-01-02" in text
        assert f"--direction {way}" in text
    assert tables.broad(tmp_path / "gpu", "forward") == "Nothing has been recorded yet."
