"""Tensors that are not what they look like: fakes, and those of a function transform."""

from __future__ import annotations

import torch
from torch import Tensor

_stack = torch._C._functorch.peek_interpreter_stack


def under_transform() -> bool:
    """A function transform (vmap, grad, ..) wraps tensors here, and no compiler looks on."""
    return not torch.compiler.is_compiling() and _stack() is not None


def address(x: Tensor) -> int:
    """0 of a tensor that has none: a fake one, or one that a function transform wraps.

    The operator asks again for those that it is given in the end.
    """
    if type(x) is not Tensor and hasattr(x, "fake_mode"):
        return 0
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0
