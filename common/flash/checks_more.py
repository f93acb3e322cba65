"""Checks of what only some calls have: packed lengths, FP8 scales, gradients and saved results."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from torch import Tensor

from flash.capability import FP8
from flash.checks import (
    check_device,
    check_dtype,
    check_kind,
    check_same,
    check_shape,
    check_unit_stride,
)
from flash.engines.layout import lse_dtype, lse_shape, out_dtype
from flash.errors import ArgumentTypeError, ArgumentValueError, wrong_type, wrong_value
from flash.spec import Descale, Varlen

BLOCK = 128  # rows that share a scale under quantize_fp8(granularity="block")
INT_MAX = 2**31 - 1


def concrete(x: Tensor) -> bool:
    """Has values now: neither traced, nor fake, nor under a function transform."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"
    return plain and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def validates(x: Tensor) -> bool:
    """Values are read on the CPU; on a GPU, where that waits for it, only if FLASH_VALIDATE=1."""
    if not concrete(x):
        return False
    if x.device.type == "cpu":
        return True
    return x.device.type == "cuda" and os.environ.get("FLASH_VALIDATE") == "1"


def check_cu_seqlens(name: str, cu: Any, q: Tensor, total: int) -> list[int] | None:
    """(batch + 1,) int32 on q's device; the values when they may be read."""
    check_kind(name, cu)
    if cu.dtype != torch.int32:
        text = f"{name}.dtype is {cu.dtype}, must be torch.int32; call {name}.int()"
        raise ArgumentTypeError(text, argument=name, given=cu.dtype, expected=torch.int32)
    check_device(name, cu, "q", q)
    if cu.ndim != 1 or cu.shape[0] < 1:
        raise wrong_value(f"{name}.shape", tuple(cu.shape), "(batch + 1,)", "0, then every end")
    if cu.shape[0] > 1 and cu.stride(0) != 1:
        raise wrong_value(f"{name}.stride()", cu.stride(), "contiguous", "call .contiguous()")
    if not validates(cu):
        return None
    ends: list[int] = cu.tolist()
    if ends[0] != 0:
        raise wrong_value(f"{name}[0]", ends[0], "0")
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise wrong_value(f"{name}[{i}]", ends[i], f"at least {ends[i - 1]}, its predecessor")
    if ends[-1] != total:
        raise wrong_value(f"{name}[-1]", ends[-1], f"{total}, the rows of the packed tensor")
    return ends


def check_max_seqlen(name: str, given: Any, ends: list[int] | None, cu: Tensor, total: int) -> Any:
    """The longest sequence; None is worked out, which on a GPU waits for it once."""
    longest = None
    if ends is not None:
        longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
    if given is None:
        if longest is not None:
            return longest
        if not concrete(cu) or cu.shape[0] < 2:
            return total
        if cu.is_cuda and torch.cuda.is_current_stream_capturing():
            return total
        return int((cu[1:] - cu[:-1]).amax().item())
    if isinstance(given, (bool, float)) or not isinstance(given, (int, torch.SymInt)):
        hint = "call int() on it once, outside the hot path"
        raise wrong_type(name, given, "an int or None", hint)
    if given < 0 or given > INT_MAX:
        raise wrong_value(name, given, "between 0 and 2**31 - 1")
    if longest is not None and given < longest:
        raise wrong_value(name, given, f"at least {longest}, the longest sequence")
    return int(given) if isinstance(given, int) else given


def check_varlen(q: Tensor, k: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> Varlen:
    ends_q = check_cu_seqlens("cu_seqlens_q", cu_q, q, q.shape[0])
    ends_k = check_cu_seqlens("cu_seqlens_k", cu_k, q, k.shape[0])
    if cu_q.shape != cu_k.shape:
        text = (
            f"cu_seqlens_q describes {cu_q.shape[0] - 1} sequences, "
            f"cu_seqlens_k {cu_k.shape[0] - 1}; both need one entry per sequence and a leading 0"
        )
        given = tuple(cu_k.shape)
        expected = tuple(cu_q.shape)
        raise ArgumentValueError(text, argument="cu_seqlens_k", given=given, expected=expected)
    longest_q = check_max_seqlen("max_seqlen_q", max_q, ends_q, cu_q, q.shape[0])
    longest_k = check_max_seqlen("max_seqlen_k", max_k, ends_k, cu_k, k.shape[0])
    return Varlen(cu_q, cu_k, longest_q, longest_k)


def _check_scale(name: str, scale: Any, x: Tensor, heads: tuple[int, ...], rows: int,
                 batch: int) -> tuple[Tensor, int]:  # fmt: skip
    """One FP8 scale as (batch, blocks, heads), and the rows that share one of its values."""
    if scale is None:
        shape = (batch, 1, heads[-1])
        hint = f"from flash.quantize_fp8, or torch.ones{shape} for values stored as they are"
        raise wrong_value(name, scale, "given for float8 inputs", hint)
    check_kind(name, scale)
    if scale.dtype != torch.float32:
        text = f"{name}.dtype is {scale.dtype}, must be torch.float32; call {name}.float()"
        raise ArgumentTypeError(text, argument=name, given=scale.dtype, expected=torch.float32)
    check_device(name, scale, "q", x)
    wide = scale.unsqueeze(1) if scale.ndim == 2 else scale
    blocks = {1, -(-rows // BLOCK)}
    shaped = wide.ndim == 3 and wide.shape[0] == batch
    if not shaped or wide.shape[2] not in heads or wide.shape[1] not in blocks:
        expected = f"(batch={batch}, blocks={sorted(blocks)}, heads={heads[-1]})"
        hint = f"a block is {BLOCK} rows; 1 block means the whole sequence"
        raise wrong_value(f"{name}.shape", tuple(scale.shape), expected, hint)
    if validates(scale) and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise wrong_value(name, "a scale that is not", "positive and finite")
    return wide, 0 if wide.shape[1] == 1 else BLOCK


def check_descale(q: Tensor, k: Tensor, scales: tuple[Any, Any, Any],
                  varlen: Varlen | None = None) -> Descale | None:  # fmt: skip
    """All three scales with float8 inputs, none with others."""
    names = ("q_descale", "k_descale", "v_descale")
    if q.dtype != FP8:
        for name, scale in zip(names, scales, strict=True):
            if scale is not None:
                hint = "scales belong to float8 inputs; use quantize_fp8 or precision='fp8'"
                raise wrong_value(name, type(scale).__name__, f"None for {q.dtype}", hint)
        return None
    if varlen is None:
        batch, rows_q, rows_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch, (rows_q, rows_k) = varlen.cu_seqlens_q.shape[0] - 1, varlen[2:]
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    found_q, block_q = _check_scale(names[0], scales[0], q, (heads_q, heads_kv), rows_q, batch)
    found_k, block_k = _check_scale(names[1], scales[1], q, (heads_kv,), rows_k, batch)
    found_v, block_v = _check_scale(names[2], scales[2], q, (heads_kv,), rows_k, batch)
    if block_k != block_v:
        text = "k_descale and v_descale must both have one scale per block, or both one in all"
        given = (tuple(found_k.shape), tuple(found_v.shape))
        raise ArgumentValueError(text, argument="v_descale", given=given, expected="equal blocks")
    return Descale(found_q, found_k, found_v, block_q, block_k)


def check_saved(dout: Any, q: Tensor, v: Tensor, out: Any, lse: Any, dlse: Any,
                order: tuple[int, ...]) -> None:  # fmt: skip
    """dout, out and lse of a backward call; `order` puts (.., rows, heads, dim) in the layout."""
    if q.dtype == FP8:
        text = "q is float8, which is forward only; give the 16-bit tensors to attention_backward"
        raise ArgumentTypeError(text, argument="q", given=q.dtype, expected="16-bit")
    shape = (*q.shape[:-1], v.shape[-1])
    expected = tuple(shape[i] for i in order)
    for name, x in (("dout", dout), ("out", out)):
        check_kind(name, x)
        check_dtype(name, x)
        check_same(name, x, "q", q)
        check_shape(name, x, expected, "that of the output")
        if x.dtype != out_dtype(q):
            raise wrong_value(f"{name}.dtype", x.dtype, str(out_dtype(q)))
        check_unit_stride(name, x)
    for name, x in (("lse", lse), ("dlse", dlse)):
        if x is None and name == "dlse":
            continue
        check_kind(name, x)
        if x.dtype != lse_dtype(q):
            text = f"{name}.dtype is {x.dtype}, must be {lse_dtype(q)}: natural logarithms"
            raise ArgumentTypeError(text, argument=name, given=x.dtype, expected=lse_dtype(q))
        check_device(name, x, "q", q)
        check_shape(name, x, lse_shape(q), "batch, heads, rows; packed: heads, rows")
