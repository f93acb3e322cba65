"""The short way to kernels: here a module computes on the CPU from the addresses it is given."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flash
from flash import calls, dispatch, memory
from flash.engines import kernels, prepared, reference
from flash.spec import Spec

Views = tuple[tuple[int, int, int, int], ...]
HEADS, HEADS_KV, ROWS, KEYS, DIM, DIM_V = 4, 2, 24, 40, 16, 8
SHAPES = ((2, ROWS, HEADS, DIM), (2, KEYS, HEADS_KV, DIM), (2, KEYS, HEADS_KV, DIM_V))


def at(place: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The float32 tensor at an address."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (4 * count)).from_address(place)
    return torch.frombuffer(memory, dtype=torch.float32, count=count).as_strided(shape, strides)


class Dense:
    """A kernel's stand-in: what comes in are numbers, what goes out is written to memory."""

    direction = kernels.FORWARD
    status = 0
    settled = 0

    def __init__(self, problem: Any, lse: tuple[int, int, int], *views: Any) -> None:
        type(self).settled += 1
        self.problem, self.lse, self.views = problem, lse, views

    def __call__(self, workspace: int, stream: int, lse: int, *places: int) -> int:
        assert (workspace > 0, stream) == (True, 7)
        p = self.problem
        found = []
        for n, (place, view) in enumerate(zip(places, self.views, strict=True)):
            keys = n in (1, 2, 6, 7)
            rows, heads = (p.seqlen_k, p.heads_kv) if keys else (p.seqlen_q, p.heads_q)
            dim = p.head_dim_v if n in (2, 3, 4, 7) else p.head_dim
            found.append(at(place, (p.batch, rows, heads, dim), (*view[1:], 1)))
        stats = at(lse, (p.batch, p.heads_q, p.seqlen_q), (*self.lse[1:], 1))
        right = None if p.window_right < 0 else p.window_right
        self.compute(found, stats, Spec(p.scale, right=right))
        return self.status

    def compute(self, found: list[Tensor], lse: Tensor, spec: Spec) -> None:
        q, k, v, out = found
        for written, result in zip((out, lse), reference.forward(q, k, v, spec), strict=True):
            written.copy_(result)


class DenseBackward(Dense):
    def compute(self, found: list[Tensor], lse: Tensor, spec: Spec) -> None:
        q, k, v, out, dout, *grads = found
        results = reference.backward(dout, None, q, k, v, out, lse, spec)
        for written, result in zip(grads, results, strict=True):
            written.copy_(result)


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """flash.attention(backend="v1") on CPU tensors runs the stand-in; calls start unknown."""
    found = SimpleNamespace(
        Problem=SimpleNamespace,
        plan=lambda direction, problem: {"workspace_bytes": 64},
        error_string=lambda code: "it broke",
        DenseForward=type("DenseForward", (Dense,), {}),
        DenseBackward=type("Backward", (DenseBackward,), {}),
    )
    engine = kernels.Kernels("v1_tiling", found)

    def settle(*args: Any, **kinds: Any) -> Any:
        job = own(*args, **kinds)
        if job.decision.backend != "v1_tiling":
            return job
        back = job.decision.backward
        back = None if back is None else replace(back, engine="kernels")
        decision = replace(job.decision, engine="kernels", backward=back)
        return job._replace(decision=decision, engine=engine)

    own = calls.settle
    monkeypatch.setattr(calls, "settle", settle)
    monkeypatch.setattr(prepared, "engine", lambda version: engine)
    monkeypatch.setattr(prepared, "_device", lambda: None)
    monkeypatch.setattr(prepared, "stream", lambda index: 7)
    monkeypatch.setattr(prepared, "new", empty)
    monkeypatch.setattr(memory, "kept", {})
    return found


def draw(layout: str) -> list[Tensor]:
    """Leaves in the caller's layout."""
    found = [torch.randn(shape) for shape in SHAPES]
    if layout == "bhsd":
        found = [x.transpose(1, 2).contiguous() for x in found]
    return [x.requires_grad_() for x in found]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients(module: SimpleNamespace, layout: str, causal: bool) -> None:
    for _ in range(3):  # the first call settles, the others are remembered
        x = draw(layout)
        options: dict[str, Any] = {"layout": layout, "causal": causal, "return_lse": True}
        found, lse = flash.attention(*x, backend="v1", **options)
        dout = torch.randn_like(found)
        grads = torch.autograd.grad(found, x, dout)
        with torch.no_grad():
            again = flash.attention(*x, backend="v1", **options)
        exact, exact_lse = flash.attention(*x, backend="reference", **options)
        torch.testing.assert_close((found, lse), (exact, exact_lse))
        torch.testing.assert_close(again, (exact, exact_lse))
        torch.testing.assert_close(grads, torch.autograd.grad(exact, x, dout))
        found.mul_(2)  # no view of anything: it may be changed in place
    assert module.DenseForward.settled == 2  # with and without gradients
    assert module.DenseBackward.settled == 1
    assert flash.last_dispatch() is not None


def test_other_gradients_take_the_long_way(module: SimpleNamespace) -> None:
    """Expanded, misaligned, of the LSE, or differentiable themselves."""
    ready = calls.prepare_dense(*draw("bshd"), OPTIONS, (None, None, None))
    q, k, v = draw("bshd")
    with torch.no_grad():
        out, lse = flash.attention(q, k, v, return_lse=True, backend="v1")
    run = ready.quick_back
    assert run is not None
    assert run(torch.ones(()).expand_as(out), q, k, v, out, lse) is None
    odd = torch.randn(out.numel() + 1)[1:].view_as(out)
    assert (run(odd, q, k, v, out, lse) is None) == (odd.data_ptr() % 16 != 0)
    wide = torch.randn(*out.shape[:-1], DIM_V + 1)[..., :DIM_V]
    assert run(wide, q, k, v, out, lse) is None
    strided = torch.randn(*out.shape[:-1], 2 * DIM_V)[..., :DIM_V]
    found = run(strided, q, k, v, out, lse)
    exact = reference.backward(strided, None, q, k, v, out, lse, Spec(DIM**-0.5))
    torch.testing.assert_close(tuple(found or ()), tuple(exact))


OPTIONS = (False, None, None, 0.0, False, None, "bshd", "v1")


def test_a_refused_launch_is_an_error(module: SimpleNamespace) -> None:
    module.DenseForward.status = 9
    with pytest.raises(flash.LaunchError, match="it broke"):
        flash.attention(*draw("bshd"), backend="v1")


def test_another_device_is_made_current(
    module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[Any] = [1]

    class Switch:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(prepared, "_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    x = draw("bshd")
    found = flash.attention(*x, backend="v1")
    grads = torch.autograd.grad(found.square().mean(), x)
    assert current == [1]
    assert all(math.isfinite(float(x.sum())) for x in grads)


def remembers(call: Callable[[], Any]) -> bool:
    before = len(memory.kept)
    call()
    return len(memory.kept) == before


def test_calls_that_differ_are_checked_again(module: SimpleNamespace) -> None:
    q, k, v = (x.detach() for x in draw("bshd"))
    flash.attention(q, k, v, backend="v1")
    assert remembers(lambda: flash.attention(q, k, v, backend="v1"))
    assert not remembers(lambda: flash.attention(q, k, v, causal=True, backend="v1"))
    assert not remembers(lambda: flash.attention(q[:, 1:], k, v, backend="v1"))
    wrong: tuple[Any, ...] = (0, 1, 1.0, None)
    for causal in wrong:
        with pytest.raises(TypeError):
            flash.attention(q, k, v, causal=causal, backend="v1")
    assert dispatch.last_dispatch() is not None
