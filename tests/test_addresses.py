"""Tensors without an address: fake ones, and those that a function transform wraps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash
from flash.execute import alignment_of
from flash.wrapped import address


def test_a_wrapped_tensor_counts_as_aligned() -> None:
    """A CUDA tensor is asked for its address before the operator sees what it wraps."""
    asked = []

    def ask(x: Tensor) -> Tensor:
        asked.append(address(x))
        return x.sum()

    torch.func.vmap(ask)(torch.ones(2, 3))
    torch.func.grad(ask)(torch.ones(3))
    assert asked == [0, 0]
    x = torch.ones(3)
    assert address(x) == x.data_ptr()
    assert address(torch.nn.Parameter(x)) == x.data_ptr()


def test_a_fake_tensor_counts_as_aligned() -> None:
    with FakeTensorMode():
        assert alignment_of(torch.empty(1, 8, 2, 64, dtype=torch.half, device="cuda")) == 16


def test_no_output_under_a_transform() -> None:
    q = torch.randn(2, 1, 4, 2, 16)

    def call(q: Tensor, out: Tensor) -> Any:
        return flash.attention(q, q, q, out=out)

    with pytest.raises(flash.UnsupportedError, match="out='a tensor'"):
        torch.func.vmap(call)(q, torch.empty_like(q))
