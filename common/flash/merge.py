"""The exact union of partial attentions over disjoint sets of keys, empty parts included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash.checks import check_device, check_kind, check_shape
from flash.errors import ArgumentTypeError, wrong_type, wrong_value
from flash.options import LAYOUTS, choice, refuse_unknown

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merge(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    layout: str = "bshd",
    **unknown: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the attention over all the keys of the parts.

    Args:
        outs: one output per part, (batch, seq, heads, dim) in `layout`, or packed (total, heads,
            dim); a tensor is taken as parts stacked along its first dim.
        lses: (batch, heads, seq), or packed (heads, total): natural logarithms, -inf for a row to
            which a part had nothing to say, whatever its output holds there.
        layout: "bshd" or "bhsd".

    The sums are formed in float32 (float64 for float64 parts); the result has the parts' dtype.
    Both results are differentiable.
    """
    refuse_unknown("merge", unknown, ("outs", "lses", "layout"))
    choice("layout", layout, LAYOUTS)
    parts = _check_parts(outs, lses, layout)
    wide = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
    stats = torch.stack([lse.to(wide) for _, lse in parts])
    highest = stats.detach().amax(0)
    base = torch.where(highest == -torch.inf, 0.0, highest)
    weights = torch.exp(stats - base)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, base + torch.log(total))
    out = torch.zeros_like(parts[0][0], dtype=wide)
    for (part, _), weight in zip(parts, weights.unbind(0), strict=True):
        share = _beside(weight / total, part, layout)
        held = torch.where(share > 0, part.to(wide), 0.0)  # before the product, for its gradient
        out = out + held * share
    return out.to(parts[0][0].dtype), lse


def _beside(stats: Tensor, out: Tensor, layout: str) -> Tensor:
    """Row statistics in the shape of the output: (.., rows, heads, 1)."""
    keep = out.ndim == 4 and layout == "bhsd"
    return (stats if keep else stats.transpose(-1, -2)).unsqueeze(-1)


def _as_parts(name: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, Tensor):
        if given.ndim == 0:
            raise wrong_value(f"{name}.ndim", 0, "at least 1", "stack the parts along dim 0")
        return given.unbind(0)
    if not isinstance(given, (list, tuple)):
        raise wrong_type(name, given, "a list of tensors, one for each part")
    return tuple(given)


def _check_parts(outs: Any, lses: Any, layout: str) -> list[tuple[Tensor, Tensor]]:
    found, stats = _as_parts("outs", outs), _as_parts("lses", lses)
    if not found:
        raise wrong_value("outs", found, "at least one part")
    if len(found) != len(stats):
        raise wrong_value("lses", f"{len(stats)} parts", f"{len(found)} parts, as many as outs")
    for i, (out, lse) in enumerate(zip(found, stats, strict=True)):
        _check_part(i, out, lse, found[0], layout)
    return list(zip(found, stats, strict=True))


def _check_part(i: int, out: Any, lse: Any, like: Tensor, layout: str) -> None:
    for name, x in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
        check_kind(name, x)
        check_device(name, x, "outs[0]", like)
    if out.dtype not in _FLOATS or out.dtype != like.dtype:
        text = f"outs[{i}].dtype is {out.dtype}; all parts need one floating dtype"
        raise ArgumentTypeError(text, argument="outs", given=out.dtype, expected=like.dtype)
    wanted = torch.float64 if out.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        text = f"lses[{i}].dtype is {lse.dtype}, must be {wanted}; call .to({wanted})"
        raise ArgumentTypeError(text, argument="lses", given=lse.dtype, expected=wanted)
    if out.ndim not in (3, 4):
        raise wrong_value(f"outs[{i}].ndim", out.ndim, "4, or 3 for packed sequences")
    check_shape(f"outs[{i}]", out, tuple(like.shape), "that of outs[0]")
    rows, heads = (-2, -3) if out.ndim == 4 and layout == "bhsd" else (-3, -2)
    shape = (*out.shape[:-3], out.shape[heads], out.shape[rows])
    check_shape(f"lses[{i}]", lse, shape, "batch, heads, rows; packed: heads, rows")
