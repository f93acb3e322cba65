"""A producer fills a ring of K/V stages; block j's softmax runs between its neighbours' GEMMs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from flash.v3_hopper.ring import Ring
from torch import Tensor

from flash.spec import Descale, Grads, Result, Spec
from flash.tiles import (
    FP8,
    INF,
    Band,
    Memory,
    Range,
    Tile,
    blocks,
    by_kv_head,
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

TILE = Tile(q=128, kv=128)
STAGES = 2
CONSUMERS = 2  # warpgroups, each with a slice of the rows of Q
P_SCALE = 128.0  # lifts P <= 1 into e4m3's range, 448; the rest is for maxima that have grown


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, *, descale: Descale | None = None,
            traffic: Traffic | None = None, tile: Tile | None = None) -> Result:  # fmt: skip
    """Attention of dense (batch, seqlen, heads, dim) tensors; FP8 inputs come with their scales."""
    descale = descale or Descale()
    tile = tile or default_tile(descale)
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    result = new_result(q, v)
    gQ, gK, gV, gO = (by_kv_head(x, k.shape[2]) for x in (q, k, v, result.out))
    gLSE = stats_by_kv_head(result.lse, k.shape[2])
    group = gQ.shape[2]

    for rows in blocks(band.every_row(), tile.q, q.shape[1]):
        ring_k, ring_v = (
            Ring(STAGES, produce(memory, name, g, band, rows, tile.kv, group))
            for name, g in (("K", gK), ("V", gV))
        )
        Q = split_rows(memory.load("Q", gQ, rows), tile.q, CONSUMERS)
        O, row_max, row_sum = init_state(Q, v.shape[-1])
        pending = None  # P of the block before, whose second GEMM is still to be issued
        for keys in blocks(band.keys(rows), tile.kv, k.shape[1]):
            S = gemm_qk(Q, ring_k.wait()) * qk_descale(descale, gQ, rows, keys)
            ring_k.release()
            if pending is not None:
                O += gemm_pv(*pending, ring_v.wait(), q.dtype)
                ring_v.release()
            S = mask(scores(S, spec), band, rows, keys)
            P, row_max, row_sum, alpha = update_rounded(S, row_max, row_sum, q.dtype)
            O, pending = rescale(O, alpha), (P, v_descale(descale, gQ, keys))
        if pending is not None:
            O += gemm_pv(*pending, ring_v.wait(), q.dtype)
        O, lse = normalize(O, row_max, row_sum)
        memory.store("O", gO, rows, join_rows(O, rows.size))
        memory.store("LSE", gLSE, rows, join_rows(lse, rows.size))

    return result


def default_tile(descale: Descale) -> Tile:
    """Rows of a tile share one scale: the tile divides the block that the scale was made for."""
    return Tile(math.gcd(TILE.q, descale.block_q), math.gcd(TILE.kv, descale.block_kv))


def produce(memory: Memory, name: str, g: Tensor, band: Band, rows: Range, block_kv: int,
            group: int) -> Iterator[Tensor]:  # fmt: skip
    """The producer warp: the same range of blocks as the consumers, in the same order."""
    for keys in blocks(band.keys(rows), block_kv, band.seqlen_k):
        yield memory.load(name, g, keys, seen=band.keys(rows), times=group).unsqueeze(-3)


def init_state(Q: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """O not yet normalized, row maximum and row sum, in registers from first to last block."""
    return (Q.new_zeros(*Q.shape[:-1], dim), Q.new_full((*Q.shape[:-1], 1), -INF),
            Q.new_zeros(*Q.shape[:-1], 1))  # fmt: skip


def qk_descale(descale: Descale, gQ: Tensor, rows: Range, keys: Range) -> Tensor | float:
    """One factor for a whole tile of scores, folded into the softmax scale."""
    return tile_scale(descale.q, descale.block_q, gQ, rows) * tile_scale(
        descale.k, descale.block_kv, gQ, keys
    )


def v_descale(descale: Descale, gQ: Tensor, keys: Range) -> Tensor | float:
    """The factor with which a block's P V is promoted into the fp32 O."""
    return tile_scale(descale.v, descale.block_kv, gQ, keys)


def tile_scale(scale: Tensor | None, block: int, gQ: Tensor, span: Range) -> Tensor | float:
    """(batch, blocks, heads) -> (batch, heads_kv, group or 1, 1, 1, 1) of the block with `span`."""
    if scale is None:
        return 1.0
    of_block = scale[:, span.begin // block if block else 0]
    return of_block.unflatten(1, (gQ.shape[1], -1))[..., None, None, None]


def mask(S: Tensor, band: Band, rows: Range, keys: Range) -> Tensor:
    if band.all_visible(rows, keys):
        return S
    warpgroups, slice_rows = S.shape[-3:-1]
    padded = Range(rows.begin, rows.begin + warpgroups * slice_rows)
    visible = band.visible(padded, keys, S.device).unflatten(0, (warpgroups, slice_rows))
    return S.masked_fill(~visible, -INF)


def update_rounded(S: Tensor, row_max: Tensor, row_sum: Tensor,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`update`; in FP8 the row sum is that of P as the tensor cores will see it."""
    P, new_max, new_sum, alpha = update(S, row_max, row_sum)
    if dtype == FP8:
        P = rounded(P * P_SCALE, FP8) / P_SCALE
        new_sum = row_sum * alpha + P.sum(-1, keepdim=True)
    return P, new_max, new_sum, alpha


def gemm_pv(P: Tensor, factor: Tensor | float, V: Tensor, dtype: torch.dtype) -> Tensor:
    """One block, summed in the tensor core; the caller adds it to O in fp32, the second level."""
    return matmul(P if dtype == FP8 else rounded(P, dtype), V) * factor  # (rows, dim)


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
             lse: Tensor, spec: Spec, *, traffic: Traffic | None = None,
             tile: Tile | None = None) -> Grads:  # fmt: skip
    """Every K/V block is a CTA that owns dK and dV; the producer streams Q and dO past it."""
    tile = tile or TILE
    memory, band = Memory(q.dtype, traffic), Band(spec, q.shape[1], k.shape[1])
    grads, heads = new_grads(q, k, v), k.shape[2]
    gQ, gK, gV, gO, gdO = (by_kv_head(x, heads) for x in (q, k, v, out, dout))
    gdQ, gdK, gdV = (by_kv_head(x, heads) for x in grads)
    gLSE = stats_by_kv_head(lse, heads)
    gdLSE = None if dlse is None else stats_by_kv_head(dlse, heads)
    gdQ_tmp, gDelta = memory.scratch(gQ, q.shape[-1]), memory.scratch(gQ, 1)
    prepare(memory, band, tile.q, gO, gdO, gdLSE, gDelta, gdQ_tmp)

    for keys in blocks(band.every_key(), tile.kv, k.shape[1]):
        ring_q, ring_do = (
            Ring(STAGES, produce_rows(memory, band, keys, tile.q, tensors))
            for tensors in ({"Q": gQ, "LSE": gLSE}, {"dO": gdO, "delta": gDelta})
        )
        K = memory.load("K", gK, keys, seen=band.keys(band.every_row()))
        V = memory.load("V", gV, keys, seen=band.keys(band.every_row()))
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        ready = None  # S of the coming Q block, issued before the gradients of this one drain
        for rows in blocks(band.rows(keys), tile.q, q.shape[1]):
            if ready is None:
                ready = issue_scores(ring_q, K, spec)
            (S, Q, row_lse), ready = ready, None
            visible = None if band.all_visible(rows, keys) else band.visible(rows, keys, q.device)
            P = probabilities(S, row_lse, visible)
            dO, delta = ring_do.wait()
            dV += gemm_tn(rounded(P, q.dtype), dO)
            dP = gemm_qk(dO, V)
            ring_do.release()
            dS = rounded(score_gradient(P, dP, delta, S, spec, visible), q.dtype)
            if rows.end < band.rows(keys).end:
                ready = issue_scores(ring_q, K, spec)
            dK += gemm_tn(dS, Q)
            ring_q.release()
            memory.add("dQ", gdQ_tmp, rows, matmul(dS, K))
        memory.store("dK", gdK, keys, dK * spec.scale)
        memory.store("dV", gdV, keys, dV)

    finish(memory, band, tile.q, gdQ_tmp, gdQ, spec)
    return grads


def produce_rows(memory: Memory, band: Band, keys: Range, block_q: int,
                 tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """The producer of backward: a tile of rows and their statistic."""
    seen = band.rows(band.every_key())
    for rows in blocks(band.rows(keys), block_q, band.seqlen_q):
        yield tuple(memory.load(name, g, rows, seen) for name, g in tensors.items())


def issue_scores(ring_q: Ring, K: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    Q, row_lse = ring_q.wait()
    return scores(gemm_qk(Q, K), spec), Q, row_lse


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
