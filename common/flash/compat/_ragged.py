"""A padded or packed batch as sequences of different lengths, without waiting for the GPU.

Tokens of a row of the batch are reordered so that the visible ones come first. The rest stay in the
tensors, whose shapes are then known beforehand: rows of padding become sequences without keys,
whose output and gradients are 0, and hidden keys become sequences without rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash.compat._visible import PADDING, UNWRITTEN, Told
from flash.errors import wrong_value


class Order(NamedTuple):
    """Places of tokens in the flattened batch, visible ones first in each row, and the way back."""

    there: Tensor
    back: Tensor


class Ragged(NamedTuple):
    """Arguments of attention_varlen; without an order tokens stay where they are."""

    rows: Order | None
    keys: Order | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int


class _Moved(torch.autograd.Function):
    """Rows of the first dim in another order; gradients go back without a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        there, back = ctx.saved_tensors
        return _Moved.apply(dout, back, there), None, None


def flatten(x: Tensor, order: Order | None) -> Tensor:
    """(batch, seq, heads, dim) -> (batch * seq, heads, dim)."""
    flat: Tensor = x.flatten(0, 1)
    if order is not None:
        flat = _Moved.apply(flat, order.there, order.back)
    return flat


def unflatten(x: Tensor, order: Order | None, batch: int) -> Tensor:
    if order is not None:
        x = _Moved.apply(x, order.back, order.there)
    return x.unflatten(0, (batch, -1))


def given(cu_q: Tensor, cu_k: Any, longest_q: Any, longest_k: Any) -> Ragged:
    """Of what the caller packed; numbers may come as tensors of one element, then waited for."""
    if cu_k is None or longest_q is None or longest_k is None:
        raise wrong_value(
            "cu_seq_lens_k, max_length_q, max_length_k", None, "given beside cu_seq_lens_q"
        )
    longest = (int(longest_q), int(longest_k))
    return Ragged(None, None, cu_q.to(torch.int32), cu_k.to(torch.int32), *longest)


def ragged(told: Told, rows: int, aligned: bool) -> Ragged:
    """From the values of a mask to sequences.

    Aligned rows are those of the last places that are written, and padding if their place is;
    others have no place among the keys, and all of them attend.
    """
    values = told.values
    assert values is not None
    if told.sequences > 1:
        return _packed(values, told.sequences)
    seen = values > PADDING
    if not aligned:
        attend = torch.ones(len(values), rows, dtype=torch.bool, device=values.device)
    else:
        first = (values > UNWRITTEN).sum(-1, keepdim=True) - rows
        places = first + torch.arange(rows, device=values.device)
        attend = seen.gather(1, places.clamp(min=0)) & (places >= 0)
    some, others = attend.sum(-1), (~attend).sum(-1)
    keys, none = seen.sum(-1), torch.zeros_like(some)
    cu_q = _ends(torch.stack([some, others, none], 1))
    cu_k = _ends(torch.stack([keys, none, values.shape[1] - keys], 1))
    return Ragged(_order(attend), _order(seen), cu_q, cu_k, rows, values.shape[1])


def _packed(values: Tensor, sequences: int) -> Ragged:
    counts = torch.zeros(len(values), sequences + 1, dtype=torch.int64, device=values.device)
    counts.scatter_add_(1, values.long(), torch.ones_like(values, dtype=torch.int64))
    ends = _ends(counts[:, 1:])
    longest = values.shape[1] if torch.compiler.is_compiling() else int(counts.max())
    return Ragged(None, None, ends, ends, longest, longest)


def _ends(lengths: Tensor) -> Tensor:
    return pad(lengths.flatten().cumsum(0), (1, 0)).to(torch.int32)


def _order(first: Tensor) -> Order:
    """True before False in each row, otherwise as they are."""
    start = torch.arange(len(first), device=first.device)[:, None] * first.shape[1]
    there = ((~first).to(torch.int8).argsort(dim=1, stable=True) + start).flatten()
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there), device=first.device)
    return Order(there, back)
