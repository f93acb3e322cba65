"""PyTorch's own attention with this project's semantics: alignment, GQA, empty rows, LSE.

Plain and causal masks are cut into rectangles and squares that PyTorch's flash kernels serve, and
joined through their LSE; everything else runs block by block in fp32 matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.engines import layout, reference
from flash.spec import Descale, Grads, Result, Spec, Varlen

aten = torch.ops.aten
# PyTorch's own kernels; the SDPA door puts the originals here while it stands in their place.
OWN: dict[str, Callable[..., Any]] = {
    "cpu": aten._scaled_dot_product_flash_attention_for_cpu.default,
    "cpu backward": aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    "cuda": aten._scaled_dot_product_flash_attention.default,
    "cuda backward": aten._scaled_dot_product_flash_attention_backward.default,
}


class Piece(NamedTuple):
    """Rows that attend to keys: all of them, or the square's lower triangle."""

    rows: slice
    keys: slice
    causal: bool


@functools.lru_cache(maxsize=512)
def pieces(
    left: int | None, right: int | None, top_left: bool, seqlen_q: int, seqlen_k: int
) -> tuple[Piece, ...] | None:
    """The mask as rectangles and squares; None when it is not made of those."""
    if left is None and right is None:
        return (Piece(slice(0, seqlen_q), slice(0, seqlen_k), False),)
    if left is not None or right != 0:
        return None
    shift = 0 if top_left else seqlen_k - seqlen_q
    begin = max(0, -shift)  # rows before it see nothing
    prefix = begin + shift  # keys that all rows from `begin` on see
    square = max(0, min(seqlen_q - begin, seqlen_k - prefix))
    rows = slice(begin, begin + square)
    cut = [
        Piece(rows, slice(0, prefix), False),
        Piece(rows, slice(prefix, prefix + square), True),
        Piece(slice(rows.stop, seqlen_q), slice(0, seqlen_k), False),
    ]
    return tuple(p for p in cut if p.rows.start < p.rows.stop and p.keys.start < p.keys.stop)


def _served(q: Tensor, v: Tensor, spec: Spec) -> bool:
    """PyTorch has a flash kernel for these tensors and scores."""
    if spec.softcap or spec.scale <= 0 or q.shape[-1] != v.shape[-1] or q.dtype == layout.FP8:
        return False
    if q.device.type == "cpu":
        return True
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    modern = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return modern and not spec.deterministic and q.shape[-1] % 8 == 0


def _plan(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Piece, ...] | None:
    """Pieces for PyTorch's kernels; None when the block-by-block path must run.

    Those kernels multiply masked keys by zero, so non-finite keys under a triangle need that path;
    to find them a GPU is waited for, except while a CUDA graph is recorded.
    """
    if not _served(q, v, spec):
        return None
    cut = pieces(spec.left, spec.right, spec.top_left, q.shape[1], k.shape[1])
    if cut is not None and spec.right is not None and not _capturing(q):
        finite = torch.isfinite(k).all() & torch.isfinite(v).all()
        return cut if bool(finite) else None
    return cut


def _capturing(q: Tensor) -> bool:
    """A CUDA graph is being recorded: nothing can be read back."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _math_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, dim) in and out; LSE (batch, heads, rows)."""
    if q.device.type == "cpu":
        out, lse = OWN["cpu"](q, k, v, 0.0, causal, scale=scale)
        return out, lse
    found = OWN["cuda"](q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _call_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = lse.contiguous()
    if q.device.type == "cpu":
        run = OWN["cpu backward"]
        found: Any = run(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        run = OWN["cuda backward"]
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.int32, device=q.device)
        sizes = (None, None, q.shape[2], k.shape[2])  # any tensor there means packed sequences
        found = run(dout, q, k, v, out, lse, *sizes, 0.0, causal, seed, unused, scale=scale)
    return found[0], found[1], found[2]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    descale: Descale | None = None,
    varlen: Varlen | None = None,
    out: Tensor | None = None,
) -> Result:
    if varlen is not None:
        return _each_sequence(q, k, v, spec, descale, varlen, out)
    if q.numel() == 0 or k.shape[1] == 0:
        return layout.fill_empty(layout.new_result(q, v, out))
    cut = _plan(q, k, v, spec)
    if cut is None:
        run = functools.partial(reference.forward, math_dtype=_math_dtype(q))
        return run(q, k, v, spec, descale=descale, out=out)
    tq, tk, tv = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if len(cut) == 1 and cut[0].rows.stop - cut[0].rows.start == q.shape[1]:
        keys = cut[0].keys
        found, lse = _call(tq, tk[:, :, keys], tv[:, :, keys], cut[0].causal, spec.scale)
        return Result(_deliver(found.transpose(1, 2), out), lse.contiguous())
    result = layout.fill_empty(layout.new_result(q, v, out))
    _join_pieces(cut, (tq, tk, tv), spec, result)
    return result


def _deliver(found: Tensor, out: Tensor | None) -> Tensor:
    """Into the caller's tensor, or (batch, rows, heads, dim)-contiguous memory."""
    return found.contiguous() if out is None else out.copy_(found)


def _join_pieces(
    cut: tuple[Piece, ...], qkv: tuple[Tensor, Tensor, Tensor], spec: Spec, result: Result
) -> None:
    q, k, v = qkv
    for rows in dict.fromkeys((p.rows.start, p.rows.stop) for p in cut):
        span = slice(*rows)
        same = [p for p in cut if (p.rows.start, p.rows.stop) == rows]
        parts = [
            _call(q[:, :, span], k[:, :, p.keys], v[:, :, p.keys], p.causal, spec.scale)
            for p in same
        ]
        found, lse = parts[0]
        if len(parts) == 2:
            lse = torch.logaddexp(parts[0][1], parts[1][1])
            weights = [torch.exp(part - lse).unsqueeze(-1) for _, part in parts]
            found = weights[0] * parts[0][0] + weights[1] * parts[1][0]
        result.out[:, span].copy_(found.transpose(1, 2))
        result.lse[:, :, span].copy_(lse)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    *,
    varlen: Varlen | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Grads:
    grads = layout.new_grads(q, k, v, dq, dk, dv)
    run: Callable[..., Grads] = functools.partial(reference.backward, math_dtype=_math_dtype(q))
    if varlen is not None:
        run(dout, dlse, q, k, v, out, lse, spec, varlen=varlen, **grads._asdict())
        return grads
    cut = None if dlse is not None or k.numel() == 0 or q.numel() == 0 else _plan(q, k, v, spec)
    if cut is None:
        return run(dout, dlse, q, k, v, out, lse, spec, **grads._asdict())
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    for rows, keys, causal in cut:
        by_row = [x[:, rows].transpose(1, 2) for x in (dout, q, out)]
        by_key = [x[:, keys].transpose(1, 2) for x in (k, v)]
        found = _call_backward(
            by_row[0], by_row[1], by_key[0], by_key[1], by_row[2], lse[:, :, rows], causal,
            spec.scale,
        )  # fmt: skip
        if len(cut) == 1 and found[0].shape[2] == q.shape[1] and found[1].shape[2] == k.shape[1]:
            return Grads(*(g.copy_(f.transpose(1, 2)) for g, f in zip(grads, found, strict=True)))
        for total, part, span in zip(sums, found, (rows, keys, keys), strict=True):
            total[:, span] += part.transpose(1, 2)
    return Grads(*(g.copy_(f) for g, f in zip(grads, sums, strict=True)))


def _each_sequence(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, descale: Descale | None, varlen: Varlen,
    out: Tensor | None,
) -> Result:  # fmt: skip
    result = layout.fill_empty(layout.new_result(q, v, out))
    for rows, keys, scales in layout.sequences(varlen, descale):
        if rows.start < rows.stop and keys.start < keys.stop:
            part = (q[None, rows], k[None, keys], v[None, keys])
            _, lse = forward(*part, spec, descale=scales, out=result.out[None, rows])
            result.lse[:, rows] = lse[0]
    return result
