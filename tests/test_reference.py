"""The oracle itself, and the torch engine, against the textbook formula in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import flash
from flash.engines import reference, torch_sdpa
from flash.engines.torch_sdpa import pieces
from flash.spec import Spec

INF = float("inf")
SIZES = ((1, 1), (5, 5), (5, 9), (9, 5), (1, 40), (40, 1), (70, 90), (90, 70))
BANDS = ((None, None), (None, 0), (3, 0), (2, 3), (None, 4), (0, None), (0, 0))
SCORES = ((0.3, 0.0), (-0.4, 0.0), (0.0, 0.0), (0.5, 2.0))


def seen(spec: Spec, rows: int, keys: int) -> Tensor:
    first, last = spec.band(rows, keys)
    r, c = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    mask = torch.ones(rows, keys, dtype=torch.bool)
    if first is not None:
        mask &= c >= r + first
    if last is not None:
        mask &= c <= r + last
    return mask


def textbook(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * spec.scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    s = s.masked_fill(~seen(spec, q.shape[1], k.shape[1]), -INF)
    lse = torch.logsumexp(s, -1)
    empty = (lse == -INF)[..., None]
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


def draw(rows: int, keys: int) -> list[Tensor]:
    shapes = ((2, rows, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("engine", [reference, torch_sdpa], ids=["reference", "torch"])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("top_left", [False, True])
def test_against_the_textbook(
    top_left: bool, band: tuple[Any, Any], scores: tuple[float, float], engine: Any
) -> None:
    spec = Spec(*scores, *band, top_left)
    for rows, keys in SIZES:
        given = draw(rows, keys)
        out, lse = textbook(*given, spec)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        for use in (None, dlse):
            loss = (out * dout).sum()
            if use is not None:
                loss = loss + (lse * dlse)[lse > -INF].sum()
            expected = torch.autograd.grad(loss, given, retain_graph=True)
            with torch.no_grad():
                found = engine.forward(*given, spec)
                grads = engine.backward(dout, use, *given, *found, spec)
            torch.testing.assert_close(found.out, out)
            torch.testing.assert_close(found.lse, lse)
            for a, b in zip(grads, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top_left", [False, True])
@pytest.mark.parametrize("right", [None, 0])
def test_pieces_are_the_mask(right: int | None, top_left: bool) -> None:
    for rows, keys in itertools.product(range(1, 9), repeat=2):
        count = torch.zeros(rows, keys)
        for piece in pieces(None, right, top_left, rows, keys) or ():
            part = count[piece.rows, piece.keys]
            part += torch.ones_like(part).tril() if piece.causal else 1
        expected = seen(Spec(1.0, 0.0, None, right, top_left), rows, keys)
        assert torch.equal(count, expected.float())


def test_windows_are_no_pieces() -> None:
    assert pieces(3, 0, False, 5, 5) is None
    assert pieces(None, 2, False, 5, 5) is None


@pytest.mark.parametrize("block", [4, 16, 64])
def test_blocks_do_not_show(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(0.3, 0.0, 30, 5)
    given = [x.detach() for x in draw(100, 130)]
    whole = reference.forward(*given, spec)
    grads = reference.backward(whole.out, whole.lse, *given, *whole, spec)
    monkeypatch.setattr(reference, "BLOCK_MIN", block)
    monkeypatch.setattr(reference, "BLOCK_MAX", block)
    cut = reference.forward(*given, spec)
    torch.testing.assert_close(cut.out, whole.out)
    torch.testing.assert_close(cut.lse, whole.lse)
    for a, b in zip(
        reference.backward(whole.out, whole.lse, *given, *whole, spec), grads, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_long_sequences_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No (rows x keys) tensor: 128k keys under a narrow window, in a few megabytes of blocks."""
    monkeypatch.setattr(reference, "BLOCK_MAX", 128)
    q, k, v = (torch.randn(1, 131072, 1, 8) for _ in range(3))
    out, lse = flash.attention(q, k, v, causal=True, window=(64, None), return_lse=True,
                               backend="reference")  # fmt: skip
    tail = slice(131072 - 65, None)
    last, last_lse = flash.attention(q[:, -1:], k[:, tail], v[:, tail], return_lse=True,
                                     backend="reference")  # fmt: skip
    torch.testing.assert_close(out[:, -1:], last)
    torch.testing.assert_close(lse[..., -1:], last_lse)


def test_math_in_fp32_on_request() -> None:
    given = [x.detach().float() for x in draw(20, 30)]
    spec = Spec(0.3)
    exact, single = (
        reference.forward(*given, spec, math_dtype=d) for d in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(exact.out, single.out)
    assert not torch.equal(exact.out, single.out)


@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (2, 2)}, {"causal": "top-left"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_hidden_values_never_matter(backend: str, options: dict[str, Any], poison: float) -> None:
    """The last keys are poisoned: rows that do not see them keep their bits."""
    q, k, v = (x.detach() for x in draw(12, 12))
    clean = flash.attention(q, k, v, return_lse=True, backend="reference", **options)
    k[:, -3:], v[:, -3:] = poison, poison
    out, lse = flash.attention(q, k, v, return_lse=True, backend=backend, **options)
    blind = slice(0, 7)
    torch.testing.assert_close(out[:, blind], clean[0][:, blind])
    torch.testing.assert_close(lse[..., blind], clean[1][..., blind])
    dout = torch.zeros_like(out)
    dout[:, blind] = 1.0
    grads = flash.attention_backward(dout, q, k, v, clean[0], clean[1], backend=backend, **options)
    assert torch.isfinite(grads[0][:, blind]).all()
    assert all(torch.isfinite(x[:, :5]).all() for x in grads[1:])


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_visible_values_do_matter(poison: float) -> None:
    q, k, v = (x.detach() for x in draw(6, 6))
    v[:, 3] = poison
    for backend in ("torch", "reference"):
        out = flash.attention(q, k, v, causal=True, backend=backend)
        assert torch.isfinite(out[:, :3]).all()
        assert not torch.isfinite(out[:, 3:]).any()


@pytest.mark.parametrize("backend", ["torch", "reference", "v1", "v2", "v3"])
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)], ids=str)
def test_empties_are_legal(shape: tuple[int, int, int], backend: str) -> None:
    batch, rows, keys = shape
    q = torch.randn(batch, rows, 4, 16).half().requires_grad_()
    k, v = (torch.randn(batch, keys, 2, 16).half().requires_grad_() for _ in range(2))
    out, lse = flash.attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (batch, rows, 4, 16)
    assert lse.shape == (batch, 4, rows)
    assert not out.any()
    assert (lse == -INF).all()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
def test_fp8_is_close(granularity: str, backend: str) -> None:
    q, k, v = (torch.randn(2, n, h, 64) for n, h in ((150, 4), (300, 2), (300, 2)))
    stored = flash.quantize_fp8(q, k, v, granularity=granularity)
    out, lse = flash.attention(*stored[:3], **dict(zip(
        ("q_descale", "k_descale", "v_descale"), stored[3:], strict=True)),
        return_lse=True, backend=backend)  # fmt: skip
    exact, exact_lse = flash.attention(q, k, v, return_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.06 * exact.norm()
    torch.testing.assert_close(lse, exact_lse, atol=0.1, rtol=0)


def test_fp8_precision_has_a_gradient() -> None:
    q, k, v = (torch.randn(1, 64, 2, 64).bfloat16().requires_grad_() for _ in range(3))
    low = flash.attention(q, k, v, precision="fp8")
    high = flash.attention(q, k, v)
    dout = torch.randn_like(low)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (low, high)), strict=True):
        assert (a - b).float().norm() < 0.2 * b.float().norm()
