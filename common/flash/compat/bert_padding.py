"""flash-attn's helpers that pack the real tokens of a padded batch, and put them back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class _Take(torch.autograd.Function):
    """Distinct rows of the first dim; their gradients go back without a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return index_put_first_axis(dout, indices, ctx.rows), None


class _Put(torch.autograd.Function):
    """Rows at distinct places of a zero tensor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(indices)
        return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, indices, values)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return index_first_axis(dout, indices), None, None


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], for indices without repetition."""
    found: Tensor = _Take.apply(input, indices)
    return found


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of shape (first_axis_dim, ..) with values at indices, which do not repeat."""
    found: Tensor = _Put.apply(values, indices, first_axis_dim)
    return found


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(tokens, indices, cu_seqlens, max_seqlen, seqused) of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ..).
        attention_mask: (batch, seqlen), nonzero for a real token.
        unused_mask: likewise, tokens that get a place in the packed tensor but are not used.

    Returns:
        tokens (total, ..), their places in the flattened batch, int32 (batch + 1,) cumulative
        lengths with the unused tokens, the longest of these, and int32 (batch,) used lengths.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens (total, ..) back at their places of (batch, seqlen, ..), zero elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
