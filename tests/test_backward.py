"""Gradients of every version against fp64, row by row, through autograd and called directly."""

from __future__ import annotations

import pytest
import torch
from cases import BACKWARD
from grid import (
    DEVICE,
    Case,
    Inputs,
    assert_gradients,
    attend,
    differentiate,
    draw,
    expected,
    pairs,
    versions,
    visible,
)

import flash

SMALL = Case(70, 80, causal=True)


@pytest.mark.parametrize(("version", "case"), pairs(BACKWARD, "backward"))
def test_gradients(version: str, case: Case) -> None:
    """With a gradient on the output and one on the LSE."""
    found = differentiate(version, draw(case), case)
    assert_gradients(found, *expected(case, gradients=True))
    assert {grad.dtype for grad in found.grads} == {case.dtype}
    seen = visible(case)
    assert not found.grads[0][:, ~seen.any(1)].any()
    assert not found.grads[1][:, ~seen.any(0)].any()
    assert not found.grads[2][:, ~seen.any(0)].any()


def direct(version: str, given: Inputs, case: Case, **more: object) -> tuple[torch.Tensor, ...]:
    out, lse = attend(version, given, case)
    q, k, v, dout, dlse = given
    return flash.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, backend=version, deterministic=True, **case.options,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("version", versions())
def test_called_directly_equals_autograd(version: str) -> None:
    given = draw(SMALL)
    by_autograd = differentiate(version, given, SMALL, deterministic=True).grads
    found = direct(version, given, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(found, by_autograd, strict=True))


@pytest.mark.parametrize("version", versions())
def test_into_given_gradients(version: str) -> None:
    given = draw(SMALL)
    wanted = direct(version, given, SMALL)
    into = [torch.full_like(x, float("nan")) for x in given[:3]]
    found = direct(version, given, SMALL, **dict(zip(("dq", "dk", "dv"), into, strict=True)))
    for a, b, c in zip(into, found, wanted, strict=True):
        assert a is b
        assert torch.equal(a, c)


@pytest.mark.parametrize("version", versions())
def test_lse_alone_carries_a_gradient(version: str) -> None:
    given = draw(SMALL)
    q, k = (x.detach().requires_grad_() for x in given[:2])
    _, lse = attend(version, Inputs(q, k, *given[2:]), SMALL)
    dq, dk = torch.autograd.grad(lse, [q, k], given.dlse)
    silent = given._replace(dout=torch.zeros_like(given.dout))
    wanted = differentiate(version, silent, SMALL).grads
    torch.testing.assert_close(dq, wanted[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(dk, wanted[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("version", versions())
def test_dout_of_any_strides(version: str, kind: str) -> None:
    given = draw(SMALL)
    wide = torch.randn(1, 2, 70, 128, device=DEVICE).bfloat16()
    dout = {
        "expanded": wide[:, :1, :1, :64].expand(1, 70, 2, 64),
        "transposed": wide[..., :64].transpose(1, 2),
        "sliced": wide[..., 64:].permute(0, 2, 1, 3),
    }[kind]
    wanted = differentiate(version, given._replace(dout=dout.contiguous()), SMALL,
                           deterministic=True)  # fmt: skip
    found = differentiate(version, given._replace(dout=dout), SMALL, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(found.grads, wanted.grads, strict=True))


@pytest.mark.parametrize("version", versions())
def test_deterministic_gives_the_same_bits(version: str) -> None:
    case = Case(257, 257, causal=True)
    given = draw(case)
    first = differentiate(version, given, case, deterministic=True).grads
    for _ in range(3):
        again = differentiate(version, given, case, deterministic=True).grads
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
