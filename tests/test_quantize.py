"""FP8 quantization: scales, the orthogonal turn, edge values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash.v3_hopper import schedule
from fp8_inputs import GRANULARITIES, inputs
from grid import DEVICE, Case, dense
from torch import Tensor

import flash
from flash.errors import UnsupportedError
from flash.quantize import (
    E4M3,
    E4M3_MAX,
    incoherent,
    part_of,
    quantize,
    quantize_fp8,
    quantize_packed,
    random_signs,
)
from flash.spec import Descale, Spec, Varlen


def dequantize(x: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    group = x.shape[2] // scale.shape[2]
    index = torch.arange(x.shape[1], device=x.device) // block if scale.shape[1] > 1 else 0
    rows = scale[:, index] if scale.shape[1] > 1 else scale.expand(-1, x.shape[1], -1)
    return x.float() * rows.repeat_interleave(group, 2)[..., None]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seqlen", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_values_come_back(granularity: str, seqlen: int, heads: tuple[int, int]) -> None:
    q = torch.randn(2, seqlen, heads[0], 64, device=DEVICE).bfloat16()
    k, v = (torch.randn(2, 77, heads[1], 64, device=DEVICE).bfloat16() for _ in range(2))
    found = quantize_fp8(q, k, v, granularity, hadamard=False)
    for x, stored, scale in zip((q, k, v), found[:3], found[3:], strict=True):
        assert stored.dtype == E4M3
        assert stored.shape == x.shape
        assert stored.is_contiguous()
        assert scale.dtype == torch.float32
        blocks = -(-x.shape[1] // 128) if granularity == "block" else 1
        assert scale.shape == (2, blocks, heads[1])
        back = dequantize(stored, scale)
        # e4m3 keeps 3 bits: half a step is 1/16 of the value, or 2^-10 of the scale near zero;
        # a row of V takes over at most half of the largest step
        taken = E4M3_MAX / 16 if x is v else 2.0**-9
        bound = x.float().abs() / 16 + scale.max() * taken
        assert bool(((back - x.float()).abs() <= bound).all())
        assert stored.float().abs().max() == E4M3_MAX  # the range is used


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scale_is_the_amax_of_its_rows(granularity: str) -> None:
    q, k, v = (torch.rand(2, 300, 2, 64, device=DEVICE) for _ in range(3))
    v[1, 130, 1, 5] = 70.0
    scale = quantize_fp8(q, k, v, granularity).v_descale * E4M3_MAX
    seventy = torch.isclose(scale, torch.tensor(70.0, device=DEVICE))
    places = {"block": [[1, 1, 1]], "head": [[1, 0, 1]]}
    if granularity == "tensor":
        assert bool(seventy.all())
    else:
        assert seventy.nonzero().tolist() == places[granularity]


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_rows_of_a_block_are_chosen(block: int) -> None:
    q, k, v = inputs(300, 64)
    found = quantize_fp8(q, k, v, block_q=block, block_kv=2 * block)
    assert found.q_descale.shape[1] == -(-300 // block)
    assert found.k_descale.shape[1] == found.v_descale.shape[1] == -(-300 // (2 * block))
    spec = Spec(0.125)
    scales = Descale(*found[3:], block, 2 * block)
    out = schedule.forward(*found[:3], spec, descale=scales).out
    exact = dense(q, k, v, Case(300, 300))[0]
    assert (out - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("dim", [1, 2, 40, 64, 96, 128, 192, 256])
def test_turn_is_orthogonal(dim: int) -> None:
    """In parts of a power of two: each column of the matrix spreads over all of its part."""
    part = part_of(dim)
    turned = incoherent(torch.eye(dim, device=DEVICE))
    torch.testing.assert_close(turned @ turned.mT, torch.eye(dim, device=DEVICE))
    within = torch.block_diag(*[torch.ones(part, part)] * (dim // part)).to(DEVICE)
    torch.testing.assert_close(turned.abs(), within * part**-0.5)


def test_parts_are_the_largest_powers_of_two() -> None:
    parts = {64: 64, 128: 128, 256: 256, 192: 64, 96: 32, 40: 8, 1: 1}
    assert {dim: part_of(dim) for dim in parts} == parts


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_turn_keeps_products_and_spreads_outliers(dim: int) -> None:
    q, k = torch.randn(10, dim, device=DEVICE), torch.randn(20, dim, device=DEVICE)
    k[3, 7] = 300.0
    torch.testing.assert_close(incoherent(q) @ incoherent(k).mT, q @ k.mT, rtol=1e-4, atol=1e-2)
    assert incoherent(k)[3].abs().max() < 300 / part_of(dim) ** 0.5 + 6


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_signs_are_fixed_and_balanced(dim: int) -> None:
    signs = random_signs(dim)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < 4 * dim**0.5
    assert torch.equal(signs, random_signs(dim))
    runs = int((signs[1:] != signs[:-1]).sum())
    assert dim / 4 < runs < 3 * dim / 4


def test_signs_are_the_same_on_every_machine() -> None:
    bits = "".join("+" if s > 0 else "-" for s in random_signs(16).tolist())
    assert bits == "-+-+++++-+-+--+-"


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("rows", [1, 100, 300])
def test_errors_of_a_column_of_v_cancel(dim: int, rows: int) -> None:
    x = torch.randn(2, rows, 2, dim).bfloat16()
    sums, largest = [], []
    for spread in (False, True):
        stored, scale = quantize(x, "block", 128, 2, spread=spread)
        off = dequantize(stored, scale) - x.float()
        sums.append(off.sum(1).square().mean().sqrt())
        largest.append(off.abs().max())
        assert bool((off.abs() <= x.float().abs() / 16 + scale.max() * E4M3_MAX / 16).all())
    assert largest[1] <= 2 * largest[0]
    if rows > 8:
        assert sums[1] < 0.8 * sums[0]


@pytest.mark.parametrize("rows", [16, 77, 160, 304])
@pytest.mark.parametrize("block", [64, 128, 200])
def test_keys_of_v_are_contiguous_where_their_number_fits(rows: int, block: int) -> None:
    q, k, v = (x.bfloat16() for x in inputs(rows, 64))
    found = quantize_fp8(q, k, v, block_kv=block)
    wanted, scale = quantize(v, "block", block, 2, spread=True)
    assert torch.equal(found.v.float(), wanted.float())
    assert torch.equal(found.v_descale, scale)
    fits = rows % 16 == 0 and block % 16 == 0
    in_memory = found.v.permute(0, 2, 3, 1) if fits else found.v
    assert in_memory.is_contiguous()


def test_what_is_not_finite_hands_nothing_on() -> None:
    x = torch.randn(1, 64, 1, 64)
    clean, _ = quantize(x, "block", 128, 1, spread=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        spoiled = x.clone()
        spoiled[0, 9, 0] = value
        found, _ = quantize(spoiled, "block", 128, 1, spread=True)
        assert bool(found[0, 9].float().isnan().all())
        assert torch.equal(found[0, :9].float(), clean[0, :9].float())
        assert bool(found[0, 10:].float().isfinite().all())


def test_attention_that_spreads_over_all_keys_gains_most() -> None:
    """With scores near zero nearly all error is V's, and its sums are kept."""
    _, _, v = inputs(512, 128)
    relative = []
    for spread in (False, True):
        v8, scale = quantize(v, "block", 128, 2, spread=spread)
        out = dequantize(v8, scale).mean(1)
        relative.append((out - v.mean(1)).norm() / v.mean(1).norm())
    assert relative[1] < 0.75 * relative[0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros(granularity: str) -> None:
    zeros = torch.zeros(1, 200, 2, 64, device=DEVICE)
    found = quantize_fp8(zeros, zeros, zeros, granularity)
    assert all(not x.float().any() for x in found[:3])
    assert all(torch.equal(s, torch.ones_like(s)) for s in found[3:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_nan_and_spoils_no_scale(value: float) -> None:
    q, k, v = inputs(200, 64)
    clean = quantize_fp8(q, k, v, hadamard=False)
    v = v.clone()
    v[0, 3, 0, 5] = value
    found = quantize_fp8(q, k, v, hadamard=False)
    assert bool(found.v[0, 3, 0, 5].float().isnan())
    assert int(found.v.float().isnan().sum()) == 1
    assert bool(found.v_descale.isfinite().all())
    torch.testing.assert_close(found.v_descale, clean.v_descale)


@pytest.mark.parametrize("gain", [1e-40, 1e-30, 1e30])
def test_extreme_magnitudes(gain: float) -> None:
    x = torch.randn(1, 130, 2, 64, device=DEVICE) * gain
    found = quantize_fp8(x, x, x, hadamard=False)
    assert bool(found.q_descale.isfinite().all())
    assert bool((found.q_descale > 0).all())
    assert bool(found.q.float().isfinite().all())


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows(rows: int) -> None:
    q = torch.randn(2, rows, 2, 64, device=DEVICE)
    k = torch.randn(2, 5, 2, 64, device=DEVICE)
    found = quantize_fp8(q, k, k)
    assert found.q.shape == (2, rows, 2, 64)
    assert found.q_descale.shape == (2, 1, 2)


@pytest.mark.parametrize(
    "wrong",
    [{"granularity": "row"}, {"block_q": 0}, {"block_kv": -1}, {"hadamard": "no"}, {"axis": 1},
     {"block_q": 64.0}, {"q": [1.0]}, {"q": torch.ones(2, 10, 2, 64, dtype=torch.int32)},
     {"k": torch.randn(2, 10, 3, 64)}, {"v": torch.randn(2, 9, 2, 64)}, {"q": torch.randn(10, 64)},
     {"v": torch.randn(2, 10, 2, 64).to(E4M3)}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    given = {name: torch.randn(2, 10, 2, 64) for name in "qkv"}
    with pytest.raises(flash.FlashError, match=next(iter(wrong))):
        quantize_fp8(**{**given, **wrong})


def test_function_transforms_are_refused() -> None:
    x = torch.randn(3, 1, 32, 2, 64)
    with pytest.raises(UnsupportedError, match="quantize before it"):
        torch.func.vmap(lambda q: flash.quantize_fp8(q, q, q).q.float())(x)


def test_a_gradient_is_not_dropped() -> None:
    given = [torch.randn(2, 10, 2, 64, requires_grad=True) for _ in range(3)]
    with pytest.raises(ValueError, match="requires_grad"):
        quantize_fp8(*given)
    with torch.no_grad():
        assert not any(x.requires_grad for x in quantize_fp8(*given))


@pytest.mark.parametrize("argument", ["block_q", "block_kv"])
def test_no_other_block_passes_for_one_of_128_rows(argument: str) -> None:
    """Attention goes by the number of blocks: two of 100 rows are not two of 128."""
    given = [torch.randn(1, 200, 2, 64) for _ in range(3)]
    with pytest.raises(ValueError, match=argument):
        quantize_fp8(*given, **{argument: 100})
    many = quantize_fp8(*given, **{argument: 64})
    with pytest.raises(ValueError, match="descale"):
        flash.attention(**many._asdict())


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_packed_blocks_begin_with_their_sequence(heads: tuple[int, int]) -> None:
    lengths = [300, 0, 1, 129]
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    q, k, v = (torch.randn(sum(lengths), h, 64, device=DEVICE) for h in (heads[0], *heads[1:] * 2))
    found = quantize_packed(q, k, v, Varlen(ends, ends, 300, 300), True, 128)
    assert all(s.shape == (4, 3, heads[1]) for s in found[3:])
    begin = 0
    for i, n in enumerate(lengths):
        for x, stored, scale in zip((q, k, v), found[:3], found[3:], strict=True):
            part = x[None, begin : begin + n]
            part = part if x is v else incoherent(part)
            if n:
                wanted, wanted_scale = quantize(part, "block", 128, heads[1], spread=x is v)
                assert torch.equal(stored[begin : begin + n].float(), wanted[0].float())
                blocks = wanted_scale.shape[1]
                assert torch.equal(scale[i, :blocks], wanted_scale[0])
                assert bool((scale[i, blocks:] == 1).all())
        begin += n
