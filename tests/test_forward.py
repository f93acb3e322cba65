"""Output and LSE of every version against fp64, row by row, over the shared grid."""

from __future__ import annotations

import pytest
import torch
from cases import FORWARD
from grid import (
    DEVICE,
    INF,
    Case,
    assert_lse,
    assert_rows,
    attend,
    draw,
    expected,
    pairs,
    versions,
    visible,
)

import flash


@pytest.mark.parametrize(("version", "case"), pairs(FORWARD))
def test_output_and_lse(version: str, case: Case) -> None:
    out, lse = attend(version, draw(case), case)
    exact, same_dtype = expected(case)
    assert out.dtype == case.dtype
    assert out.shape == exact.out.shape
    assert_rows(out, exact.out, same_dtype.out, "output")
    assert_lse(lse, exact.lse, case.dtype)
    assert flash.last_dispatch().backend == version
    unseen = ~visible(case).any(-1)
    assert not out[:, unseen].any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("version", versions())
def test_nothing_to_attend(version: str, shape: tuple[int, int, int]) -> None:
    batch, rows, keys = shape
    q = torch.randn(batch, rows, 2, 64, device=DEVICE).bfloat16().requires_grad_()
    k = torch.randn(batch, keys, 2, 64, device=DEVICE).bfloat16().requires_grad_()
    out, lse = flash.attention(q, k, k, backend=version, return_lse=True)
    assert out.shape == (batch, rows, 2, 64)
    assert lse.shape == (batch, 2, rows)
    assert not out.any()
    assert bool((lse == -INF).all())
    for grad in torch.autograd.grad(out.sum(), [q, k]):
        assert not grad.any()


@pytest.mark.parametrize("version", versions())
def test_into_a_given_output(version: str) -> None:
    case = Case(65, 70, causal=True)
    given = draw(case)
    wanted, _ = attend(version, given, case)
    out = torch.full_like(given.q, float("nan"))
    found, _ = attend(version, given, case, out=out)
    assert found is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("version", versions())
def test_into_a_given_output_with_heads_first(version: str) -> None:
    q, k, v = (torch.randn(2, 3, rows, 64, device=DEVICE).bfloat16() for rows in (5, 7, 7))
    wanted = flash.attention(q, k, v, layout="bhsd", backend=version)
    for out in (torch.empty_like(q), torch.empty(2, 5, 3, 64).to(q).transpose(1, 2)):
        assert flash.attention(q, k, v, layout="bhsd", backend=version, out=out) is out
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("version", versions())
def test_same_bits_every_time(version: str) -> None:
    case = Case(200, 200, causal=True)
    given = draw(case)
    first = attend(version, given, case)
    for _ in range(3):
        again = attend(version, given, case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
