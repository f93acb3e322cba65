"""attention and attention_backward under torch.func and forward mode: right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flash

SAVED = ("dout", "q", "k", "v", "out", "lse")
BACKENDS = ("auto", "reference", "v1")


def saved(backend: str = "auto") -> dict[str, Tensor]:
    given = {name: torch.randn(2, 5, 2, 16) for name in ("dout", "q", "k", "v")}
    qkv = (given["q"], given["k"], given["v"])
    out, lse = flash.attention(*qkv, return_lse=True, backend=backend)
    return {**given, "out": out, "lse": lse}


def gradient(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return flash.attention_backward(*(given[name] for name in SAVED), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*SAVED, "dlse"])
@pytest.mark.parametrize("into", [0, 1, 3])
def test_backward_refuses_dual_tensors(name: str, into: int, backend: str) -> None:
    """Alone, and when some or all of the results are written in place."""
    given = saved(backend)
    names = ("dq", "dk", "dv")[:into]
    targets = {name: torch.empty_like(given["q"]) for name in names}
    with forward_ad.dual_level():
        plain = gradient(given, backend=backend)
        dlse = {"dlse": torch.zeros_like(given["lse"])}
        where = dlse if name == "dlse" else given
        where[name] = forward_ad.make_dual(where[name], torch.ones_like(where[name]))
        with pytest.raises(flash.UnsupportedError, match="forward-mode"):
            gradient(given, **(dlse if name == "dlse" else {}), **targets, backend=backend)
    assert all(torch.isfinite(x).all() for x in plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dual_gradient_through_autograd_is_refused(backend: str) -> None:
    q = torch.randn(2, 5, 2, 16, requires_grad=True)
    out = flash.attention(q, q, q, backend=backend)
    watched = torch.ops.flash_generations.forward(
        q, q, q, None, None, 0, 0, None, None, None, False, None, 0.0, None, None, False, False,
        "torch",
    )[0]  # fmt: skip
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        for found in (out, watched):
            with pytest.raises(flash.UnsupportedError, match="forward-mode"):
                torch.autograd.grad(found, q, dout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(4))
def test_an_output_with_dual_tensors_is_refused(place: int, backend: str) -> None:
    """Of q, k, v or of the output itself, dense and packed."""
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with forward_ad.dual_level():
        given = [torch.randn(1, 5, 2, 16) for _ in range(4)]
        q, k, v, out = given
        flash.attention(q, k, v, out=out, backend=backend)
        given[place] = forward_ad.make_dual(given[place], torch.ones_like(q))
        q, k, v, out = given
        with pytest.raises(flash.UnsupportedError, match="forward-mode"):
            flash.attention(q, k, v, out=out, backend=backend)
        q, k, v, out = (x[0] for x in given)
        with pytest.raises(flash.UnsupportedError, match="forward-mode"):
            flash.attention_varlen(q, k, v, ends, ends, out=out, backend=backend)


REFUSALS: dict[str, tuple[str, Callable[..., Any]]] = {
    "grad": ("second derivative", lambda f, x: torch.func.grad(lambda y: f(y).sum())(x)),
    "vjp": ("second derivative", lambda f, x: torch.func.vjp(f, x)[1](x)),
    "jvp": ("forward-mode", lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "jacfwd": ("forward-mode", lambda f, x: torch.func.jacfwd(f)(x)),
}


@pytest.mark.parametrize("way", REFUSALS)
@pytest.mark.parametrize("packed", [False, True])
def test_backward_has_no_derivative(way: str, packed: bool) -> None:
    given, options = saved(), {}
    if packed:
        ends = torch.tensor([0, 4, 10], dtype=torch.int32)
        given = {name: x.flatten(0, 1) for name, x in given.items()}
        given["lse"] = torch.randn(2, 10)
        options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    text, derive = REFUSALS[way]
    with pytest.raises(flash.UnsupportedError, match=text):
        derive(lambda q: gradient({**given, "q": q}, **options)[0], given["q"])


def test_backward_is_mapped() -> None:
    """One call for all, with what is not mapped repeated."""
    given, dout = saved(), torch.randn(3, 2, 5, 2, 16)
    found = torch.func.vmap(lambda x: gradient({**given, "dout": x})[0])(dout)
    for one, row in zip(dout, found, strict=True):
        torch.testing.assert_close(row, gradient({**given, "dout": one})[0])


def test_functionalize() -> None:
    given = saved()
    found = torch.func.functionalize(lambda q: gradient({**given, "q": q})[0])(given["q"])
    assert torch.equal(found, gradient(given)[0])
    out = torch.func.functionalize(lambda q: flash.attention(q, q, q))(given["q"])
    assert torch.equal(out, flash.attention(given["q"], given["q"], given["q"]))
