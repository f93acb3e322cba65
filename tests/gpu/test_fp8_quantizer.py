"""The fused quantizer of FP8 gives what plain PyTorch gives on a CPU."""

from __future__ import annotations

import pytest
import torch
from grid import DEVICE
from torch import Tensor

from flash.capability import arch_of
from flash.engines import quantizer
from flash.engines.quantizer import Task
from flash.quantize import part_of, quantize, signed_sums

V3 = "v3_hopper"
SERVED = bool(quantizer.module()) and arch_of(DEVICE) == (9, 0)
quantizing = pytest.mark.parametrize("version", [V3] if SERVED else [])


@quantizing
@pytest.mark.parametrize("how", ["turned", "nearest", "spread"])
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("dim", quantizer.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_gives_what_the_cpu_gives(
    version: str, dim: int, granularity: str, how: str, dtype: torch.dtype
) -> None:
    """Bit for bit; where the tensor cores' sums of 16 are not exact, a last bit of fp32 apart."""
    for rows, heads, heads_kv, block in ((300, 2, 2, 128), (128, 8, 2, 128), (450, 6, 3, 64),
                                         (1, 1, 1, 128), (257, 5, 5, 256)):  # fmt: skip
        x = torch.randn(2, rows, heads, dim).to(dtype)
        if rows > 100 and heads > 1:
            x[0, 5, 1, 3], x[1, 100, 0, 9] = float("inf"), float("nan")
        turned, norm = (signed_sums(x), part_of(dim) ** -0.5) if how == "turned" else (x, 1.0)
        spread = how == "spread"
        wanted, wanted_scale = quantize(turned, granularity, block, heads_kv, norm, spread)
        task = Task(x.to(DEVICE), block, heads_kv, how == "turned", spread)
        assert quantizer.serves(task.x)
        [(found, scale)] = quantizer.quantize([task], granularity)
        assert_same(found.cpu(), scale.cpu(), wanted, wanted_scale, exact=how != "turned")


def assert_same(found: Tensor, scale: Tensor, wanted: Tensor, wanted_scale: Tensor, *,
                exact: bool) -> None:  # fmt: skip
    if exact:
        assert torch.equal(scale, wanted_scale)
    torch.testing.assert_close(scale, wanted_scale, rtol=2.0**-22, atol=0)
    found, wanted = found.float(), wanted.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    off = found.nan_to_num() - wanted.nan_to_num()
    assert int((off != 0).sum()) <= (0 if exact else 1 + found.numel() // 100_000)
    assert bool((off.abs() <= wanted.nan_to_num().abs() / 8 + 2.0**-9).all())  # one step


@quantizing
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("dim", quantizer.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_makes_keys_contiguous(
    version: str, dim: int, granularity: str, dtype: torch.dtype
) -> None:
    """The same values and scales as row after row."""
    for rows, heads, heads_kv, block in ((16, 2, 2, 128), (128, 3, 3, 128), (304, 8, 2, 128),
                                         (1040, 2, 2, 64), (400, 3, 3, 256)):  # fmt: skip
        x = torch.randn(2, rows + 3, heads, dim, device=DEVICE).to(dtype)[:, 2 : rows + 2]
        x[0, 5, 1, 3], x[1, rows - 1, 0, 9] = float("inf"), float("nan")
        plain = Task(x, block, heads_kv, False, spread=True)
        [(wanted, scale)] = quantizer.quantize([plain], granularity)
        for source in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            turned = plain._replace(x=source, keys_first=True)
            [(found, its_scale)] = quantizer.quantize([turned], granularity)
            assert found.permute(0, 2, 3, 1).is_contiguous()
            assert torch.equal(found.float().nan_to_num(1e3), wanted.float().nan_to_num(1e3))
            assert torch.equal(its_scale, scale)


@quantizing
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 64), (192, 128), (192, 192)], ids=str)
def test_quantizer_takes_all_three_at_once(
    version: str, dims: tuple[int, int], granularity: str
) -> None:
    """The same as one after the other: heads, lengths, strides and even head dims differ."""
    q = torch.randn(2, 390, 12, dims[0], device=DEVICE).bfloat16()[:, 5:305]
    k = torch.randn(2, 4, 1000, dims[0], device=DEVICE).bfloat16().transpose(1, 2)
    v = torch.randn(2, 1000, 4, dims[1], device=DEVICE).bfloat16()
    q[0, 3, 2, 1] = v[1, 999, 3, 60] = float("inf")
    tasks = [Task(q, 128, 4, True), Task(k, 64, 4, True), Task(v, 128, 4, False, True)]
    together = quantizer.quantize(tasks, granularity)
    for task, (found, scale) in zip(tasks, together, strict=True):
        [(alone, alone_scale)] = quantizer.quantize([task], granularity)
        assert torch.equal(found.view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scale, alone_scale)
