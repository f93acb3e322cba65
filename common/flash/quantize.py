"""Q, K, V into e4m3 with one scale per block, head or tensor, and their outliers spread out."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.checks import KEY_STEP, check_device, check_dtype, check_kind, check_sizes
from flash.checks_more import BLOCK
from flash.engines import quantizer
from flash.engines.quantizer import Task
from flash.errors import unsupported, wrong_type, wrong_value
from flash.options import choice, flag, refuse_unknown
from flash.spec import Varlen
from flash.wrapped import under_transform

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GRANULARITIES = ("block", "head", "tensor")
ARGUMENTS = ("q", "k", "v", "granularity", "hadamard", "block_q", "block_kv")
SPREAD_ROWS, SPREAD_SHARE = 8, 0.125


class QuantizedQKV(NamedTuple):
    """value = stored * descale; scales are (batch, blocks, heads_kv) float32."""

    q: Tensor  # (batch, seqlen_q, heads_q, head_dim) float8_e4m3fn
    k: Tensor
    v: Tensor  # where seqlen_k is a multiple of 16: contiguous along seqlen_k
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor


def quantize_fp8(q: Tensor, k: Tensor, v: Tensor, granularity: str = "block",
                 hadamard: bool = True, *, block_q: int = BLOCK, block_kv: int = BLOCK,
                 **unknown: Any) -> QuantizedQKV:  # fmt: skip
    """Quantize for `flash.attention(..., q_descale=, k_descale=, v_descale=)`.

    "block": one scale for each K/V head and block of rows (of Q: over the query heads that share
    the K/V head). "head": one for each (batch, K/V head). "tensor": one in all. `hadamard` turns Q
    and K by the same random orthogonal matrix, which leaves Q K^T as it is and spreads outliers; a
    head dim that is no power of two in parts: 192 as three of 64, 96 as three of 32.
    V is rounded so that the errors of a column cancel over its rows; Q and K to the nearest. Where
    `seqlen` is a multiple of 16, V's memory is (batch, heads, head_dim, seqlen), which is how the
    product wants it; with `v.contiguous()` the kernel turns it on chip. Blocks of other than 128
    rows are for the schedules alone: `flash.attention` has no argument that would tell it.
    """
    refuse_unknown("quantize_fp8", unknown, ARGUMENTS)
    choice("granularity", granularity, GRANULARITIES)
    flag("hadamard", hadamard)
    _check_tensors(q, k, v)
    for name, block, x in (("block_q", block_q, q), ("block_kv", block_kv, k)):
        _check_block(name, block, x.shape[1] if granularity == "block" else 0)
    return quantize_dense(q, k, v, granularity, hadamard, block_q, block_kv)


def _check_tensors(q: Any, k: Any, v: Any) -> None:
    if under_transform():
        hint = "quantize before it, with the mapped dimension as a part of the batch"
        raise unsupported("q, k, v", "tensors of a function transform", "plain ones", hint)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_kind(name, x)
        check_dtype(name, x)
        check_device(name, x, "q", q)
        if x.dtype == E4M3:
            hint = "it is stored already: give its scale to flash.attention"
            raise unsupported(f"{name}.dtype", x.dtype, "a wider dtype", hint)
        if x.requires_grad and torch.is_grad_enabled():
            hint = "detach it, or call flash.attention with precision='fp8', which has a gradient"
            raise wrong_value(f"{name}.requires_grad", True, "False", hint)
    check_sizes(q, k, v, "bshd")


def _check_block(name: str, block: Any, rows: int) -> None:
    """No other block may look like one of 128 rows: attention goes by the number of blocks."""
    if isinstance(block, bool) or not isinstance(block, int):
        raise wrong_type(name, block, "an int")
    if block < 1:
        raise wrong_value(name, block, "at least 1")
    if block != BLOCK and 1 < -(-rows // block) == -(-rows // BLOCK):
        hint = f"its scales would be taken for those of {BLOCK} rows each"
        raise wrong_value(name, block, f"{BLOCK} for {rows} rows", hint)


def quantize_dense(q: Tensor, k: Tensor, v: Tensor, granularity: str, hadamard: bool,
                   block_q: int, block_kv: int) -> QuantizedQKV:  # fmt: skip
    """The same of checked arguments."""
    heads_kv = k.shape[2]
    tasks = [Task(q, block_q, heads_kv, hadamard), Task(k, block_kv, heads_kv, hadamard),
             Task(v, block_kv, heads_kv, False, True, keys_first=_turns(v, block_kv))]  # fmt: skip
    return _joined(tasks, granularity)


def quantize_packed(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen,
                    hadamard: bool, block: int) -> QuantizedQKV:  # fmt: skip
    """The same for packed sequences: one scale for each sequence, block of its rows and K/V head.

    Where no kernel serves, the sequences are cut apart, which on a GPU waits for their lengths.
    """
    ends_q = (varlen.cu_seqlens_q, varlen.max_seqlen_q)
    ends_k = (varlen.cu_seqlens_k, varlen.max_seqlen_k)
    heads_kv = k.shape[1]
    tasks = [Task(q, block, heads_kv, hadamard, packed=ends_q),
             Task(k, block, heads_kv, hadamard, packed=ends_k),
             Task(v, block, heads_kv, False, True, ends_k)]  # fmt: skip
    return _joined(tasks, "block")


def _turns(v: Tensor, block: int) -> bool:
    """The copy engine takes strides of whole 16 bytes."""
    return v.shape[1] > 0 and v.shape[1] % KEY_STEP == 0 and block % KEY_STEP == 0


def keys_contiguous(v: Tensor) -> Tensor:
    """The same values, (batch, heads, dim, rows) in memory."""
    return quantizer.empty(v.shape, True, v.device).copy_(v)


def _joined(tasks: list[Task], granularity: str) -> QuantizedQKV:
    """By the kernel in one launch, or each that it does not serve in plain PyTorch."""
    served = [task for task in tasks if quantizer.serves(task.x)]
    by_kernel = iter(quantizer.quantize(served, granularity) if served else ())
    parts = [
        next(by_kernel) if any(task is one for one in served) else _plainly(task, granularity)
        for task in tasks
    ]
    (q8, q_descale), (k8, k_descale), (v8, v_descale) = parts
    return QuantizedQKV(q8, k8, v8, q_descale, k_descale, v_descale)


def _plainly(task: Task, granularity: str) -> tuple[Tensor, Tensor]:
    turned = signed_sums(task.x) if task.rotate else task.x
    norm = part_of(task.x.shape[-1]) ** -0.5 if task.rotate else 1.0
    if task.packed is None:
        found = quantize(turned, granularity, task.block, task.heads_kv, norm, task.spread)
        return (keys_contiguous(found[0]), found[1]) if task.keys_first else found
    return _by_sequence(turned, task, norm)


def _by_sequence(x: Tensor, task: Task, norm: float) -> tuple[Tensor, Tensor]:
    assert task.packed is not None
    ends, heads_kv = task.packed[0].tolist(), task.heads_kv
    blocks = max(1, -(-task.packed[1] // task.block))
    stored = torch.zeros(x.shape, dtype=E4M3, device=x.device)
    scale = torch.ones(len(ends) - 1, blocks, heads_kv, device=x.device)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end > begin:
            part, found = quantize(
                x[None, begin:end], "block", task.block, heads_kv, norm, task.spread
            )
            stored[begin:end] = part[0]
            scale[i, : found.shape[1]] = found[0]
    return stored, scale


def part_of(dim: int) -> int:
    """The largest power of two that divides it: so many columns are turned together."""
    return max(1, dim & -dim)


def incoherent(x: Tensor) -> Tensor:
    """x diag(signs) H / sqrt(n) on every n columns, with H the Hadamard matrix of that size."""
    return signed_sums(x) * (1.0 / math.sqrt(part_of(x.shape[-1])))


def signed_sums(x: Tensor) -> Tensor:
    """The same without its norm, which scales can take. In the kernel's order: its tensor cores add
    the 16 elements that differ in bits 0, 1, 4 and 5 of their index first (0, 1, 3 and 4 of 32)."""
    dim, part = x.shape[-1], part_of(x.shape[-1])
    x = x.float() * random_signs(dim).to(x.device)
    steps = (1, 2, 16, 32, 4, 8, *(1 << bit for bit in range(6, part.bit_length())))
    if part == 32:
        steps = (1, 2, 8, 16, 4)
    for step in steps:
        if step < part:
            pairs = x.unflatten(-1, (dim // (2 * step), 2, step))
            first, second = pairs.unbind(-2)
            x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x


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


def quantize(x: Tensor, granularity: str, block: int, heads_kv: int,
             norm: float = 1.0, spread: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(e4m3 values, (batch, blocks, heads_kv) scales) of x * norm, x (batch, rows, heads, dim).

    Each value is rounded to the nearest, or with `spread` so that errors cancel over rows.
    """
    batch, rows, heads, dim = x.shape
    if granularity != "block":
        block = max(1, rows)
    blocks = max(1, -(-rows // block))
    x = x.float()
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * block - rows))
    tiles = padded.reshape(batch, blocks, block, heads_kv, heads // max(1, heads_kv), dim)
    amax = amax_of(tiles.abs(), granularity == "tensor")  # (batch, blocks, heads_kv)
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(tiny), torch.ones_like(amax))
    stored = tiles * scale.reciprocal()[:, :, None, :, None, None]
    stored = stored.masked_fill(tiles.isinf(), math.nan)  # e4m3 has no infinity
    stored = spread_errors(stored) if spread else stored.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    scale = torch.where(amax > 0, scale * norm, scale)
    return stored.reshape(padded.shape)[:, :rows].contiguous(), scale


def spread_errors(x: Tensor) -> Tensor:
    """Rounds (batch, blocks, rows, .., dim); an eighth of what chains of 8 rows lost so far goes to
    the next row. O adds up V over keys: where many count alike, their errors cancel.

    A chain is what one thread of the kernel holds: rows of the same column that stand apart by the
    lines which a warp copies at once.
    """
    apart = max(1, 256 // part_of(x.shape[-1]))
    rows = x.shape[2]
    x = torch.nn.functional.pad(x.movedim(2, -1), (0, -rows % (SPREAD_ROWS * apart)))
    chains = x.unflatten(-1, (-1, SPREAD_ROWS, apart))
    lost = torch.zeros_like(chains[..., 0, :])
    found = []
    for exact in chains.unbind(-2):
        stored = (exact + lost * SPREAD_SHARE).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        off = exact - stored.float()
        lost = lost + torch.where(off.abs() <= E4M3_MAX, off, 0.0)  # not of NaN
        found.append(stored.view(torch.uint8))
    joined = torch.stack(found, -2).flatten(-3)[..., :rows]
    return joined.movedim(-1, 2).contiguous().view(E4M3)


def amax_of(magnitude: Tensor, whole_tensor: bool) -> Tensor:
    """The largest of each tile; NaN and Inf do not spoil their neighbours."""
    magnitude = magnitude.masked_fill(~magnitude.isfinite(), 0.0)
    if magnitude.numel() == 0:
        return magnitude.new_zeros(magnitude.shape[0], magnitude.shape[1], magnitude.shape[3])
    amax = magnitude.amax((2, 4, 5))
    return amax.amax().expand(amax.shape).contiguous() if whole_tensor else amax
