"""The figures of the papers' analysis, from code."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from grid import SHORT
from test_schedules import schedule

from flash.analysis import (
    A100,
    DEVICES,
    H100,
    Shape,
    Visits,
    evaluate,
    hbm_bytes,
    paper_tile,
    peak_bytes,
    score_bytes,
    standard_steps,
)
from flash.spec import Spec
from flash.tiles import Band, Tile, blocks

MB = 1 << 20


@pytest.mark.parametrize(
    ("seqlen", "mb"), [(512, 1), (1024, 4), (2048, 16), (4096, 64), (8192, 256), (16384, 1024)]
)
def test_memory_of_s_and_p(seqlen: int, mb: int) -> None:
    assert score_bytes(seqlen) == mb * MB


def test_memory_of_s_and_p_is_measured() -> None:
    """The figure is what textbook attention really allocates, beside its 64 kB output."""
    q = torch.randn(512, 64).half()

    def attention() -> torch.Tensor:
        scores = q @ q.mT
        return torch.softmax(scores, -1) @ q

    assert peak_bytes(attention) == score_bytes(512) + 512 * 64 * 2


def test_ridges() -> None:
    assert (round(A100.ridge), round(H100.ridge)) == (156, 296)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_every_step_of_standard_attention_waits_for_memory(device, seqlen, dim) -> None:
    for step in standard_steps(seqlen, dim):
        assert step.bound_by(device) == "memory"
        assert step.intensity < dim


def test_intensity_of_the_three_steps() -> None:
    gemm, softmax, second = (step.intensity for step in standard_steps(4096, 64))
    assert gemm == second == pytest.approx(64 / (1 + 2 * 64 / 4096))  # 62
    assert softmax == 1.25


def v1_bytes(seqlen: int, dim: int, sram: int) -> int:
    shape = Shape(1, 1, 1, seqlen, seqlen, dim, dim, itemsize_acc=2)
    return sum(hbm_bytes("v1_tiling", "forward", shape, Spec(1.0), paper_tile(dim, sram)).values())


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("sram", [1 << 14, 1 << 15, 1 << 16])
@pytest.mark.parametrize("seqlen", [2048, 4096])
def test_traffic_is_n_squared_d_squared_over_m(seqlen: int, dim: int, sram: int) -> None:
    base = v1_bytes(seqlen, dim, sram)
    assert v1_bytes(2 * seqlen, dim, sram) / base == pytest.approx(4, rel=0.12)
    assert v1_bytes(seqlen, 2 * dim, sram) / base == pytest.approx(4, rel=0.12)
    assert v1_bytes(seqlen, dim, 2 * sram) / base == pytest.approx(0.5, rel=0.25)
    # 3 elements of d (Q, O in, O out) for each of N rows at each of N / (M / 4d) visits
    leading = 3 * seqlen * dim * (seqlen / (sram / (4 * dim))) * 2
    assert base == pytest.approx(leading, rel=0.25)


@pytest.mark.parametrize("seqlen", [1024, 4096, 16384])
def test_tiles_move_less_than_standard_attention(seqlen: int) -> None:
    standard = sum(step.nbytes for step in standard_steps(seqlen, 64))
    sram = 192 * 1024 // 2  # an SM's shared memory in 16-bit elements
    assert standard / v1_bytes(seqlen, 64, sram) > 3


def test_paper_tile() -> None:
    assert paper_tile(64, 98304) == Tile(q=64, kv=384)
    assert paper_tile(128, 16384) == Tile(q=32, kv=32)


@cache
def peak(version: str, seqlen: int) -> tuple[int, int]:
    q, k, v, dout = (torch.randn(1, seqlen, 1, 32).half() for _ in range(4))
    module, spec, tile = schedule(version), Spec(0.1), Tile(64, 64)
    result = module.forward(q, k, v, spec)
    return (
        peak_bytes(lambda: module.forward(q, k, v, spec, tile=tile)),
        peak_bytes(lambda: module.backward(dout, None, q, k, v, *result, spec, tile=tile)),
    )


@pytest.mark.parametrize("version", SHORT)
def test_memory_grows_with_n_not_n_squared(version: str) -> None:
    """Measured: doubling N adds twice as much as the doubling before, never four times."""
    one, two, four = (peak(version, n) for n in (256, 512, 1024))
    for a, b, c in zip(one, two, four, strict=True):
        assert c - b == pytest.approx(2 * (b - a), rel=0.02)
    assert max(four) < score_bytes(1024) / 4


@pytest.mark.parametrize("version", SHORT)
def test_forward_keeps_o_lse_and_its_state(version: str) -> None:
    """Bytes per added row: O and LSE; v1 also its fp32 O, m and l."""
    per_row = (peak(version, 1024)[0] - peak(version, 512)[0]) / 512
    state = 4 * (32 + 2) if version == "v1_tiling" else 0
    assert per_row == 2 * 32 + 4 + state


@pytest.mark.parametrize("name", ["__import__('os')", "open"])
def test_closed_forms_reach_no_builtins(name: str) -> None:
    with pytest.raises(NameError):
        evaluate(name, {})


@pytest.mark.parametrize("side", [None, 0, 1, 9, 40])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (1, 50), (50, 1), (33, 47), (47, 33)])
def test_visits_are_those_of_a_loop_over_pairs(rows: int, keys: int, side: int | None) -> None:
    for left, right, top_left in ((side, None, True), (None, side, False), (side, 3, False)):
        band = Band(Spec(1.0, 0.0, left, right, top_left), rows, keys)
        for tile in (Tile(1, 1), Tile(8, 5), Tile(7, 64)):
            pairs = [
                (i, j)
                for i in blocks(band.every_row(), tile.q, rows)
                for j in blocks(band.keys(i), tile.kv, keys)
            ]
            met = [sum(x.size for x in set(side)) for side in zip(*pairs, strict=True)] or [0, 0]
            expected = (sum(i.size for i, _ in pairs), sum(j.size for _, j in pairs), *met)
            assert Visits.of(band, tile) == expected


def test_visits_of_a_million_rows() -> None:
    """No loop over pairs: flash.explain and flash.compare ask for this of every backend."""
    visits = Visits.of(Band(Spec(1.0), 1 << 20, 1 << 20), Tile(128, 128))
    assert visits == (1 << 33, 1 << 33, 1 << 20, 1 << 20)
