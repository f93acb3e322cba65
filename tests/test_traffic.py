"""Counted bytes of every schedule against the closed forms that its README prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from grid import BF16, SHORT, Case, draw, vary
from test_schedules import CPU, MASKS, schedule, spec_of

from flash.analysis import CLOSED_FORMS, Shape, evaluate, hbm_bytes
from flash.tiles import Tile
from flash.traffic import Traffic

ROOT = Path(__file__).parent.parent
SHAPES = [
    Case(150, 150, 16), Case(70, 200, 16), Case(200, 70, 16, heads_q=6, heads_kv=2, batch=2),
    Case(128, 128, 16, 8, heads_q=4, heads_kv=1), Case(1, 130, 8, dtype=torch.float16),
]  # fmt: skip
CASES = [case for mask in MASKS[:5] for case in vary(SHAPES, **{k: [v] for k, v in mask.items()})]
TILES = [Tile(32, 64), Tile(64, 32), Tile(48, 48)]


def counted(traffic: Traffic) -> dict[tuple[str, str], int]:
    ways = {(n, w): b for n, rw in traffic.table().items() for w, b in zip(WAYS, rw, strict=True)}
    return {key: nbytes for key, nbytes in ways.items() if nbytes}


WAYS = ("read", "write")


def count(version: str, case: Case, tile: Tile) -> tuple[Traffic, Traffic]:
    given, spec, module = draw(case, 0, CPU), spec_of(case), schedule(version)
    forward, backward = Traffic(), Traffic()
    result = module.forward(*given[:3], spec, traffic=forward, tile=tile)
    module.backward(given.dout, None, *given[:3], *result, spec, traffic=backward, tile=tile)
    return forward, backward


def shape_of(case: Case) -> Shape:
    return Shape(case.batch, case.heads_q, case.heads_kv, case.seqlen_q, case.seqlen_k, case.dim,
                 case.dim_v or case.dim)  # fmt: skip


def readme_forms(version: str) -> dict[str, dict[tuple[str, str], str]]:
    """direction -> (tensor, way) -> formula, as printed."""
    text = (ROOT / version / "README.md").read_text()
    section = text.split("## HBM traffic (closed form)")[1].split("\n## ")[0]
    found = {}
    for direction, body in re.findall(r"(Forward|Backward):\n\n```text\n(.*?)```", section, re.S):
        rows = [line.split(maxsplit=2) for line in body.strip().splitlines()]
        found[direction.lower()] = {(tensor, way): form for tensor, way, form in rows}
    return found


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("version", SHORT)
def test_readme_formula_equals_the_count(version: str, case: Case, tile: Tile) -> None:
    letters = shape_of(case).letters(spec_of(case), tile)
    for direction, traffic in zip(("forward", "backward"), count(version, case, tile), strict=True):
        forms = readme_forms(version)[direction]
        printed = {key: evaluate(form, letters) for key, form in forms.items()}
        assert {k: b for k, b in printed.items() if b} == counted(traffic)


@pytest.mark.parametrize("version", SHORT)
def test_readme_and_analysis_print_the_same_forms(version: str) -> None:
    ours = {way: CLOSED_FORMS[version, way] for way in ("forward", "backward")}
    assert readme_forms(version) == ours


@pytest.mark.parametrize("b_q", [16, 32, 64])
@pytest.mark.parametrize("b_k", [16, 32, 64])
@pytest.mark.parametrize("n", [64, 192, 320])
def test_sums_of_the_readme_for_full_and_causal(n: int, b_q: int, b_k: int) -> None:
    full, causal = Case(n, n, 8), Case(n, n, 8, causal=True)
    tile, b = Tile(b_q, b_k), max(b_q, b_k)
    letters = shape_of(full).letters(spec_of(full), tile)
    assert (letters["R"], letters["C"]) == (n * n // b_k, n * n // b_q)
    letters = shape_of(causal).letters(spec_of(causal), tile)
    assert (letters["R"], letters["C"]) == (n * (n + b) // (2 * b_k), n * (n + b) // (2 * b_q))
    assert (letters["R_1"], letters["C_1"]) == (n, n)


@pytest.mark.parametrize("case", [c for c in CASES if c.seqlen_q > 1], ids=str)
def test_v1_moves_more_of_o_than_v2(case: Case) -> None:
    (v1, _), (v2, _) = (count(v, case, Tile(32, 32)) for v in ("v1_tiling", "v2_parallel"))
    assert v2.of("O") == case.batch * case.heads_q * case.seqlen_q * (case.dim_v or case.dim) * 2
    visits = shape_of(case).letters(spec_of(case), Tile(32, 32))
    more_than_one_visit = visits["R"] > visits["R_1"]
    assert (v1.of("O") > v2.of("O")) == more_than_one_visit
    assert (v1.of("m") > 0) == more_than_one_visit
    assert v2.of("m") == v2.of("l") == 0


@pytest.mark.parametrize("version", SHORT)
def test_counting_does_not_change_the_result(version: str) -> None:
    case = Case(100, 90, 16, causal=True)
    given, spec, module = draw(case, 0, CPU), spec_of(case), schedule(version)
    plain = module.forward(*given[:3], spec)
    counting = module.forward(*given[:3], spec, traffic=Traffic())
    assert all(torch.equal(a, b) for a, b in zip(plain, counting, strict=True))


def test_fp8_reads_half_the_bytes() -> None:
    case, tile, bytes_of = Case(128, 128, 64), Tile(64, 64), {}
    for dtype in (BF16, torch.float8_e4m3fn):
        q, k, v = (x.to(dtype) for x in draw(case, 0, CPU)[:3])
        traffic = Traffic()
        schedule("v3_hopper").forward(q, k, v, spec_of(case), traffic=traffic, tile=tile)
        bytes_of[dtype] = traffic
        shape = Shape(1, 2, 2, 128, 128, 64, 64, itemsize=q.element_size())
        assert counted(traffic) == hbm_bytes("v3_hopper", "forward", shape, spec_of(case), tile)
    half, full = bytes_of[torch.float8_e4m3fn], bytes_of[BF16]
    assert 2 * half.of("K") == full.of("K")
    assert half.of("O") == full.of("O")


def test_counter_adds_up() -> None:
    traffic = Traffic()
    traffic.read("Q", 3)
    traffic.read("Q", 4)
    traffic.write("Q", 5)
    traffic.write("O", 1)
    assert traffic.table() == {"Q": (7, 5), "O": (0, 1)}
    assert (traffic.of("Q"), traffic.total) == (12, 13)
    assert repr(traffic) == "Traffic(Q: 7 read, 5 written; O: 0 read, 1 written)"
