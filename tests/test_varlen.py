"""Packed sequences: every engine equals a loop over the sequences, empty ones included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import flash

BACKENDS = ("torch", "reference", "v1", "v2", "v3")
LENGTHS = {
    "even": ((4, 4, 4), (6, 6, 6)),
    "ragged": ((1, 9, 3, 17), (5, 9, 2, 33)),
    "empty-q": ((0, 5, 0), (4, 5, 6)),
    "empty-k": ((3, 5, 2), (0, 7, 0)),
    "both-empty": ((0, 5, 0), (0, 6, 0)),
    "one": ((7,), (11,)),
    "none": ((), ()),
    "longer-q": ((9, 12), (3, 1)),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"causal": "top-left"}, {"window": (3, 2)},
    {"causal": True, "window": (4, None), "softcap": 2.0, "scale": 0.3},
)  # fmt: skip


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def draw(lengths: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    shapes = ((sum(lengths[0]), 4, 16), (sum(lengths[1]), 2, 16), (sum(lengths[1]), 2, 16))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def loop(given: list[Tensor], cu_q: Tensor, cu_k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    outs, lses = [given[0][:0]], [torch.zeros(4, 0)]
    bounds = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (a, b), (c, d) in bounds:
        part = (given[0][None, a:b], given[1][None, c:d], given[2][None, c:d])
        out, lse = flash.attention(*part, return_lse=True, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_a_loop(name: str, options: dict[str, Any], backend: str) -> None:
    dtype = torch.float32 if backend in ("torch", "reference", "v1") else torch.bfloat16
    given, cu = draw(LENGTHS[name], dtype), [ends(x) for x in LENGTHS[name]]
    found = flash.attention_varlen(*given, *cu, return_lse=True, backend=backend, **options)
    expected = loop(given, *cu, backend=backend, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    cotangent, finite = (
        torch.randn_like(found[0]),
        [x[1].clamp_min(-1e30) for x in (found, expected)],
    )
    sides = zip((found, expected), finite, strict=True)
    grads = [
        torch.autograd.grad(
            (out * cotangent).sum() + 0.1 * lse.sum(), given, materialize_grads=True
        )
        for (out, _), lse in sides
    ]
    tolerance = (
        {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_never_leak(backend: str) -> None:
    """NaN in one sequence stays in that sequence."""
    lengths = ((5, 6, 7), (8, 3, 9))
    given = [x.detach() for x in draw(lengths, torch.bfloat16)]
    given[0][5:11] = given[1][8:11] = given[2][8:11] = float("nan")
    cu = [ends(x) for x in lengths]
    out, lse = flash.attention_varlen(*given, *cu, return_lse=True, backend=backend)
    clean = torch.cat([out[:5], out[11:]])
    assert torch.isfinite(clean).all()
    assert torch.isfinite(torch.cat([lse[:, :5], lse[:, 11:]], -1)).all()
    assert torch.isnan(out[5:11]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_given(backend: str) -> None:
    lengths = ((5, 6), (8, 3))
    given = [x.detach() for x in draw(lengths, torch.bfloat16)]
    cu = [ends(x) for x in lengths]
    expected = flash.attention_varlen(*given, *cu, backend=backend)
    out = torch.full((11, 8, 16), float("nan"), dtype=torch.bfloat16)[:, ::2]
    found = flash.attention_varlen(*given, *cu, out=out, backend=backend)
    assert found is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_function(backend: str) -> None:
    lengths = ((5, 6), (8, 3))
    given, cu = draw(lengths, torch.bfloat16), [ends(x) for x in lengths]
    out, lse = flash.attention_varlen(*given, *cu, return_lse=True, causal=True, backend=backend)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, given, dout)
    bare = [x.detach() for x in (dout, *given, out, lse)]
    found = flash.attention_backward(
        *bare, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], causal=True, backend=backend
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given_lengths", [(None, None), (9, 9), (100, 2000)])
def test_longest_lengths(given_lengths: tuple[int | None, int | None]) -> None:
    lengths = ((5, 9), (8, 3))
    given, cu = draw(lengths, torch.float32), [ends(x) for x in lengths]
    expected = loop(given, *cu)
    torch.testing.assert_close(flash.attention_varlen(*given, *cu, *given_lengths), expected[0])


def test_fp8_scales_of_each_sequence() -> None:
    lengths = ((5, 6), (8, 3))
    given = [x.detach().to(torch.float8_e4m3fn) for x in draw(lengths, torch.float32)]
    cu = [ends(x) for x in lengths]
    scales = {f"{n}_descale": torch.rand(2, 1, 2) + 0.5 for n in "qkv"}
    found = flash.attention_varlen(*given, *cu, **scales)
    assert found.dtype == torch.bfloat16
    for i, ((a, b), (c, d)) in enumerate(zip(((0, 5), (5, 11)), ((0, 8), (8, 11)), strict=True)):
        part = (given[0][None, a:b], given[1][None, c:d], given[2][None, c:d])
        own = {name: scale[i : i + 1] for name, scale in scales.items()}
        assert torch.equal(found[a:b], flash.attention(*part, **own)[0])
