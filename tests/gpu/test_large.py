"""Offsets beyond 2^31 elements, grids beyond 65535, long rows: checked where they overflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from grid import (
    BF16,
    DEVICE,
    Case,
    Inputs,
    assert_gradients,
    assert_lse,
    assert_rows,
    attend,
    by_autograd,
    differentiate,
    expected,
    rounding_of_saved_out,
    versions,
)
from torch import Tensor

import flash

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def memory_goes_back() -> Iterator[None]:
    yield
    expected.cache_clear()
    torch.cuda.empty_cache()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16)


def check_part(case: Case, found: tuple[Tensor, ...], one: Inputs) -> None:
    """A slice of batch and heads against fp64; `found` is (out, lse, dq, dk, dv) of that slice."""
    exact = by_autograd(case, one, torch.float64, gradients=True)
    exact = exact._replace(saved=rounding_of_saved_out(case, one, exact))
    same = by_autograd(case, one, case.dtype, gradients=True)
    assert_rows(found[0], exact.out, same.out, "output")
    assert_lse(found[1], exact.lse, case.dtype)
    assert_gradients(exact._replace(grads=found[2:]), exact, same)


@pytest.mark.parametrize("version", versions())
def test_more_than_2_31_elements_and_65535_heads(version: str) -> None:
    """q, k, v, out and every gradient: 70000 x 64 x 8 x 64 elements, 560000 (batch, head) pairs."""
    case = Case(64, 64, 64, heads_q=8, heads_kv=8, batch=70000, causal=True)
    given = Inputs(*(random(70000, 64, 8, 64) for _ in range(4)),
                   torch.randn(70000, 8, 64, device=DEVICE))  # fmt: skip
    assert given.q.numel() > 2**31
    answer = differentiate(version, given, case)
    everything = (answer.out, answer.lse, *answer.grads)
    for at in (slice(0, 2), slice(34999, 35001), slice(65534, 65537), slice(69998, 70000)):
        one = Inputs(*(x[at] for x in given))
        part = replace(case, batch=at.stop - at.start)
        check_part(part, tuple(x[at] for x in everything), one)
    for x in everything:
        assert bool(torch.isfinite(x.sum(dtype=torch.float32)))


@pytest.mark.parametrize(("batch", "heads"), [(1, 70000), (70000, 1), (3, 30000)])
@pytest.mark.parametrize("version", versions())
def test_grids_beyond_65535(version: str, batch: int, heads: int) -> None:
    case = Case(17, 33, 64, heads_q=heads, heads_kv=heads, batch=batch)
    given = Inputs(random(batch, 17, heads, 64), random(batch, 33, heads, 64),
                   random(batch, 33, heads, 64), random(batch, 17, heads, 64),
                   torch.randn(batch, heads, 17, device=DEVICE))  # fmt: skip
    answer = differentiate(version, given, case)
    b, h = slice(batch - 1, batch), slice(heads - 1, heads)
    one = Inputs(*(x[b, :, h] for x in given[:4]), given.dlse[b, h])
    part = replace(case, batch=1, heads_q=1, heads_kv=1)
    grads = tuple(x[b, :, h] for x in answer.grads)
    check_part(part, (answer.out[b, :, h], answer.lse[b, h], *grads), one)


@pytest.mark.parametrize("seqlen", [32769, 65537, 131073])
@pytest.mark.parametrize("version", versions())
def test_last_rows_of_long_sequences(version: str, seqlen: int) -> None:
    case = Case(seqlen, seqlen, 64, heads_q=1, heads_kv=1, causal=True)
    q, k, v = (random(1, seqlen, 1, 64) for _ in range(3))
    given = Inputs(q, k, v, q, torch.empty(0))
    out, lse = attend(version, given, case)
    tail = Case(64, seqlen, 64, heads_q=1, heads_kv=1, causal=True)
    one = Inputs(q[:, -64:], k, v, q[:, -64:], torch.zeros(1, 1, 64, device=DEVICE))
    exact = by_autograd(tail, one, torch.float64, gradients=False)
    same = by_autograd(tail, one, BF16, gradients=False)
    assert_rows(out[:, -64:], exact.out, same.out, "last rows")
    assert_lse(lse[..., -64:], exact.lse, BF16)


@pytest.mark.parametrize("version", versions())
def test_strides_beyond_2_31(version: str) -> None:
    """Two batch entries 2^31 elements apart, in one allocation."""
    case = Case(70, 70, 64, heads_q=2, heads_kv=2, batch=2, causal=True)
    apart = 2**31 + 64
    room = torch.empty(apart + (1 << 20), dtype=BF16, device=DEVICE)
    views = []
    for n in range(4):
        view = room[n * 16384 :].as_strided((2, 70, 2, 64), (apart, 128, 64, 1))
        view.copy_(random(2, 70, 2, 64))
        views.append(view)
    dlse = torch.randn(2, 2, 70, device=DEVICE)
    plain = differentiate(version, Inputs(*(x.contiguous() for x in views), dlse), case,
                          deterministic=True)  # fmt: skip
    found = differentiate(version, Inputs(*views, dlse), case, deterministic=True)
    for a, b in zip((*found[:2], *found.grads), (*plain[:2], *plain.grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("version", versions())
def test_packed_beyond_2_31(version: str) -> None:
    """The last of three sequences starts beyond element 2^31."""
    rows, heads = 150_000, 128
    q = random(2 * rows, heads, 64)
    q = torch.cat([q, q[:70]])
    assert q[:-70].numel() > 2**31
    ends = torch.tensor([0, rows, 2 * rows, 2 * rows + 70], dtype=torch.int32, device=DEVICE)
    # a narrow window keeps the two long sequences cheap
    out = flash.attention_varlen(q, q, q, ends, ends, rows, rows, window=(8, 8), backend=version)
    alone = flash.attention(q[None, -70:], q[None, -70:], q[None, -70:], window=(8, 8),
                            backend=version)  # fmt: skip
    assert torch.equal(out[None, -70:], alone)
