"""flash.sdpa against PyTorch's function: names, order, defaults and semantics."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import flash

SHAPES = ((4, 4), (5, 9), (9, 5), (1, 7), (7, 1))
LEADING = ((2,), (), (2, 3), (1,))


def draw(lead: tuple[int, ...], rows: int, keys: int, group: int, dim_v: int = 16) -> list[Tensor]:
    shapes = ((2 * group, rows, 16), (2, keys, 16), (2, keys, dim_v))
    return [torch.randn(*lead, *s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("lead", LEADING, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_same_as_torch(
    lead: tuple[int, ...], rows: int, keys: int, causal: bool, scale: float | None
) -> None:
    given = draw(lead, rows, keys, 1)
    found = flash.sdpa(*given, is_causal=causal, scale=scale)
    expected = torch_sdpa(*given, is_causal=causal, scale=scale)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    grads = (torch.autograd.grad(x, given, cotangent) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim_v", [16, 24])
def test_groups_and_value_dim(group: int, causal: bool, dim_v: int) -> None:
    given = draw((2,), 5, 6, group, dim_v)
    found = flash.sdpa(*given, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(found, torch_sdpa(*given, is_causal=causal, enable_gqa=True))


@pytest.mark.parametrize("backend", ["v1", "v2", "v3", "reference"])
def test_backends(backend: str) -> None:
    given = [x.detach().bfloat16() for x in draw((2,), 9, 9, 1)]
    found = flash.sdpa(*given, is_causal=True, backend=backend)
    torch.testing.assert_close(found, torch_sdpa(*given, is_causal=True), atol=2e-2, rtol=2e-2)


def test_positional_order_is_torchs() -> None:
    names = list(inspect.signature(flash.sdpa).parameters)
    assert names[:5] == ["query", "key", "value", "attn_mask", "dropout_p"]
    assert names[5:8] == ["is_causal", "scale", "enable_gqa"]
    given = draw((2,), 5, 5, 1)
    torch.testing.assert_close(
        flash.sdpa(*given, None, 0.0, True), torch_sdpa(*given, None, 0.0, True)
    )


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_refused(kind: str) -> None:
    given = draw((2,), 5, 5, 1)
    mask = torch.ones(5, 5, dtype=torch.bool) if kind == "bool" else torch.zeros(5, 5)
    with pytest.raises(flash.UnsupportedError, match="attn_mask"):
        flash.sdpa(*given, attn_mask=mask)


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 3), (3, 0), (3, 3)])
def test_empties(rows: int, keys: int) -> None:
    given = [x.detach() for x in draw((2,), rows, keys, 1)]
    found = flash.sdpa(*given)
    assert found.shape == (2, 2, rows, 16)
    assert keys or not found.any()
