"""The three schedules called directly: exact in fp64, at every tile size, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from flash.v3_hopper.ring import Ring
from grid import INF, SHORT, Answer, Case, by_autograd, draw, vary, visible

from flash.spec import Spec
from flash.tiles import Band, Range, Tile, blocks

CPU = torch.device("cpu")
F64 = torch.float64
SHAPES = [
    Case(150, 150, 16, dtype=F64), Case(70, 200, 24, dtype=F64), Case(200, 70, 16, dtype=F64),
    Case(1, 129, 16, dtype=F64), Case(130, 1, 8, dtype=F64), Case(64, 64, 32, 16, dtype=F64),
    Case(65, 127, 16, 40, heads_q=6, heads_kv=2, batch=2, dtype=F64),
]  # fmt: skip
MASKS = [
    {"causal": False}, {"causal": True}, {"causal": "top-left"}, {"window": (20, 5)},
    {"window": (None, 3)}, {"causal": True, "window": (33, 0)}, {"window": (0, 0)},
    {"causal": True, "softcap": 2.0},
]  # fmt: skip
CASES = [case for mask in MASKS for case in vary(SHAPES, **{k: [v] for k, v in mask.items()})]


def schedule(version: str) -> ModuleType:
    return importlib.import_module(f"flash.{version}.schedule")


def spec_of(case: Case) -> Spec:
    left, right = case.window or (None, None)
    return Spec(case.factor, case.softcap, left, 0 if case.causal else right,
                top_left=case.causal == "top-left")  # fmt: skip


def run(version: str, case: Case, tile: Tile | None, seed: int = 0) -> Answer:
    given, spec = draw(case, seed, CPU), spec_of(case)
    module = schedule(version)
    result = module.forward(*given[:3], spec, tile=tile)
    dlse = given.dlse.double()
    grads = module.backward(given.dout, dlse, *given[:3], *result, spec, tile=tile)
    return Answer(*result, tuple(grads))


def assert_equal_to_fp64(case: Case, found: Answer) -> None:
    exact = by_autograd(case, draw(case, 0, CPU), F64, gradients=True)
    torch.testing.assert_close(found.out, exact.out, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.lse, exact.lse, rtol=1e-12, atol=1e-11)
    for grad, expected in zip(found.grads, exact.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("version", SHORT)
def test_exact_in_fp64(version: str, case: Case) -> None:
    assert_equal_to_fp64(case, run(version, case, None))


@pytest.mark.parametrize("tile", [Tile(32, 32), Tile(64, 32), Tile(32, 96), Tile(4, 200)], ids=str)
@pytest.mark.parametrize("mask", MASKS[:6], ids=str)
@pytest.mark.parametrize("version", SHORT)
def test_tile_size_does_not_matter(version: str, mask: dict[str, object], tile: Tile) -> None:
    (case,) = vary([Case(75, 101, 8, dtype=F64)], **{k: [v] for k, v in mask.items()})
    assert_equal_to_fp64(case, run(version, case, tile))


@pytest.mark.parametrize("version", SHORT)
def test_rows_without_keys(version: str) -> None:
    case = Case(300, 100, 16, causal=True, dtype=F64)
    found = run(version, case, Tile(32, 32))
    assert torch.equal(found.out[:, :200], torch.zeros_like(found.out[:, :200]))
    assert bool((found.lse[..., :200] == -INF).all())
    assert torch.equal(found.grads[0][:, :200], torch.zeros_like(found.grads[0][:, :200]))
    assert all(torch.isfinite(x).all() for x in found.grads)


@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("version", SHORT)
def test_keys_that_no_row_sees_may_hold_anything(version: str, poison: float) -> None:
    case = Case(40, 300, 16, window=(9, 3), dtype=F64)
    given, spec, module = draw(case, 0, CPU), spec_of(case), schedule(version)
    unseen = ~visible(case, CPU).any(0)
    assert 200 < int(unseen.sum()) < 300
    q, k, v = given[:3]
    clean = module.forward(q, k, v, spec)
    k, v = (x.masked_fill(unseen[None, :, None, None], poison) for x in (k, v))
    found = module.forward(q, k, v, spec)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    grads = module.backward(given.dout, None, q, k, v, *found, spec)
    assert all(torch.isfinite(x).all() for x in grads)
    assert not grads[1][:, unseen].any()
    assert not grads[2][:, unseen].any()


@pytest.mark.parametrize("version", ["v1_tiling", "v2_parallel"])
def test_only_v3_has_fp8(version: str) -> None:
    from flash.spec import Descale

    given = draw(Case(8, 8, 16), 0, CPU)
    with pytest.raises(NotImplementedError, match="v3_hopper"):
        schedule(version).forward(*given[:3], Spec(1.0), descale=Descale())


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_band_is_the_mask(case: Case) -> None:
    """Block ranges hold exactly the tiles with a visible pair, and know which need no mask."""
    band, seen = Band(spec_of(case), case.seqlen_q, case.seqlen_k), visible(case, CPU)
    for rows in blocks(band.every_row(), 32, case.seqlen_q):
        inner = set(blocks(band.keys(rows), 48, case.seqlen_k))
        for keys in blocks(band.every_key(), 48, case.seqlen_k):
            part = seen[rows.begin : rows.end, keys.begin : keys.end]
            assert (keys in inner) == bool(part.any())
            assert (rows in set(blocks(band.rows(keys), 32, case.seqlen_q))) == bool(part.any())
            assert band.all_visible(rows, keys) == bool(part.all())
            assert torch.equal(band.visible(rows, keys, CPU), part)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 12])
def test_ring_delivers_in_order_and_runs_ahead(stages: int, tiles: int) -> None:
    loaded: list[int] = []

    def produce() -> Iterator[int]:
        for n in range(tiles):
            loaded.append(n)
            yield n

    ring: Ring[int] = Ring(stages, produce())
    for n in range(tiles):
        assert ring.wait() == n
        assert len(loaded) == min(tiles, n + stages)  # never over a stage still in use
        ring.release()
    with pytest.raises(RuntimeError, match="no block left"):
        ring.wait()


def test_ring_refuses_a_release_without_a_wait() -> None:
    with pytest.raises(RuntimeError, match="before it was taken"):
        Ring(2, iter([1])).release()


def test_ring_blocks_when_consumers_hold_every_stage() -> None:
    ring = Ring(2, iter(range(5)))
    assert (ring.wait(), ring.wait()) == (0, 1)
    with pytest.raises(RuntimeError, match="no block left"):
        ring.wait()
    ring.release()
    assert ring.wait() == 2


def test_blocks_are_aligned_and_clipped() -> None:
    assert list(blocks(Range(70, 130), 64, 130)) == [Range(64, 128), Range(128, 130)]
    assert list(blocks(Range(5, 5), 64, 130)) == []
