"""Inputs of the tests of FP8: normal ones, and those of the paper with outliers."""

from __future__ import annotations

import torch
from grid import DEVICE
from torch import Tensor

GRANULARITIES = ("block", "head", "tensor")


def inputs(seqlen: int, dim: int, heads: int = 2, outliers: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seqlen + dim)

    def one() -> Tensor:
        shape = (1, seqlen, heads, dim)
        x = torch.randn(shape, generator=g)
        if outliers:  # N(0,1) + N(0,100) * Bernoulli(0.001)
            x += 10 * torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 1e-3)
        return x.to(DEVICE)

    return one(), one(), one()
