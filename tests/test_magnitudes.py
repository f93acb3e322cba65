"""fp32 of any size: split into parts or not, no row may lose its bits to another, or to itself."""

from __future__ import annotations

import pytest
import torch
from grid import FP32, Answer, Case, Inputs, by_autograd, differentiate, draw, pairs
from torch import Tensor

BAR = 2e-6  # of the whole tensor against fp64, as v1_tiling promises for fp32
CASES = [Case(150, 200, dim, dtype=FP32, causal=causal)
         for dim in (64, 128) for causal in (False, True)]  # fmt: skip
UNIFORM = {
    "small V": (1, 1, 1e-30, 1), "large V": (1, 1, 1e30, 1), "Q over K": (1e20, 1e-20, 1, 1),
    "K over Q": (1e-25, 1e25, 1, 1), "small dO": (1, 1, 1, 1e-30), "large dO": (1, 1, 1, 1e30),
    "V over dO": (1, 1, 1e25, 1e-25),
}  # fmt: skip


def resized(given: Inputs, sizes: tuple[float, ...]) -> Inputs:
    q, k, v, dout = (x * size for x, size in zip(given[:4], sizes, strict=True))
    return Inputs(q, k, v, dout, torch.zeros_like(given.dlse))


def assert_close(found: Answer, exact: Answer) -> None:
    names = ("O", "LSE", "dQ", "dK", "dV")
    for name, x, y in zip(names, (*found[:2], *found.grads), (*exact[:2], *exact.grads),
                          strict=True):  # fmt: skip
        seen = torch.isfinite(y)  # the LSE of a row without keys is not
        error = norm(x.double()[seen] - y[seen]) / norm(y[seen])
        assert error <= BAR, f"{name} is off by {error:.1e}"


def norm(x: Tensor) -> float:
    """Of a tensor whose squares may not exist."""
    size = x.abs().max().item()
    return size * (x / size).norm().item() if size else 0.0


@pytest.mark.parametrize("sizes", UNIFORM)
@pytest.mark.parametrize(("version", "case"), pairs(CASES, "backward"))
def test_tensors_of_any_size(version: str, case: Case, sizes: str) -> None:
    given = resized(draw(case), UNIFORM[sizes])
    exact = by_autograd(case, given, torch.float64, gradients=True)
    assert_close(differentiate(version, given, case), exact)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize(("version", "case"), pairs(CASES, "backward"))
def test_rows_beside_rows_of_other_sizes(version: str, case: Case, size: float) -> None:
    """Every other row of V is huge or tiny; so are rows of dO, the other way round."""
    given = resized(draw(case), (1, 1, 1, 1))
    given.v[:, ::2] *= size
    given.dout[:, ::3] /= size
    exact = by_autograd(case, given, torch.float64, gradients=True)
    assert_close(differentiate(version, given, case), exact)


@pytest.mark.parametrize(("version", "case"), pairs(CASES, "backward"))
def test_large_scores(version: str, case: Case) -> None:
    """Where an error of S weighs most: the softmax is almost one key."""
    given = resized(draw(case), (2.0, 1.7, 1, 1))
    exact = by_autograd(case, given, torch.float64, gradients=True)
    assert_close(differentiate(version, given, case), exact)
