"""The exact answer: attention in fp64 (or fp32), block by block in both directions.

No (rows x keys) tensor is formed, so 128k x 128k fits. A masked key or row never reaches a result,
even when it holds NaN: its products are taken with zeros and visible non-finite values put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flash.engines import layout
from flash.spec import Descale, Grads, Result, Spec, Varlen

BLOCK_BYTES = 1 << 25  # of one block of scores
BLOCK_MIN, BLOCK_MAX = 64, 1024


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    descale: Descale | None = None,
    varlen: Varlen | None = None,
    out: Tensor | None = None,
    math_dtype: torch.dtype = torch.float64,
) -> Result:
    result = layout.new_result(q, v, out)
    if varlen is None:
        _forward(q, k, v, spec, descale, result, math_dtype)
        return result
    layout.fill_empty(result)
    for rows, keys, scales in layout.sequences(varlen, descale):
        part = Result(result.out[None, rows], result.lse[None, :, rows])
        _forward(q[None, rows], k[None, keys], v[None, keys], spec, scales, part, math_dtype)
    return result


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
    math_dtype: torch.dtype = torch.float64,
) -> Grads:
    grads = layout.new_grads(q, k, v, dq, dk, dv)
    if varlen is None:
        _backward(dout, dlse, q, k, v, out, lse, spec, grads, math_dtype)
        return grads
    for grad in grads:
        grad.zero_()
    for rows, keys, _ in layout.sequences(varlen, None):
        by_row = (x[None, rows] for x in (dout, q, out, grads.dq))
        dout_i, q_i, out_i, dq_i = by_row
        k_i, v_i, dk_i, dv_i = (x[None, keys] for x in (k, v, grads.dk, grads.dv))
        dlse_i = None if dlse is None else dlse[None, :, rows]
        part = Grads(dq_i, dk_i, dv_i)
        lse_i = lse[None, :, rows]
        _backward(dout_i, dlse_i, q_i, k_i, v_i, out_i, lse_i, spec, part, math_dtype)
    return grads


def _heads(x: Tensor, heads_kv: int, dtype: torch.dtype) -> Tensor:
    """(batch, rows, heads, dim) -> (batch, heads_kv, group, rows, dim) in the precision of math."""
    return x.to(dtype).unflatten(2, (heads_kv, x.shape[2] // heads_kv)).permute(0, 2, 3, 1, 4)


def _stats(x: Tensor, heads_kv: int, dtype: torch.dtype) -> Tensor:
    """(batch, heads, rows) -> (batch, heads_kv, group, rows, 1)."""
    return x.to(dtype).unflatten(1, (heads_kv, x.shape[1] // heads_kv)).unsqueeze(-1)


class Band:
    """Which blocks of keys a block of rows sees, and which pairs within."""

    def __init__(self, spec: Spec, q: Tensor, k: Tensor) -> None:
        self.rows, self.keys, self.device = q.shape[1], k.shape[1], q.device
        self.first, self.last = spec.band(self.rows, self.keys)
        pairs = BLOCK_BYTES // 8 // max(1, q.shape[0] * q.shape[2])
        side = 1 << max(0, math.isqrt(max(1, pairs)).bit_length() - 1)
        self.block = min(BLOCK_MAX, max(BLOCK_MIN, side))

    def row_blocks(self) -> Iterator[slice]:
        for begin in range(0, self.rows, self.block):
            yield slice(begin, min(begin + self.block, self.rows))

    def key_blocks(self, rows: slice) -> Iterator[slice]:
        begin = 0 if self.first is None else max(0, rows.start + self.first)
        end = self.keys if self.last is None else min(self.keys, rows.stop + self.last)
        for block in range(begin, end, self.block):
            yield slice(block, min(block + self.block, end))

    def visible(self, rows: slice, keys: slice) -> Tensor | None:
        """(rows, keys) booleans; None when every pair of the block is visible."""
        low = self.first is None or keys.start >= rows.stop - 1 + self.first
        high = self.last is None or keys.stop - 1 <= rows.start + self.last
        if low and high:
            return None
        r = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
        c = torch.arange(keys.start, keys.stop, device=self.device)[None, :]
        seen = torch.ones((), dtype=torch.bool, device=self.device).expand(len(r), c.shape[1])
        if self.first is not None:
            seen = seen & (c >= r + self.first)
        if self.last is not None:
            seen = seen & (c <= r + self.last)
        return seen


def masked_matmul(weights: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """weights @ x, where a weight that is not visible meets nothing, not even NaN or infinity."""
    if visible is None or bool(torch.isfinite(x).all()):
        return weights @ x
    total = weights @ torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    seen = visible.to(x.dtype)
    for value, found in ((math.inf, x == math.inf), (-math.inf, x == -math.inf)):
        total = total + torch.where(seen @ found.to(x.dtype) > 0, value, 0.0)
    return total.masked_fill(seen @ torch.isnan(x).to(x.dtype) > 0, math.nan)


def _scores(q: Tensor, k: Tensor, spec: Spec, visible: Tensor | None) -> Tensor:
    s = (q @ k.transpose(-1, -2)) * spec.scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    return s if visible is None else s.masked_fill(~visible, -math.inf)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    descale: Descale | None,
    result: Result,
    dtype: torch.dtype,
) -> None:
    heads_kv = k.shape[2]
    if q.numel() == 0 or k.shape[1] == 0 or heads_kv == 0:
        layout.fill_empty(result)
        return
    band = Band(spec, q, k)
    wide = (_heads(x, heads_kv, dtype) for x in layout.dequantize_all(q, k, v, descale, dtype))
    gq, gk, gv = wide
    for rows in band.row_blocks():
        o, lse = _forward_rows(band, rows, gq[..., rows, :], gk, gv, spec)
        result.out[:, rows] = o.permute(0, 3, 1, 2, 4).flatten(2, 3).to(result.out.dtype)
        result.lse[:, :, rows] = lse.flatten(1, 2).squeeze(-1).to(result.lse.dtype)


def _forward_rows(
    band: Band, rows: slice, q: Tensor, k: Tensor, v: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Online softmax of one block of rows over all the keys it sees."""
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    row_max = q.new_full((*q.shape[:-1], 1), -math.inf)
    row_sum = torch.zeros_like(row_max)
    for keys in band.key_blocks(rows):
        visible = band.visible(rows, keys)
        s = _scores(q, k[..., keys, :], spec, visible)
        new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
        base = new_max.masked_fill(new_max == -math.inf, 0.0)
        p = torch.exp(s - base)
        rescale = torch.exp(row_max - base)
        row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
        o = o * rescale + masked_matmul(p, v[..., keys, :], visible)
        row_max = new_max
    empty = row_max == -math.inf
    lse = row_max + torch.log(row_sum.masked_fill(empty, 1.0))
    o = o / row_sum.masked_fill(empty, 1.0)
    return o.masked_fill(empty, 0.0), lse.masked_fill(empty, -math.inf)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    grads: Grads,
    dtype: torch.dtype,
) -> None:
    heads_kv = k.shape[2]
    if q.numel() == 0 or k.shape[1] == 0 or heads_kv == 0:
        for grad in grads:
            grad.zero_()
        return
    band = Band(spec, q, k)
    gq, gk, gv, gdo, go = (_heads(x, heads_kv, dtype) for x in (q, k, v, dout, out))
    glse = _stats(lse, heads_kv, dtype)
    delta = (gdo * go).sum(-1, keepdim=True)  # (batch, heads_kv, group, rows, 1)
    if dlse is not None:
        delta = delta - _stats(dlse, heads_kv, dtype)
    dk, dv = torch.zeros_like(gk[:, :, 0]), torch.zeros_like(gv[:, :, 0])
    for rows in band.row_blocks():
        block = tuple(x[..., rows, :] for x in (gq, gdo, glse, delta))
        dq = _backward_rows(band, rows, block, (gk, gv), (dk, dv), spec)
        grads.dq[:, rows] = dq.permute(0, 3, 1, 2, 4).flatten(2, 3).to(grads.dq.dtype)
    grads.dk.copy_(dk.transpose(1, 2))
    grads.dv.copy_(dv.transpose(1, 2))


def _backward_rows(
    band: Band,
    rows: slice,
    block: tuple[Tensor, ...],
    kv: tuple[Tensor, Tensor],
    dkv: tuple[Tensor, Tensor],
    spec: Spec,
) -> Tensor:
    """dQ of one block of rows; adds its share to dK and dV."""
    q, dout, lse, delta = block
    empty = lse == -math.inf
    dq = torch.zeros_like(q)
    for keys in band.key_blocks(rows):
        visible = band.visible(rows, keys)
        k, v = (x[..., keys, :] for x in kv)
        s = _scores(q, k, spec, visible)
        p = torch.exp(s - lse.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
        ds = p * (dout @ v.transpose(-1, -2) - delta)
        if spec.softcap:
            ds = ds * (1.0 - (s / spec.softcap).square())
        hidden = empty.expand_as(s) if visible is None else ~visible | empty
        ds = ds.masked_fill(hidden, 0.0) * spec.scale
        seen = ~hidden if visible is not None or bool(empty.any()) else None
        turned = None if seen is None else seen.transpose(-1, -2)
        dq += masked_matmul(ds, k, seen)
        dkv[0][..., keys, :] += masked_matmul(ds.transpose(-1, -2), q, turned).sum(2)
        dkv[1][..., keys, :] += masked_matmul(p.transpose(-1, -2), dout, turned).sum(2)
    return dq
