"""Keep one K/V block on chip and stream every Q block past it: O, m and l travel through memory."""

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
    matmul,
    new_grads,
    new_result,
    normalize,
    probabilities,
    rescale,
    rounded,
    score_gradient,
    scores,
    stats_by_kv_head,
    update,
)
from flash.traffic import Traffic

TILE = Tile(q=64, kv=128)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, *, descale: Descale | None = None,
            traffic: Traffic | None = None, tile: Tile | None = None) -> Result:  # fmt: skip
    """Attention of dense (batch, seqlen, heads, dim) tensors, one K/V block after the other."""
    if descale is not None:
        raise NotImplementedError("v1_tiling has no FP8 schedule; v3_hopper has")
    tile = tile or TILE
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    result = new_result(q, v)
    gQ, gK, gV, gO = (by_kv_head(x, k.shape[2]) for x in (q, k, v, result.out))
    gLSE = stats_by_kv_head(result.lse, k.shape[2])
    group = gQ.shape[2]
    gO_tmp = memory.scratch(gO, v.shape[-1])
    gM, gL = memory.scratch(gO, 1, -INF), memory.scratch(gO, 1)

    for keys in blocks(band.every_key(), tile.kv, k.shape[1]):
        if not band.rows(keys).size:
            continue
        K = memory.load("K", gK, keys, seen=band.keys(band.every_row()), times=group)
        V = memory.load("V", gV, keys, seen=band.keys(band.every_row()), times=group)
        for rows in blocks(band.rows(keys), tile.q, q.shape[1]):
            Q = memory.load("Q", gQ, rows)
            O, row_max, row_sum = load_state(
                memory, gO_tmp, gM, gL, rows, first_visit(band, rows, keys)
            )
            S = mask(scores(gemm_qk(Q, K), spec), band, rows, keys)
            P, row_max, new_sum, alpha = update(S, row_max, row_sum)
            O = rescale(O, row_sum * alpha) + gemm_pv(P, V, q.dtype)
            O, lse = normalize(O, row_max, new_sum)
            if last_visit(band, rows, keys):
                memory.store("O", gO, rows, O)
                memory.store("LSE", gLSE, rows, lse)
            else:
                store_state(memory, gO_tmp, gM, gL, rows, O, row_max, new_sum)

    store_empty(memory, band, tile.q, gO, gLSE)
    return result


def first_visit(band: Band, rows: Range, keys: Range) -> bool:
    return band.keys(rows).begin >= keys.begin


def last_visit(band: Band, rows: Range, keys: Range) -> bool:
    return band.keys(rows).end <= keys.end


def load_state(memory: Memory, gO: Tensor, gM: Tensor, gL: Tensor, rows: Range,
               first: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """O normalized so far, row maximum and row sum; known without a load at the first visit."""
    if first:
        O, row_max, row_sum = (g[..., rows.begin : rows.end, :] for g in (gO, gM, gL))
        return O, row_max, row_sum
    O, row_max, row_sum = (memory.load(n, g, rows) for n, g in (("O", gO), ("m", gM), ("l", gL)))
    return O, row_max, row_sum


def mask(S: Tensor, band: Band, rows: Range, keys: Range) -> Tensor:
    if band.all_visible(rows, keys):
        return S
    return S.masked_fill(~band.visible(rows, keys, S.device), -INF)


def store_state(memory: Memory, gO: Tensor, gM: Tensor, gL: Tensor, rows: Range,
                O: Tensor, row_max: Tensor, row_sum: Tensor) -> None:  # fmt: skip
    memory.store("O", gO, rows, O)
    memory.store("m", gM, rows, row_max)
    memory.store("l", gL, rows, row_sum)


def store_empty(memory: Memory, band: Band, block_q: int, gO: Tensor, gLSE: Tensor) -> None:
    """Q blocks that no K/V block visited."""
    for rows in blocks(band.every_row(), block_q, band.seqlen_q):
        if not band.keys(rows).size:
            memory.store("O", gO, rows, 0.0)
            memory.store("LSE", gLSE, rows, -INF)


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
             lse: Tensor, spec: Spec, *, traffic: Traffic | None = None,
             tile: Tile | None = None) -> Grads:  # fmt: skip
    """P again from Q, K and LSE; dK and dV stay on chip, dQ travels through memory like O."""
    tile = tile or TILE
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    grads, heads = new_grads(q, k, v), k.shape[2]
    gQ, gK, gV, gO, gdO = (by_kv_head(x, heads) for x in (q, k, v, out, dout))
    gdQ, gdK, gdV = (by_kv_head(x, heads) for x in grads)
    gLSE = stats_by_kv_head(lse, heads)
    gdLSE = None if dlse is None else stats_by_kv_head(dlse, heads)
    gdQ_tmp = memory.scratch(gQ, q.shape[-1])
    seen = band.rows(band.every_key())

    for keys in blocks(band.every_key(), tile.kv, k.shape[1]):
        K = memory.load("K", gK, keys, seen=band.keys(band.every_row()))
        V = memory.load("V", gV, keys, seen=band.keys(band.every_row()))
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        for rows in blocks(band.rows(keys), tile.q, q.shape[1]):
            Q = memory.load("Q", gQ, rows, seen)
            dO = memory.load("dO", gdO, rows, seen)
            delta = row_delta(memory, gO, gdLSE, dO, rows)
            row_lse = memory.load("LSE", gLSE, rows)
            visible = None if band.all_visible(rows, keys) else band.visible(rows, keys, q.device)
            S = scores(gemm_qk(Q, K), spec)
            P = probabilities(S, row_lse, visible)
            dP = gemm_qk(dO, V)
            dS = rounded(score_gradient(P, dP, delta, S, spec, visible), q.dtype)
            dV += gemm_tn(rounded(P, q.dtype), dO)
            dK += gemm_tn(dS, Q)
            dQ = matmul(dS, K)
            if not first_visit(band, rows, keys):
                dQ += memory.load("dQ", gdQ_tmp, rows)
            if last_visit(band, rows, keys):
                memory.store("dQ", gdQ, rows, dQ * spec.scale)
            else:
                memory.store("dQ", gdQ_tmp, rows, dQ)
        memory.store("dK", gdK, keys, dK * spec.scale)
        memory.store("dV", gdV, keys, dV)

    store_unvisited(memory, band, tile.q, gdQ)
    return grads


def row_delta(memory: Memory, gO: Tensor, gdLSE: Tensor | None, dO: Tensor, rows: Range) -> Tensor:
    """sum(dO * O) less the gradient that arrives through LSE, at every visit anew."""
    delta = (memory.load("O", gO, rows) * dO).sum(-1, keepdim=True)
    return delta if gdLSE is None else delta - memory.load("dLSE", gdLSE, rows)


def store_unvisited(memory: Memory, band: Band, block_q: int, gdQ: Tensor) -> None:
    for rows in blocks(band.every_row(), block_q, band.seqlen_q):
        if not band.keys(rows).size:
            memory.store("dQ", gdQ, rows, 0.0)
