"""FP8 on the kernels: against fp64 and the schedule, guard bands, poison, equal bits."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash.v3_hopper import schedule
from grid import DEVICE, Case, dense, draw, vary, visible
from guards import POISON, cumulative, guarded
from torch import Tensor

import flash
from flash import dispatch
from flash.capability import arch_of, capability
from flash.checks_more import BLOCK
from flash.quantize import keys_contiguous
from flash.spec import Descale, Spec

FP8 = torch.float8_e4m3fn
V3 = "v3_hopper"
RUNS = int(os.environ.get("FLASH_TEST_RUNS", "200"))
Dims = tuple[int, int]  # of Q and K, of V
DIMS: list[Dims] = [d for row in capability(V3).rows if "float8_e4m3fn" in row.dtypes
                    for d in row.forward]  # fmt: skip
FEW = [dims for dims in DIMS if dims != (96, 96)]  # the kernel of 96 is that of 128 but for sizes
LENGTHS = [(1, 1), (64, 128), (129, 129), (300, 300), (7, 513), (513, 200), (640, 1024)]


def of_dims(given: list[Case], dims: list[Dims], **lists: list[Any]) -> list[Case]:
    sized = [replace(case, dim=d, dim_v=dv if dv != d else 0) for d, dv in dims for case in given]
    return vary(sized, **lists)


CASES = [
    *of_dims([Case(m, n, heads_q=4, batch=2) for m, n in LENGTHS], DIMS, causal=[False, True]),
    *of_dims([Case(300, 400, heads_q=4)], FEW, window=[(70, 30), (0, 0), (None, 5)]),
    *of_dims([Case(200, 260)], FEW, softcap=[5.0], causal=[False, True]),
    *of_dims([Case(200, 260, causal="top-left")], FEW, scale=[None, -0.2, 0.0]),
    *of_dims([Case(260, 300, heads_q=8, batch=2)], FEW, heads_kv=[1, 2, 8]),
]  # fmt: skip


def served(dims: Dims) -> bool:
    problem = dispatch.Request(FP8, *dims, "forward", V3)
    try:
        dispatch.resolve(problem, DEVICE)
    except flash.UnsupportedError:
        return False
    return arch_of(DEVICE) == (9, 0)


BUILT = [dims for dims in DIMS if served(dims)]
v3 = pytest.mark.parametrize("version", [V3] if BUILT else [])


def cases(given: list[Case]) -> pytest.MarkDecorator:
    built = [c for c in given if (c.dim, c.dim_v or c.dim) in BUILT]
    return pytest.mark.parametrize("case", built, ids=str)


def scales(case: Case, rows: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = (case.batch, -(-rows // BLOCK), case.heads_kv)
    return (torch.rand(shape, generator=g) * 0.8 + 0.6).to(DEVICE)


def stored(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    q, k, v = (x.to(FP8) for x in draw(case)[:3])
    return (q, k, v), (scales(case, case.seqlen_q, 1), scales(case, case.seqlen_k, 2),
                       scales(case, case.seqlen_k, 3))  # fmt: skip


def amid_nan(x: Tensor) -> Tensor:
    """The values of (batch, rows, heads, dim) with NaN before, behind and in every gap."""
    batch, n, h, d = x.shape
    size = (batch + 2, n + 6, h + 2, d + 32)
    around = torch.full(size, POISON, dtype=torch.uint8, device=x.device)
    view = around[1 : batch + 1, 3 : n + 3, 1 : h + 1, 16 : d + 16]
    view.copy_(x.view(torch.uint8))
    return view.view(FP8)


def wide(x: Tensor, scale: Tensor) -> Tensor:
    index = torch.arange(x.shape[1], device=x.device) // BLOCK
    group = x.shape[2] // scale.shape[2]
    return x.double() * scale.double()[:, index].repeat_interleave(group, 2)[..., None]


def attend(case: Case, qkv: tuple[Tensor, ...], descale: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descale, strict=True))
    found: tuple[Tensor, ...] = flash.attention(
        *qkv, **named, **case.options, return_lse=True, backend=V3
    )
    return found


def assert_close(out: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor) -> None:
    """P has 3 bits of mantissa: each is off by up to 1/16, their mean by much less."""
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert not out.transpose(1, 2)[~seen].any()
    assert torch.isfinite(out).all()
    if seen.any():
        assert (lse.double() - exact_lse)[seen].abs().max() < 1 / 16
        assert (out.double() - exact).norm() <= 3.2e-2 * exact.norm() + 1e-6


@v3
@cases(CASES)
def test_forward(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, descale = stored(case)
    exact, exact_lse = dense(*(wide(x, s) for x, s in zip(qkv, descale, strict=True)), case)
    hide = ~visible(case).any(0)[None, :, None, None]
    nan = torch.tensor(float("nan"), device=DEVICE).to(FP8)
    k, v = (torch.where(hide, nan, x) for x in qkv[1:])
    given = [amid_nan(x) for x in (qkv[0], k, v)]
    with guarded(monkeypatch):
        out, lse = attend(case, tuple(given), descale)
    assert_close(out, lse, exact, exact_lse)


@v3
@cases([
    *of_dims([Case(m, n, heads_q=4, batch=2)
              for m, n in ((1, 16), (129, 112), (300, 304), (513, 208), (640, 1040))],
             DIMS, causal=[False, True]),
    *of_dims([Case(300, 400, heads_q=4)], DIMS, window=[(70, 30), (0, 0), (None, 5)]),
    *of_dims([Case(200, 272, heads_q=8)], DIMS, softcap=[0.0, 5.0], heads_kv=[1, 2]),
])  # fmt: skip
def test_keys_of_v_contiguous(version: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, descale = stored(case)
    exact, exact_lse = dense(*(wide(x, s) for x, s in zip(qkv, descale, strict=True)), case)
    hide = ~visible(case).any(0)[None, :, None, None]
    nan = torch.tensor(float("nan"), device=DEVICE).to(FP8)
    k, v = (torch.where(hide, nan, x) for x in qkv[1:])
    with guarded(monkeypatch):
        out, lse = attend(case, (amid_nan(qkv[0]), amid_nan(k), keys_contiguous(v)), descale)
    assert_close(out, lse, exact, exact_lse)
    again = attend(case, (qkv[0], k, keys_contiguous(v)), descale)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@v3
@cases(of_dims([Case(400, 520, heads_q=4, batch=2)], FEW, causal=[False, True]))
def test_error_is_that_of_the_schedule(version: str, case: Case) -> None:
    """Against fp64 of what is stored, kernel and schedule are equally far off."""
    qkv, descale = stored(case)
    exact, _ = dense(*(wide(x, s) for x, s in zip(qkv, descale, strict=True)), case)
    right = 0 if case.causal else None
    spec = Spec(case.factor, right=right)
    other = schedule.forward(*qkv, spec, descale=Descale(*descale, BLOCK, BLOCK)).out
    out, _ = attend(case, qkv, descale)
    kernel, plain = ((x.double() - exact).square().mean().sqrt() for x in (out, other))
    assert kernel < 1.25 * plain


@v3
@pytest.mark.parametrize("turned", [False, True])
@cases(of_dims([Case(704, 704, heads_q=4)], DIMS))
def test_nan_reaches_only_who_sees_it(version: str, case: Case, turned: bool) -> None:
    (case,) = vary([case], causal=[True])
    (q, k, v), descale = stored(case)
    v = keys_contiguous(v) if turned else v
    clean, _ = attend(case, (q, k, v), descale)
    spoiled = v.float()
    spoiled[:, 333, :, 5] = float("nan")
    out, _ = attend(case, (q, k, spoiled.to(FP8)), descale)
    assert torch.equal(out[:, :333], clean[:, :333])
    assert out[:, 333:, :, 5].isnan().all()
    assert torch.equal(out[:, 333:, :, :5], clean[:, 333:, :, :5])
    keys = k.float()
    keys[:, 333] = float("nan")
    out, _ = attend(case, (q, keys.to(FP8), v), descale)
    assert torch.equal(out[:, :333], clean[:, :333])
    assert out[:, 333:].isnan().all()


@v3
@cases(of_dims([Case(600, 600, heads_q=4)], FEW, causal=[False, True]))
def test_forward_gives_the_same_bits(version: str, case: Case) -> None:
    qkv, descale = stored(case)
    first = attend(case, qkv, descale)
    for n in range(RUNS):
        again = attend(case, qkv, descale)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"run {n}"


@v3
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dims", BUILT, ids=str)
def test_long_sums_lose_nothing(version: str, dims: Dims, turned: bool) -> None:
    """The tensor cores add in about 14 bits: with their sums alone, V's mean would be a fifth too
    small at this length, as P's sum would be."""
    random, keys = torch.Generator(DEVICE).manual_seed(7), 16384
    q, k, v = (
        (torch.randn(1, n, 1, dim, device=DEVICE, generator=random) + mean).to(FP8)
        for n, dim, mean in ((64, dims[0], 0), (keys, dims[0], 0), (keys, dims[1], 4))
    )
    one = torch.ones(1, 1, 1, device=DEVICE)
    given = keys_contiguous(v) if turned else v
    out = flash.attention(q, k, given, backend=version, q_descale=one, k_descale=one, v_descale=one)
    exact = flash.attention(q.double(), k.double(), v.double(), backend="reference")
    assert ((out.double() - exact).norm() / exact.norm()).item() < 0.005


@v3
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", BUILT, ids=str)
def test_packed(version: str, dims: Dims, causal: bool) -> None:
    """One scale per block of every sequence, made by the quantizer; NaN between sequences' ends."""
    lengths_q, lengths_k = [5, 300, 0, 129, 64], [9, 200, 40, 0, 500]
    sizes = ((498, dims[0]), (749, dims[0]), (749, dims[1]))
    tensors = [torch.randn(n, 4, dim, device=DEVICE).bfloat16() for n, dim in sizes]
    ends_q, ends_k = cumulative(lengths_q), cumulative(lengths_k)
    out, lse = flash.attention_varlen(
        *tensors, ends_q, ends_k, 300, 500, causal=causal, precision="fp8", return_lse=True,
        backend=V3,
    )  # fmt: skip
    a = b = 0
    for m, n in zip(lengths_q, lengths_k, strict=True):
        q, k, v = tensors[0][None, a : a + m], *(x[None, b : b + n] for x in tensors[1:])
        a, b = a + m, b + n
        if not m:
            continue
        mine, mine_lse = out[None, a - m : a], lse[None, :, a - m : a]
        if not n:
            assert not mine.any()
            assert bool((mine_lse == -torch.inf).all())
            continue
        case = Case(m, n, *dims, heads_q=4, heads_kv=4, causal=causal)
        exact, exact_lse = dense(*(x.double() for x in (q, k, v)), case)
        seen = exact_lse.isfinite()
        assert torch.equal(mine_lse.isfinite(), seen)
        assert (mine_lse - exact_lse)[seen].abs().max() < 0.3
        assert (mine.double() - exact).norm() < 0.08 * exact.norm()


@v3
@pytest.mark.parametrize("dims", BUILT, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_forward_16_bit_backward(version: str, dims: Dims, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 304, 4, dim, device=DEVICE, dtype=dtype, requires_grad=True)
               for dim in (dims[0], *dims))  # fmt: skip
    out = flash.attention(q, k, v, causal=True, precision="fp8", backend=V3)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    exact, _ = dense(*(x.detach().double() for x in (q, k, v)), Case(304, 304, *dims, causal=True))
    assert (out.double() - exact).norm() < 0.08 * exact.norm()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (q, k, v))
