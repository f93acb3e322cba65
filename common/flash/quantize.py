"""Q, K, V into e4m3 with one scale per block, head or tensor, and their outliers spread out."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GRANULARITIES = ("block", "head", "tensor")


class QuantizedQKV(NamedTuple):
    """value = stored * descale; scales are (batch, blocks, heads_kv) float32."""

    q: Tensor  # (batch, seqlen_q, heads_q, head_dim) float8_e4m3fn
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor


def quantize_fp8(q: Tensor, k: Tensor, v: Tensor, granularity: str = "block",
                 hadamard: bool = True, *, block_q: int = 128,
                 block_kv: int = 128) -> QuantizedQKV:  # fmt: skip
    """Quantize for `flash.attention(..., q_descale=, k_descale=, v_descale=)`.

    "block": one scale for each K/V head and block of rows (of Q: over the query heads that share
    the K/V head). "head": one for each (batch, K/V head). "tensor": one in all. `hadamard` turns Q
    and K by the same random orthogonal matrix, which leaves Q K^T as it is and spreads outliers.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}; known: {', '.join(GRANULARITIES)}")
    if min(block_q, block_kv) < 1:
        raise ValueError(f"block_q={block_q}, block_kv={block_kv}; both must be positive")
    heads_kv = k.shape[2]
    if hadamard:
        q, k = incoherent(q), incoherent(k)
    sizes = ((q, block_q), (k, block_kv), (v, block_kv))
    parts = [quantize(x, granularity, block, heads_kv) for x, block in sizes]
    (q8, q_descale), (k8, k_descale), (v8, v_descale) = parts
    return QuantizedQKV(q8, k8, v8, q_descale, k_descale, v_descale)


def incoherent(x: Tensor) -> Tensor:
    """x diag(signs) H / sqrt(dim) over the last dim, with H the Hadamard matrix of that size."""
    dim = x.shape[-1]
    if dim & (dim - 1) or not dim:
        raise ValueError(f"head_dim={dim}; the Hadamard transform needs a power of two")
    x = x.float() * random_signs(dim).to(x.device)
    step = 1
    while step < dim:
        pairs = x.unflatten(-1, (dim // (2 * step), 2, step))
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        step *= 2
    return x * (1.0 / math.sqrt(dim))


@lru_cache(maxsize=16)
def random_signs(dim: int) -> Tensor:
    """The same +-1 on every machine: one bit of a 32-bit integer hash of the index."""
    signs = []
    for index in range(dim):
        h = (index + 1) * 0x9E3779B9 & 0xFFFFFFFF
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        signs.append(1.0 if (h ^ h >> 16) & 1 else -1.0)
    return torch.tensor(signs)


def quantize(x: Tensor, granularity: str, block: int, heads_kv: int) -> tuple[Tensor, Tensor]:
    """(e4m3 values, (batch, blocks, heads_kv) scales) of one (batch, rows, heads, dim) tensor."""
    batch, rows, heads, dim = x.shape
    if granularity != "block":
        block = max(1, rows)
    blocks = max(1, -(-rows // block))
    x = x.float()
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * block - rows))
    tiles = padded.reshape(batch, blocks, block, heads_kv, heads // max(1, heads_kv), dim)
    scale = descale_of(tiles.abs(), granularity == "tensor")  # (batch, blocks, heads_kv)
    stored = (tiles / scale[:, :, None, :, None, None]).clamp(-E4M3_MAX, E4M3_MAX)
    stored = stored.masked_fill(tiles.isinf(), math.nan)  # e4m3 has no infinity
    return stored.reshape(padded.shape)[:, :rows].contiguous().to(E4M3), scale


def descale_of(magnitude: Tensor, whole_tensor: bool) -> Tensor:
    """amax / 448 of each tile; 1 for a tile of zeros. NaN and Inf do not spoil their neighbours."""
    magnitude = magnitude.masked_fill(~magnitude.isfinite(), 0.0)
    if magnitude.numel() == 0:
        return magnitude.new_ones(magnitude.shape[0], magnitude.shape[1], magnitude.shape[3])
    amax = magnitude.amax((2, 4, 5))
    if whole_tensor:
        amax = amax.amax().expand(amax.shape).contiguous()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(tiny), torch.ones_like(amax))
