"""What all three schedules share: tiles, the band of visible keys, memory, and the softmax verbs.

Tensors are (batch, heads_kv, group, rows, dim): the query heads of one K/V head stand side by side
and K/V broadcast over them. Only the loops over tiles are Python loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash.spec import LSE_DTYPE, Grads, Result, Spec
from flash.traffic import Traffic

INF = math.inf
FP8 = torch.float8_e4m3fn


class Tile(NamedTuple):
    """Rows of Q and rows of K/V that are on chip at a time."""

    q: int
    kv: int


class Range(NamedTuple):
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Band:
    """Row r sees key c when r + first <= c <= r + last: common/mask.cuh in Python."""

    def __init__(self, spec: Spec, seqlen_q: int, seqlen_k: int) -> None:
        first, last = spec.band(seqlen_q, seqlen_k)
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k
        self.first = -seqlen_q if first is None else first
        self.last = seqlen_k if last is None else last

    def keys(self, rows: Range) -> Range:
        """Keys that any of the rows sees."""
        begin = max(0, rows.begin + self.first)
        return Range(begin, max(begin, min(self.seqlen_k, rows.end + self.last)))

    def rows(self, keys: Range) -> Range:
        """Query rows that see any of the keys."""
        begin = max(0, keys.begin - self.last)
        return Range(begin, max(begin, min(self.seqlen_q, keys.end - self.first)))

    def all_visible(self, rows: Range, keys: Range) -> bool:
        """Every row sees every key, so the tile needs no mask."""
        return keys.begin >= rows.end - 1 + self.first and keys.end - 1 <= rows.begin + self.last

    def visible(self, rows: Range, keys: Range, device: torch.device) -> Tensor:
        r = torch.arange(rows.begin, rows.end, device=device)[:, None]
        c = torch.arange(keys.begin, keys.end, device=device)[None, :]
        return (c >= r + self.first) & (c <= r + self.last)  # (rows, keys)

    def every_row(self) -> Range:
        return Range(0, self.seqlen_q)

    def every_key(self) -> Range:
        return Range(0, self.seqlen_k)


def blocks(span: Range, size: int, limit: int) -> Iterator[Range]:
    """The tiles of `size` rows, counted from row 0, that `span` touches; the last ends at limit."""
    if span.end > span.begin:
        for begin in range(span.begin // size * size, span.end, size):
            yield Range(begin, min(begin + size, limit))


class Memory:
    """Device memory: every load and store of a tile is counted."""

    def __init__(self, dtype: torch.dtype, traffic: Traffic | None) -> None:
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.traffic = Traffic() if traffic is None else traffic

    def load(self, name: str, g: Tensor, rows: Range, seen: Range | None = None,
             times: int = 1) -> Tensor:  # fmt: skip
        """One tile in compute precision; rows out of `seen` are zeros, whatever they hold."""
        tile = g[..., rows.begin : rows.end, :]
        self.traffic.read(name, times * tile.numel() * g.element_size())
        tile = tile.to(self.compute)
        if seen is not None and (seen.begin > rows.begin or seen.end < rows.end):
            row = torch.arange(rows.begin, rows.end, device=g.device)[:, None]
            tile = tile.masked_fill((row < seen.begin) | (row >= seen.end), 0.0)
        return tile

    def store(self, name: str, g: Tensor, rows: Range, tile: Tensor | float) -> None:
        target = g[..., rows.begin : rows.end, :]
        self.traffic.write(name, target.numel() * g.element_size())
        if isinstance(tile, Tensor):
            target.copy_(tile)
        else:
            target.fill_(tile)

    def add(self, name: str, g: Tensor, rows: Range, tile: Tensor) -> None:
        """A reduction into memory: the bytes travel once, the sum is formed in L2."""
        target = g[..., rows.begin : rows.end, :]
        self.traffic.write(name, target.numel() * g.element_size())
        target.add_(tile)

    def scratch(self, like: Tensor, dim: int, value: float = 0.0) -> Tensor:
        """An accumulator in memory with the rows of `like`, in compute precision."""
        shape = (*like.shape[:-1], dim)
        return torch.full(shape, value, dtype=self.compute, device=like.device)


def by_kv_head(x: Tensor, heads_kv: int) -> Tensor:
    """(batch, rows, heads, dim) -> a view (batch, heads_kv, group, rows, dim)."""
    return x.unflatten(2, (heads_kv, x.shape[2] // max(1, heads_kv))).permute(0, 2, 3, 1, 4)


def stats_by_kv_head(x: Tensor, heads_kv: int) -> Tensor:
    """(batch, heads, rows) -> a view (batch, heads_kv, group, rows, 1)."""
    return x.unflatten(1, (heads_kv, x.shape[1] // max(1, heads_kv))).unsqueeze(-1)


def new_result(q: Tensor, v: Tensor) -> Result:
    batch, seqlen_q, heads_q, _ = q.shape
    dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    out = torch.empty(batch, seqlen_q, heads_q, v.shape[-1], dtype=dtype, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else LSE_DTYPE
    lse = torch.empty(batch, heads_q, seqlen_q, dtype=lse_dtype, device=q.device)
    return Result(out, lse)


def new_grads(q: Tensor, k: Tensor, v: Tensor) -> Grads:
    return Grads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)))


def split_rows(x: Tensor, rows: int, parts: int) -> Tensor:
    """(..., n, dim) -> (..., parts, rows / parts, dim): a slice of rows for each part."""
    if x.shape[-2] < rows:
        x = torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[-2]))
    return x.unflatten(-2, (parts, rows // parts))


def join_rows(x: Tensor, rows: int) -> Tensor:
    """Undo split_rows: (..., parts, rows / parts, dim) -> (..., n, dim)."""
    return x.flatten(-3, -2)[..., :rows, :]


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A @ B on a tile of at least 8 rows: BLAS sums a single row in another order."""
    rows = A.shape[-2]
    if rows < 8:
        A = torch.nn.functional.pad(A, (0, 0, 0, 8 - rows))
    return (A @ B)[..., :rows, :]


def gemm_qk(Q: Tensor, K: Tensor) -> Tensor:
    """Q K^T: (rows, keys)."""
    return matmul(Q, K.mT)


def gemm_pv(P: Tensor, V: Tensor, dtype: torch.dtype) -> Tensor:
    """P V with P in the precision of the inputs: (rows, dim)."""
    return matmul(rounded(P, dtype), V)


def gemm_tn(P: Tensor, dO: Tensor) -> Tensor:
    """P^T dO, summed over the query heads of the K/V head: (keys, dim)."""
    return matmul(P.mT, dO).sum(2, keepdim=True)


def rescale(O: Tensor, factor: Tensor) -> Tensor:
    """What was summed under the old maximum, under the new one."""
    return O * factor


def scores(S: Tensor, spec: Spec) -> Tensor:
    """Raw products -> scaled and soft-capped scores."""
    S = S * spec.scale
    return spec.softcap * torch.tanh(S / spec.softcap) if spec.softcap else S


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the precision that the tensor cores take, and back for the arithmetic here."""
    return x.to(dtype).to(x.dtype)


def finite_max(row_max: Tensor) -> Tensor:
    """The shift for exp: a row that has seen nothing is shifted by 0, not by -inf."""
    return row_max.masked_fill(row_max == -INF, 0.0)


def update(S: Tensor, row_max: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of scores into the running softmax: P, new max, new sum, factor for the old O."""
    new_max = torch.maximum(row_max, S.amax(-1, keepdim=True))
    shift = finite_max(new_max)
    alpha = torch.exp(row_max - shift)
    P = torch.exp(S - shift)
    return P, new_max, row_sum * alpha + P.sum(-1, keepdim=True), alpha


def normalize(O: Tensor, row_max: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor]:
    """O and LSE of finished rows; a row without keys gives 0 and -inf."""
    empty = row_sum == 0
    lse = (finite_max(row_max) + torch.log(row_sum)).masked_fill(empty, -INF)
    return O / row_sum.masked_fill(empty, 1.0), lse


def probabilities(S: Tensor, lse: Tensor, visible: Tensor | None) -> Tensor:
    """P again from the saved row statistic; where nothing is visible, exactly 0."""
    P = torch.exp(S - finite_max(lse))
    return P if visible is None else P.masked_fill(~visible, 0.0)


def score_gradient(P: Tensor, dP: Tensor, delta: Tensor, S: Tensor, spec: Spec,
                   visible: Tensor | None) -> Tensor:  # fmt: skip
    """dS with respect to the raw products, before the factor `scale`."""
    dS = P * (dP - delta)
    if spec.softcap:
        dS = dS * (1.0 - (S / spec.softcap) ** 2)
    return dS if visible is None else dS.masked_fill(~visible, 0.0)
