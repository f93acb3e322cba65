"""Keep one Q block on chip and stream K/V past it: O stays in registers, divided once at last."""

from __future__ import annotations

import torch
from torch import Tensor

from flash.spec import Descale, Grads, Result, Spec
from flash.tiles import (
    INF,
    Band,
    Memory,
    Range,
    Tile,
    blocks,
    by_kv_head,
    gemm_pv,
    gemm_qk,
    gemm_tn,
    join_rows,
    matmul,
    new_grads,
    new_result,
    normalize,
    probabilities,
    rescale,
    rounded,
    score_gradient,
    scores,
    split_rows,
    stats_by_kv_head,
    update,
)
from flash.traffic import Traffic

TILE = Tile(q=128, kv=64)
WARPS = 4  # each owns a slice of the rows of Q, so that no row statistic crosses warps


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, *, descale: Descale | None = None,
            traffic: Traffic | None = None, tile: Tile | None = None) -> Result:  # fmt: skip
    """Attention of dense (batch, seqlen, heads, dim) tensors; every Q block is a CTA of its own."""
    if descale is not None:
        raise NotImplementedError("v2_parallel has no FP8 schedule; v3_hopper has")
    tile = tile or TILE
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    result = new_result(q, v)
    gQ, gK, gV, gO = (by_kv_head(x, k.shape[2]) for x in (q, k, v, result.out))
    gLSE = stats_by_kv_head(result.lse, k.shape[2])
    group = gQ.shape[2]

    for rows in blocks(band.every_row(), tile.q, q.shape[1]):
        Q = split_rows(memory.load("Q", gQ, rows), tile.q, WARPS)
        O, row_max, row_sum = init_state(Q, v.shape[-1])
        for keys in blocks(band.keys(rows), tile.kv, k.shape[1]):
            K = memory.load("K", gK, keys, seen=band.keys(rows), times=group).unsqueeze(-3)
            V = memory.load("V", gV, keys, seen=band.keys(rows), times=group).unsqueeze(-3)
            S = mask(scores(gemm_qk(Q, K), spec), band, rows, keys)
            P, row_max, row_sum, alpha = update(S, row_max, row_sum)
            O = rescale(O, alpha) + gemm_pv(P, V, q.dtype)
        O, lse = normalize(O, row_max, row_sum)
        memory.store("O", gO, rows, join_rows(O, rows.size))
        memory.store("LSE", gLSE, rows, join_rows(lse, rows.size))

    return result


def init_state(Q: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """O not yet normalized, row maximum and row sum, in registers from first to last block."""
    return (Q.new_zeros(*Q.shape[:-1], dim), Q.new_full((*Q.shape[:-1], 1), -INF),
            Q.new_zeros(*Q.shape[:-1], 1))  # fmt: skip


def mask(S: Tensor, band: Band, rows: Range, keys: Range) -> Tensor:
    if band.all_visible(rows, keys):
        return S
    warps, slice_rows = S.shape[-3:-1]
    padded = Range(rows.begin, rows.begin + warps * slice_rows)
    visible = band.visible(padded, keys, S.device).unflatten(0, (warps, slice_rows))
    return S.masked_fill(~visible, -INF)


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
             lse: Tensor, spec: Spec, *, traffic: Traffic | None = None,
             tile: Tile | None = None) -> Grads:  # fmt: skip
    """Every K/V block is a CTA that owns dK and dV; their shares of dQ are added up in memory."""
    tile = tile or TILE
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    grads, heads = new_grads(q, k, v), k.shape[2]
    gQ, gK, gV, gO, gdO = (by_kv_head(x, heads) for x in (q, k, v, out, dout))
    gdQ, gdK, gdV = (by_kv_head(x, heads) for x in grads)
    gLSE = stats_by_kv_head(lse, heads)
    gdLSE = None if dlse is None else stats_by_kv_head(dlse, heads)
    gdQ_tmp, gDelta = memory.scratch(gQ, q.shape[-1]), memory.scratch(gQ, 1)
    seen = band.rows(band.every_key())
    prepare(memory, band, tile.q, gO, gdO, gdLSE, gDelta, gdQ_tmp)

    for keys in blocks(band.every_key(), tile.kv, k.shape[1]):
        K = memory.load("K", gK, keys, seen=band.keys(band.every_row()))
        V = memory.load("V", gV, keys, seen=band.keys(band.every_row()))
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        for rows in blocks(band.rows(keys), tile.q, q.shape[1]):
            Q = memory.load("Q", gQ, rows, seen)
            dO = memory.load("dO", gdO, rows, seen)
            delta = memory.load("delta", gDelta, rows)
            row_lse = memory.load("LSE", gLSE, rows)
            visible = None if band.all_visible(rows, keys) else band.visible(rows, keys, q.device)
            S = scores(gemm_qk(Q, K), spec)
            P = probabilities(S, row_lse, visible)
            dP = gemm_qk(dO, V)
            dS = rounded(score_gradient(P, dP, delta, S, spec, visible), q.dtype)
            dV += gemm_tn(rounded(P, q.dtype), dO)
            dK += gemm_tn(dS, Q)
            memory.add("dQ", gdQ_tmp, rows, matmul(dS, K))
        memory.store("dK", gdK, keys, dK * spec.scale)
        memory.store("dV", gdV, keys, dV)

    finish(memory, band, tile.q, gdQ_tmp, gdQ, spec)
    return grads


def prepare(memory: Memory, band: Band, block_q: int, gO: Tensor, gdO: Tensor,
            gdLSE: Tensor | None, gDelta: Tensor, gdQ_tmp: Tensor) -> None:  # fmt: skip
    """sum(dO * O) less the gradient that arrives through LSE, once per row; clears the dQ sums."""
    for rows in blocks(band.every_row(), block_q, band.seqlen_q):
        delta = (memory.load("O", gO, rows) * memory.load("dO", gdO, rows)).sum(-1, keepdim=True)
        if gdLSE is not None:
            delta -= memory.load("dLSE", gdLSE, rows)
        memory.store("delta", gDelta, rows, delta)
        memory.store("dQ", gdQ_tmp, rows, 0.0)


def finish(memory: Memory, band: Band, block_q: int, gdQ_tmp: Tensor, gdQ: Tensor,
           spec: Spec) -> None:  # fmt: skip
    """The finished sums, scaled and rounded once."""
    for rows in blocks(band.every_row(), block_q, band.seqlen_q):
        memory.store("dQ", gdQ, rows, memory.load("dQ", gdQ_tmp, rows) * spec.scale)
