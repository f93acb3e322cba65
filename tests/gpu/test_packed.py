"""Packed sequences on the kernels: empties anywhere, neighbours full of NaN, guard bands."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from grid import (
    BF16,
    FP16,
    Answer,
    Case,
    Inputs,
    assert_gradients,
    assert_lse,
    assert_rows,
    by_autograd,
    draw,
    pairs,
    rounding_of_saved_out,
    versions,
)
from guards import cumulative, guarded, surrounded
from torch import Tensor

import flash

pytestmark = pytest.mark.timeout(120)
LENGTHS = {
    "one": [(70, 90)],
    "even": [(64, 64), (128, 128), (64, 64)],
    "edges": [(1, 129), (127, 1), (65, 63), (128, 257)],
    "empty first": [(0, 0), (0, 5), (60, 70)],
    "empty keys": [(64, 0), (33, 64), (1, 0)],
    "empty last": [(130, 140), (70, 0), (0, 64), (0, 0)],
    "skewed": [(1, 1), (300, 310), (2, 3), (1, 700)],
    "many": [(n % 7, n % 11) for n in range(40)],
}
OPTIONS = [
    Case(), Case(causal=True), Case(causal="top-left", dim=128), Case(window=(40, 10), dtype=FP16),
    Case(causal=True, heads_q=6, softcap=10.0), Case(dim=128, heads_q=4, heads_kv=1, causal=True),
    Case(dim=256, causal=True), Case(dim=72, window=(9, None)),
]  # fmt: skip


def attend_packed(version: str, given: list[Tensor], lengths: list[tuple[int, int]], case: Case,
                  **more: object) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, keys = zip(*lengths, strict=True)
    out, lse = flash.attention_varlen(
        *given, cumulative(list(rows)), cumulative(list(keys)), max(rows), max(keys),
        backend=version, return_lse=True, **case.options, **more,
    )  # fmt: skip
    return out, lse


def oracle(case: Case, one: Inputs, dtype: torch.dtype) -> Answer:
    answer = by_autograd(case, one, dtype, gradients=True)
    return (
        answer._replace(saved=rounding_of_saved_out(case, one, answer))
        if dtype.itemsize == 8
        else answer
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("version", "case"), pairs(OPTIONS, "backward"))
def test_packed(version: str, case: Case, lengths: list[tuple[int, int]],
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rows, keys = (sum(x) for x in zip(*lengths, strict=True))
    given = draw(replace(case, seqlen_q=rows, seqlen_k=keys))
    leaves = [surrounded(x)[0].detach().requires_grad_() for x in given[:3]]
    with guarded(monkeypatch):
        out, lse = attend_packed(version, leaves, lengths, case)
        grads = torch.autograd.grad([out, lse], leaves, [given.dout[0], given.dlse[0]])
    row = key = 0
    for n, m in lengths:
        at, to = slice(row, row + n), slice(key, key + m)
        part = replace(case, seqlen_q=n, seqlen_k=m)
        one = Inputs(given.q[:, at], given.k[:, to], given.v[:, to], given.dout[:, at],
                     given.dlse[..., at])  # fmt: skip
        exact, same = oracle(part, one, torch.float64), oracle(part, one, case.dtype)
        found = Answer(out[None, at], lse[None, :, at],
                       (grads[0][None, at], grads[1][None, to], grads[2][None, to]))  # fmt: skip
        assert_rows(found.out, exact.out, same.out, f"output of rows {row} to {row + n}")
        assert_lse(found.lse, exact.lse, case.dtype)
        assert_gradients(found, exact, same)
        row, key = row + n, key + m


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("version", versions())
def test_neighbours_do_not_reach_over(version: str, poison: float) -> None:
    """A sequence of NaN spoils its own rows only, whatever tile its keys share."""
    lengths = [(70, 70), (30, 31), (65, 65)]
    case = Case(causal=True, dtype=BF16)
    given = draw(replace(case, seqlen_q=165, seqlen_k=166))
    leaves = [x[0].clone() for x in given[:3]]
    clean, clean_lse = attend_packed(version, leaves, lengths, case)
    for x in leaves[1:]:
        x[70:101] = poison
    out, lse = attend_packed(version, leaves, lengths, case)
    for keep in (slice(0, 70), slice(100, 165)):
        assert torch.equal(out[keep], clean[keep])
        assert torch.equal(lse[:, keep], clean_lse[:, keep])


@pytest.mark.parametrize("version", versions())
def test_keys_without_queries_may_be_anything(version: str) -> None:
    lengths = [(40, 50), (0, 90), (30, 20)]
    given = draw(Case(70, 160))
    leaves = [x[0].clone() for x in given[:3]]
    clean, _ = attend_packed(version, leaves, lengths, Case())
    leaves[1][50:140], leaves[2][50:140] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in leaves]
    out, _ = attend_packed(version, leaves, lengths, Case())
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out, leaves, given.dout[0])
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[1][50:140].any()
