"""The operators: opcheck, compile, autocast, checkpointing, transforms, FLOPs, derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flash

ops = torch.ops.flash_generations
BACKENDS = ("torch", "reference", "v1_tiling", "v2_parallel", "v3_hopper")
NO_LENGTHS = (None, None, 0, 0)
NO_SCALES = (None, None, None, False)
PLAIN: tuple[Any, ...] = (None, 0.0, None, None, False, False)
CAUSAL: tuple[Any, ...] = (0.3, 2.0, 4, 0, True, False)


def dtype_of(backend: str) -> torch.dtype:
    return torch.bfloat16 if backend in ("v2_parallel", "v3_hopper") else torch.float32


def dense(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    shapes = ((2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


def packed(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    shapes = ((11, 4, 16), (14, 2, 16), (14, 2, 16))
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


def lengths() -> tuple[Any, ...]:
    cu_q = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    return cu_q, torch.tensor([0, 5, 7, 14], dtype=torch.int32), 7, 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scores", [PLAIN, CAUSAL], ids=["plain", "featured"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_opcheck_forward(form: str, scores: tuple[Any, ...], backend: str) -> None:
    make, more = (dense, NO_LENGTHS) if form == "dense" else (packed, lengths())
    args = (*more, *NO_SCALES, *scores, backend)
    opcheck(ops.forward, (*make(dtype_of(backend), grad=True), *args))
    q, k, v = make(dtype_of(backend))
    opcheck(ops.forward_out, (q, k, v, *args), {"out": torch.empty_like(q)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_opcheck_backward(form: str, backend: str) -> None:
    make, more = (dense, NO_LENGTHS) if form == "dense" else (packed, lengths())
    q, k, v = make(dtype_of(backend))
    out, lse = ops.forward(q, k, v, *more, *NO_SCALES, *CAUSAL, backend)
    args = (
        torch.randn_like(out),
        torch.randn_like(lse),
        q,
        k,
        v,
        out,
        lse,
        *more,
        *CAUSAL,
        backend,
    )
    opcheck(ops.backward, args)
    grads = {
        name: torch.empty_like(x) for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True)
    }
    opcheck(ops.backward_out, args, grads)


def test_opcheck_fp8() -> None:
    q, k, v = (x.to(torch.float8_e4m3fn) for x in dense())
    scale = torch.ones(2, 1, 2)
    args = (q, k, v, *NO_LENGTHS, scale, scale, scale, False, *PLAIN, "torch")
    opcheck(ops.forward, args, test_utils=("test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_strides_are_real_strides(backend: str, layout: str) -> None:
    given = dense(dtype_of(backend))
    if layout == "bhsd":
        given = [x.transpose(1, 2) for x in given]
    real = flash.attention(*given, layout=layout, backend=backend, return_lse=True)
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given]
    fake = flash.attention(*meta, layout=layout, backend=backend, return_lse=True)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def featured(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flash.attention(q, k, v, causal=True, window=(5, None), softcap=3.0, return_lse=True)
    return out.sin().sum() + lse.sin().sum()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash.attention(q, k, v).cos().sum()


def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash.sdpa(q, k, v, is_causal=True, enable_gqa=True).cos().sum()


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    halves = (slice(0, 5), slice(5, None))
    parts = [flash.attention(q, k[:, s], v[:, s], return_lse=True) for s in halves]
    out, lse = flash.merge(*zip(*parts, strict=True))
    return out.cos().sum() + lse.sum()


@pytest.mark.parametrize(
    ("function", "dynamic"),
    [(plain, False), (plain, True), (featured, True), (swapped, False), (in_parts, False)],
)
def test_compiles_without_a_break(function: Callable[..., Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (9, 6) if dynamic else (9,):
        given = dense(grad=True)
        given[0] = given[0].detach()[:, :rows].contiguous().requires_grad_()
        expected = torch.autograd.grad(function(*given), given)
        found = torch.autograd.grad(compiled(*given), given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.timeout(300)  # it starts a compiler
def test_inductor_compiles_forward_and_backward() -> None:
    """With the compiler that `torch.compile` uses when none is named."""
    torch._dynamo.reset()
    given = dense(grad=True)
    expected = torch.autograd.grad(featured(*given), given)
    found = torch.autograd.grad(torch.compile(featured, fullgraph=True)(*given), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    cu_q, cu_k, _, _ = lengths()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.attention_varlen(q, k, v, cu_q, cu_k, 7, 7, causal=True).cos().sum()

    given = packed(grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*given), given)
    for a, b in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_output_given_compiles() -> None:
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        return flash.attention(q, k, v, out=out) + 1

    given, out = dense(), torch.zeros(2, 9, 4, 16)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*given, out)
    torch.testing.assert_close(out, flash.attention(*given))
    torch.testing.assert_close(found, out + 1)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash.attention(q, k, v, causal=True)

    given = tuple(dense())
    program = torch.export.export(Module(), given)
    assert "flash_generations.forward" in str(program.graph)
    torch.testing.assert_close(program.module()(*given), Module()(*given))


@pytest.mark.parametrize("function", [plain, featured], ids=lambda f: f.__name__)
def test_operator_and_direct_call_agree(function: Callable[..., Tensor]) -> None:
    """A dispatch mode sends the call through the operator; bits must not change."""
    given = dense(grad=True)
    direct = torch.autograd.grad(function(*given), given)
    with FlopCounterMode(display=False):
        watched = torch.autograd.grad(function(*given), given)
    for a, b in zip(direct, watched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed_form", [False, True])
def test_autocast(packed_form: bool, dtype: torch.dtype) -> None:
    given = packed(grad=True) if packed_form else dense(grad=True)
    with torch.autocast("cpu", dtype=dtype):
        if packed_form:
            cu_q, cu_k, _, _ = lengths()
            out = flash.attention_varlen(*given, cu_q, cu_k)
        else:
            out = flash.attention(*given)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in given)


@pytest.mark.parametrize("backend", ["torch", "reference", "v1"])
def test_checkpoint_recomputes_the_same_bits(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.attention(q * 2, k, v, causal=True, backend=backend).sin().sum()

    given = dense(grad=True)
    expected = torch.autograd.grad(call(*given), given)
    kept = checkpoint(call, *given, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(kept, given), expected, strict=True):
        assert torch.equal(a, b)


def test_flop_counter() -> None:
    q, k, v = dense(grad=True)
    with FlopCounterMode(display=False) as forward:
        out = flash.attention(q, k, v)
    assert forward.get_total_flops() == 4 * 2 * 4 * 9 * 12 * 16
    with FlopCounterMode(display=False) as both:
        flash.attention(q, k, v, causal=True).sum().backward()
    pairs = sum(range(4, 13))  # 9 rows against 12 keys, bottom-right
    assert both.get_total_flops() == 4 * 2 * 4 * pairs * 16 * 3.5
    assert out.requires_grad


@pytest.mark.parametrize("watched", [False, True], ids=["direct", "operator"])
def test_no_second_derivative(watched: bool) -> None:
    q, k, v = dense(grad=True)
    out = ops.forward(q, k, v, *NO_LENGTHS, *NO_SCALES, *PLAIN, "torch")[0] if watched else (
        flash.attention(q, k, v))  # fmt: skip
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(flash.UnsupportedError, match="second derivative"):
        dq.sum().backward()


def test_saved_tensor_changed_in_place() -> None:
    q, k, v = dense(grad=True)
    q = q * 1
    out = flash.attention(q, k, v)
    q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_lse_alone_has_a_gradient() -> None:
    q, k, v = dense(grad=True)
    _, lse = flash.attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    assert dq.abs().sum() > 0
    assert dk.abs().sum() > 0
    assert dv.abs().sum() == 0


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1), "softcap": 2.0}],
                         ids=["plain", "causal", "featured"])  # fmt: skip
def test_gradcheck(options: dict[str, Any]) -> None:
    shapes = ((1, 4, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8))
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*inputs: Tensor) -> Any:
        return flash.attention(*inputs, return_lse=True, backend="reference", **options)

    assert torch.autograd.gradcheck(call, given)


def test_vmap_and_grad() -> None:
    x = torch.randn(3, 2, 5, 2, 8)
    grad = torch.func.grad(lambda a: flash.attention(a, a, a, causal=True).sin().sum())
    mapped = torch.func.vmap(grad)(x)
    for one, found in zip(x, mapped, strict=True):
        leaf = one.clone().requires_grad_()
        flash.attention(leaf, leaf, leaf, causal=True).sin().sum().backward()
        torch.testing.assert_close(found, leaf.grad)
    shared = torch.func.vmap(lambda a, b: flash.attention(a, b, b), in_dims=(0, None))(x, x[0])
    torch.testing.assert_close(shared[1], flash.attention(x[1], x[0], x[0]))


def test_forward_mode_is_refused() -> None:
    x = torch.randn(2, 5, 2, 8)
    with pytest.raises(flash.UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda a: flash.attention(a, a, a), (x,), (x,))


def test_parameters_and_no_grad() -> None:
    q, k, v = (torch.nn.Parameter(x) for x in dense())
    assert flash.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not flash.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert flash.attention(q, k, v).is_inference()
