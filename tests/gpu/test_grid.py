"""The grid on the compiled kernels: guard bands, poison, fp64 row by row, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import BACKWARD, FORWARD
from grid import (
    BF16,
    FP16,
    FP32,
    SHORT,
    Case,
    Inputs,
    assert_gradients,
    assert_lse,
    assert_rows,
    attend,
    differentiate,
    draw,
    expected,
    pairs,
    serves,
    vary,
    versions,
    visible,
)
from guards import guarded, poisoned

pytestmark = pytest.mark.timeout(120)
LONGER = [Case(513, 513, heads_q=4), Case(1000, 777), Case(113, 1500), Case(640, 1024, batch=2)]
EVERY_DIM = vary([Case(200, 300)], dim=list(range(8, 257, 8)), causal=[False, True])
LARGER = [
    *vary(LONGER, dim=[64, 128, 256], causal=[False, True]),
    *vary([Case(700, 900, heads_q=8)], dim=[64, 128], window=[(130, 70), (0, 300), (64, 0)]),
    *vary([Case(600, 700, dtype=FP16)], dim=[96, 192], causal=["top-left"], softcap=[0.0, 20.0]),
    *vary([Case(300, 400, dtype=FP32)], dim=[32, 64, 128], causal=[False, True]),
]  # fmt: skip
LONG = [  # v3 takes its long tiles where all heads have 2^18 rows
    *vary([Case(8192, 200, heads_q=32), Case(8201, 129, heads_q=32, dtype=FP16)], dim=[96, 128],
          causal=[False, True, "top-left"]),
    *vary([Case(8193, 300, heads_q=32, heads_kv=1)], dim=[96, 128], window=[(500, 3), (None, 64)]),
    *vary([Case(262201, 260, heads_q=1, heads_kv=1, causal="top-left")], dim=[96, 128]),
]  # fmt: skip
LONG_ROWS = [  # unmasked, from 2048 rows on: at d = 128 v3 rounds dQ in the grid that sums it
    *vary([Case(2111, 1100), Case(2049, 700, heads_q=4, heads_kv=1, dtype=FP16)], dim=[96, 128])
]
LONG_KEYS = vary(  # grouped, from 4096 keys on: at d = 128 v3 zeroes dQ beforehand
    [Case(200, 4200, 128, heads_q=4, heads_kv=1)], causal=[False, True]
)
GROUPS = [
    Case(260, 300, 128, heads_q=h, heads_kv=hk, batch=2, causal=causal)
    for (h, hk), causal in itertools.product([(8, 1), (8, 2), (6, 3), (5, 1)], [False, True])
]
SMOKE = vary([Case(130, 129)], dim=[64, 96, 128, 192, 256], causal=[True], dtype=[BF16, FP16])
SMOKE += vary([Case(70, 66)], dim=[32, 64, 128], dtype=[FP32])


def check_forward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given = poisoned(draw(case), visible(case))
    with guarded(monkeypatch):
        out, lse = attend(version, given, case)
    exact, same_dtype = expected(case)
    assert_rows(out, exact.out, same_dtype.out, "output")
    assert_lse(lse, exact.lse, case.dtype)
    assert not out[:, ~visible(case).any(-1)].any()


def check_backward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch,
                   deterministic: bool = False) -> None:  # fmt: skip
    given = poisoned(draw(case), visible(case))
    with guarded(monkeypatch):
        found = differentiate(version, given, case, deterministic=deterministic)
    exact, same_dtype = expected(case, gradients=True)
    assert_gradients(found, exact, same_dtype)
    unseen = ~visible(case).any(0)
    assert not found.grads[1][:, unseen].any()
    assert not found.grads[2][:, unseen].any()


@pytest.mark.smoke
@pytest.mark.parametrize(("version", "case"), pairs(SMOKE))
def test_smoke_forward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_forward(version, case, monkeypatch)


@pytest.mark.smoke
@pytest.mark.parametrize(("version", "case"), pairs(SMOKE, "backward"))
def test_smoke_backward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_backward(version, case, monkeypatch)


@pytest.mark.parametrize(
    ("version", "case"), pairs([*FORWARD, *EVERY_DIM, *GROUPS, *LARGER, *LONG])
)
def test_forward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_forward(version, case, monkeypatch)


@pytest.mark.parametrize(
    ("version", "case"),
    pairs([*BACKWARD, *EVERY_DIM[::3], *GROUPS, *LARGER, *LONG_ROWS, *LONG_KEYS], "backward"),
)
def test_backward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_backward(version, case, monkeypatch)


@pytest.mark.parametrize(
    ("version", "case"), pairs([*GROUPS, *LARGER[::3], *LONG_ROWS[::2]], "backward")
)
def test_deterministic_backward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_backward(version, case, monkeypatch, deterministic=True)


TAILS = sorted({t * 64 + o for t in (0, 1, 2, 3, 5) for o in (-1, 0, 1, 32, 33)} - {-1, 0})


@pytest.mark.parametrize("gain", [1.0, 5.0])
@pytest.mark.parametrize(
    ("version", "case"), pairs([Case(n, n, heads_kv=1, causal=True) for n in TAILS], "backward")
)
def test_every_tail(version: str, case: Case, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = vary([case], gain=[gain])
    check_backward(version, case, monkeypatch)


@pytest.mark.parametrize("lse", [-60.0, -88.0, -89.0, -120.0, -1e4])
@pytest.mark.parametrize("rows", [64, 96, 192])
@pytest.mark.parametrize("version", versions())
def test_very_negative_lse(version: str, rows: int, lse: float) -> None:
    """exp(0 - lse) overflows where a masked or padded score is taken for 0."""
    case = Case(rows, rows, causal=True, scale=1.0)
    given = draw(case)
    q, k = given.q * 0.05, given.k * 0.05
    q[..., 0], k[..., 0] = 4.0, lse / 4.0
    found = differentiate(version, Inputs(q, k, *given[2:]), case)
    assert bool((found.lse < 0.99 * lse + 20).all())
    assert all(torch.isfinite(x).all() for x in (*found[:2], *found.grads))


@pytest.mark.parametrize("strides", [(0, 7, 3331333), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("version", versions())
def test_strides_of_dims_of_size_one(version: str, strides: tuple[int, int, int]) -> None:
    """They mean nothing, so they may be anything; multiples of 8 elements where a row exists."""
    case = Case(1, 1, heads_q=1, heads_kv=1)
    given = draw(case)
    wanted = differentiate(version, given, case)
    moved = [x.as_strided((1, 1, 1, 64), (*(8 * s for s in strides), 1)) for x in given[:4]]
    found = differentiate(version, Inputs(*moved, given.dlse), case)
    for a, b in zip((*found[:2], *found.grads), (*wanted[:2], *wanted.grads), strict=True):
        assert torch.equal(a, b)


def test_every_version_named_in_the_ids() -> None:
    assert {SHORT[v] for v in versions()} <= {"v1", "v2", "v3"}
    assert all(serves(v, Case()) for v in versions())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("version", "case"),
    pairs(vary([Case(200, 200, causal=True)], dim=[64, 128, 192, 256]), "backward"),
)
def test_keys_stay_with_the_rows_that_see_them(version: str, case: Case, poison: float) -> None:
    """A key that is not finite spoils dQ of the rows that see it, and of no other row."""
    given = draw(case)
    clean = differentiate(version, given, case, deterministic=True).grads[0]
    k, v = given.k.clone(), given.v.clone()
    k[:, 150] = v[:, 150] = poison
    found = differentiate(version, given._replace(k=k, v=v), case, deterministic=True).grads[0]
    assert torch.equal(found[:, :150], clean[:, :150])
    assert not torch.isfinite(found[:, 150:]).any()
