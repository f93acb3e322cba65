"""Q, K, V into e4m3 with one scale per block, head or tensor, and their outliers spread out."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flash.engines import quantizer
from flash.spec import Varlen

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
    sizes = ((q, block_q, hadamard), (k, block_kv, hadamard), (v, block_kv, False))
    parts = []
    for x, block, rotate in sizes:
        if quantizer.serves(x):
            parts.append(quantizer.quantize(x, granularity, block, heads_kv, rotate))
        else:
            turned = incoherent(x) if rotate else x
            parts.append(quantize(turned, granularity, block, heads_kv))
    (q8, q_descale), (k8, k_descale), (v8, v_descale) = parts
    return QuantizedQKV(q8, k8, v8, q_descale, k_descale, v_descale)


def quantize_packed(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen,
                    hadamard: bool, block: int) -> QuantizedQKV:  # fmt: skip
    """The same for packed sequences: one scale for each sequence, block of its rows and K/V head.

    Where no kernel serves, the sequences are cut apart, which on a GPU waits for their lengths.
    """
    sides = ((q, varlen.cu_seqlens_q, varlen.max_seqlen_q, hadamard),
             (k, varlen.cu_seqlens_k, varlen.max_seqlen_k, hadamard),
             (v, varlen.cu_seqlens_k, varlen.max_seqlen_k, False))  # fmt: skip
    parts = []
    for x, cu_seqlens, longest, rotate in sides:
        if quantizer.serves(x):
            packed = (cu_seqlens, longest)
            parts.append(quantizer.quantize(x, "block", block, k.shape[1], rotate, packed))
        else:
            ends = cu_seqlens.tolist()
            turned = incoherent(x) if rotate else x
            parts.append(_by_sequence(turned, ends, longest, block, k.shape[1]))
    (q8, q_descale), (k8, k_descale), (v8, v_descale) = parts
    return QuantizedQKV(q8, k8, v8, q_descale, k_descale, v_descale)


def _by_sequence(x: Tensor, ends: list[int], longest: int, block: int,
                 heads_kv: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    blocks = max(1, -(-longest // block))
    stored = torch.zeros(x.shape, dtype=E4M3, device=x.device)
    scale = torch.ones(len(ends) - 1, blocks, heads_kv, device=x.device)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end > begin:
            part, found = quantize(x[None, begin:end], "block", block, heads_kv)
            stored[begin:end] = part[0]
            scale[i, : found.shape[1]] = found[0]
    return stored, scale


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
    stored = tiles * scale.reciprocal()[:, :, None, :, None, None]
    stored = stored.clamp(-E4M3_MAX, E4M3_MAX)
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
