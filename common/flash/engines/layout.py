"""What the engines share: new tensors, GQA views, FP8 scales, packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash.spec import LSE_DTYPE, Descale, Grads, Result, Varlen

FP8 = torch.float8_e4m3fn


def out_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == FP8 else q.dtype


def lse_dtype(q: Tensor) -> torch.dtype:
    """float32; float64 for float64 inputs, so that gradients can be checked numerically."""
    return torch.float64 if q.dtype == torch.float64 else LSE_DTYPE


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """(batch, heads, rows), or (heads, total_rows) of packed sequences."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def new_result(q: Tensor, v: Tensor, out: Tensor | None = None) -> Result:
    if out is None:
        shape = (*q.shape[:-1], v.shape[-1])
        out = torch.empty(shape, dtype=out_dtype(q), device=q.device)
    return Result(out, torch.empty(lse_shape(q), dtype=lse_dtype(q), device=q.device))


def new_grads(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> Grads:
    def given_or_new(given: Tensor | None, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if given is None else given

    return Grads(given_or_new(dq, q), given_or_new(dk, k), given_or_new(dv, v))


def fill_empty(result: Result) -> Result:
    """No keys at all: every output row is 0 and its LSE is -inf."""
    result.out.zero_()
    result.lse.fill_(-torch.inf)
    return result


def expand_descale(scale: Tensor | None, rows: int, block: int, like: Tensor) -> Tensor | None:
    """(batch, blocks, heads) -> (batch, rows, heads, 1), the scale of every row."""
    if scale is None:
        return None
    if scale.shape[1] != 1:
        index = torch.arange(rows, device=like.device) // max(block, 1)
        scale = scale.index_select(1, index.clamp_max(scale.shape[1] - 1))
    heads = like.shape[2]
    if scale.shape[2] != heads:
        scale = scale.repeat_interleave(heads // scale.shape[2], dim=2)
    return scale.unsqueeze(-1)


def dequantize(x: Tensor, scale: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """FP8 (batch, rows, heads, dim) -> dtype, every block of rows times its scale."""
    factor = expand_descale(scale, x.shape[1], block, x)
    wide = x.to(dtype)
    return wide if factor is None else wide * factor.to(dtype)


def dequantize_all(
    q: Tensor, k: Tensor, v: Tensor, descale: Descale | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    scales = Descale() if descale is None else descale
    return (
        dequantize(q, scales.q, scales.block_q, dtype),
        dequantize(k, scales.k, scales.block_kv, dtype),
        dequantize(v, scales.v, scales.block_kv, dtype),
    )


class Sequence(NamedTuple):
    """Rows and keys of one packed sequence, and its scales."""

    rows: slice
    keys: slice
    descale: Descale | None


def sequences(varlen: Varlen, descale: Descale | None) -> Iterator[Sequence]:
    """The packed sequences one by one; reads the lengths back to the host."""
    ends_q = varlen.cu_seqlens_q.tolist()
    ends_k = varlen.cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        scales = None
        if descale is not None:
            q, k, v = (None if s is None else s[i : i + 1] for s in descale[:3])
            scales = Descale(q, k, v, descale.block_q, descale.block_kv)
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        yield Sequence(rows, keys, scales)
