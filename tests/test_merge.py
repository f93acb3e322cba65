"""Merging partial attentions: exact in every combination of empty parts, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import flash

INF = float("inf")
FP64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def part(kind: str, rows: int = 4) -> tuple[Tensor, Tensor]:
    """ "good": every row saw keys; "empty": none did; "mixed": every other row."""
    q, k, v = draw(1, rows, 2, 8), draw(1, 5, 2, 8), draw(1, 5, 2, 8)
    out, lse = flash.attention(q, k, v, return_lse=True, backend="reference")
    if kind != "good":
        rows_hit = slice(None) if kind == "empty" else slice(0, None, 2)
        out[:, rows_hit], lse[..., rows_hit] = 0.0, -INF
    return out, lse


def textbook(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    stats = torch.stack(lses)
    lse = torch.logsumexp(stats, 0)
    weights = torch.exp(stats - lse.masked_fill(lse == -INF, 0.0)).transpose(-1, -2)[..., None]
    return (torch.stack(outs) * weights).sum(0), lse


KINDS = ("good", "empty", "mixed")
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.product(KINDS, repeat=n)]


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_every_combination(kinds: tuple[str, ...]) -> None:
    outs, lses = (list(x) for x in zip(*(part(kind) for kind in kinds), strict=True))
    out, lse = flash.merge(outs, lses)
    expected_out, expected_lse = textbook(outs, lses)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    assert not out[(lse == -INF).transpose(-1, -2)].any()


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_empty_parts_may_hold_anything(kinds: tuple[str, ...]) -> None:
    outs, lses = (list(x) for x in zip(*(part(kind) for kind in kinds), strict=True))
    expected = flash.merge(outs, lses)
    poisoned = [
        out.masked_fill((lse == -INF).transpose(-1, -2)[..., None], float("nan"))
        for out, lse in zip(outs, lses, strict=True)
    ]
    for a, b in zip(flash.merge(poisoned, lses), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hidden", [0.0, float("nan"), INF])
@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_gradients_stay_finite(kinds: tuple[str, ...], hidden: float) -> None:
    outs, lses = (list(x) for x in zip(*(part(kind) for kind in kinds), strict=True))
    for out, lse in zip(outs, lses, strict=True):
        out[(lse == -INF).transpose(-1, -2)] = hidden
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = flash.merge(outs, lses)
    grads = torch.autograd.grad(out.sin().sum() + lse[lse > -INF].sin().sum(), leaves)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.isfinite(grad).all()
        if leaf.ndim == 3:
            assert not grad[leaf == -INF].any()


@pytest.mark.parametrize("kinds", [("good", "good"), ("mixed", "good"), ("good", "mixed", "good")],
                         ids="-".join)  # fmt: skip
def test_gradcheck(kinds: tuple[str, ...]) -> None:
    outs, lses = (list(x) for x in zip(*(part(kind, 3) for kind in kinds), strict=True))
    seen = [lse > -INF for lse in lses]
    inputs = [x.requires_grad_() for x in outs]
    free = [lse[s].clone().requires_grad_() for lse, s in zip(lses, seen, strict=True)]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        stats = [
            torch.full(s.shape, -INF, dtype=FP64).masked_scatter(s, x)
            for s, x in zip(seen, given[len(kinds) :], strict=True)
        ]
        return flash.merge(list(given[: len(kinds)]), stats)

    assert torch.autograd.gradcheck(call, (*inputs, *free))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("cuts", [(5,), (1, 8), (3, 3, 9), tuple(range(1, 12))], ids=str)
def test_parts_make_the_whole(cuts: tuple[int, ...], backend: str) -> None:
    """Keys in chunks, one of them empty now and then, against all keys at once."""
    q, k, v = (draw(2, n, 4, 16).requires_grad_() for n in (6, 12, 12))
    whole = flash.attention(q, k, v, return_lse=True, backend=backend)
    spans = itertools.pairwise((0, *cuts, 12))
    parts = [
        flash.attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend=backend) for a, b in spans
    ]
    joined = flash.merge(*(list(x) for x in zip(*parts, strict=True)))
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b)
    losses = [out.sin().sum() + lse.sin().sum() for out, lse in (joined, whole)]
    for a, b in zip(*(torch.autograd.grad(loss, (q, k, v)) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


def test_order_and_grouping_do_not_matter() -> None:
    parts = [part(kind) for kind in ("good", "mixed", "empty", "good")]
    whole = flash.merge(*(list(x) for x in zip(*parts, strict=True)))
    for order in itertools.permutations(parts):
        a = flash.merge(*(list(x) for x in zip(*order[:2], strict=True)))
        b = flash.merge(*(list(x) for x in zip(*order[2:], strict=True)))
        for found, expected in zip(flash.merge(*zip(a, b, strict=True)), whole, strict=True):
            torch.testing.assert_close(found, expected)


def test_far_apart_logits() -> None:
    outs = [torch.ones(1, 2, 1, 8), torch.full((1, 2, 1, 8), 3.0)]
    lses = [torch.tensor([[[1e4, -1e4]]]), torch.tensor([[[-1e4, -1e4]]])]
    out, lse = flash.merge(outs, lses)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([1e4, -1e4 + 0.6931472]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP64])
def test_dtypes(dtype: torch.dtype) -> None:
    stats = FP64 if dtype == FP64 else torch.float32
    outs, lses = draw(3, 1, 4, 2, 8, dtype=dtype), draw(3, 1, 2, 4, dtype=stats)
    out, lse = flash.merge(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, stats)
    expected, _ = textbook(list(outs.double()), list(lses.double()))
    torch.testing.assert_close(out, expected.to(dtype))


def test_layouts() -> None:
    outs, lses = draw(2, 3, 4, 2, 8), draw(2, 3, 2, 4)
    out, lse = flash.merge(outs, lses)
    turned, same = flash.merge(outs.transpose(2, 3), lses, layout="bhsd")
    assert torch.equal(turned.transpose(1, 2), out)
    assert torch.equal(same, lse)
    packed, flat = flash.merge(outs[:, 0], lses[:, 0])
    assert torch.equal(packed, out[0])
    assert torch.equal(flat, lse[0])


def test_no_rows() -> None:
    out, lse = flash.merge([torch.empty(0, 0, 2, 8)] * 2, [torch.empty(0, 2, 0)] * 2)
    assert out.shape == (0, 0, 2, 8)
    assert lse.shape == (0, 2, 0)
