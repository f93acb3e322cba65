"""explain: reasons, tile, grid, memory, FLOPs and bound, for any GPU, without one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import flash
from flash.analysis import Shape, hbm_bytes
from flash.capability import BACKENDS, VERSIONS
from flash.flops import visible_pairs
from flash.spec import Spec
from flash.tiles import Tile

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "cpu")


def meta(rows: int = 1024, keys: int = 1024, dim: int = 128, dtype: Any = torch.bfloat16,
         heads: int = 8) -> list[Tensor]:  # fmt: skip
    shapes = ((2, rows, heads, dim), (2, keys, heads, dim), (2, keys, heads, dim))
    return [torch.empty(s, dtype=dtype, device="meta") for s in shapes]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_backend_has_its_say(arch: str, direction: str) -> None:
    found = flash.explain(*meta(), arch=arch, direction=direction)
    assert [e.backend for e in found.estimates] == list(BACKENDS)
    assert sum(e.runs for e in found.estimates) == 1
    for estimate in found.estimates:
        assert estimate.runs == (estimate.backend == found.backend)
        assert bool(estimate.reasons) != estimate.runs
        assert estimate.flops > 0
        assert estimate.bytes > 0
        assert (estimate.bound in ("memory", "arithmetic")) == (arch != "cpu")
        assert estimate.backend in str(found)


@pytest.mark.parametrize(("arch", "backend"), [
    ("sm_75", "torch"), ("sm_80", "v2_parallel"), ("sm_86", "v2_parallel"),
    ("sm_90", "v3_hopper"), ("sm_100", "v2_parallel"), ("cpu", "torch"),
])  # fmt: skip
def test_choice(arch: str, backend: str) -> None:
    assert flash.explain(*meta(), arch=arch).backend == backend


@pytest.mark.parametrize("version", VERSIONS)
def test_tile_grid_and_memory(version: str) -> None:
    found = flash.explain(*meta(), arch="sm_90", backend=version)
    (estimate,) = [e for e in found.estimates if e.backend == version]
    assert estimate.block_q
    assert estimate.block_kv
    assert estimate.grid
    assert estimate.threads
    assert estimate.shared_bytes
    assert estimate.shared_bytes <= 227 * 1024
    assert f"tile {estimate.block_q} x {estimate.block_kv}" in str(found)


def test_flops_and_bound() -> None:
    long = flash.explain(*meta(8192, 8192), arch="sm_90").estimates[0]
    assert long.flops == 4 * 2 * 8 * 8192 * 8192 * 128
    assert long.milliseconds is not None
    assert long.milliseconds >= 1e3 * long.flops / 990e12
    decode = flash.explain(*meta(1, 8192), arch="sm_90").estimates[0]
    assert decode.bound == "memory"
    assert long.bound == "arithmetic", "L2 answers what is asked for again"
    assert decode.least_bytes <= decode.bytes
    assert f"each tensor once {long.least_bytes / 1e6:.1f} MB" in long.line()
    torch_long = flash.explain(*meta(8192, 8192), arch="sm_90").estimates[3]
    assert torch_long.bound == "arithmetic"


def test_bytes_are_the_closed_form_of_the_tile() -> None:
    """v1's long K/V blocks keep its traffic near v2's; by equal blocks tests/test_traffic asks."""
    given = meta(4096, 4096)
    batch, rows, heads, dim = given[0].shape
    shape = Shape(batch, heads, given[1].shape[2], rows, rows, dim, dim, 2, 2)
    for found in flash.explain(*given, arch="sm_80").estimates:
        if found.backend in ("v1_tiling", "v2_parallel"):
            tile = Tile(found.block_q, found.block_kv)
            moved = hbm_bytes(found.backend, "forward", shape, Spec(dim**-0.5), tile)
            assert found.bytes == sum(moved.values()) > 4 * given[0].nbytes


def test_as_dict_is_json() -> None:
    found = flash.explain(*meta(), arch="sm_90", causal=True, window=(5, None), precision="fp8")
    data = json.loads(json.dumps(found.as_dict()))
    assert data["decision"]["backend"] == "v3_hopper"
    assert data["shape"]["dtype"] == "float8_e4m3fn"
    assert len(data["estimates"]) == len(BACKENDS)


@pytest.mark.parametrize(("precision", "tile"), [("fp8", (192, 128, 4)), (None, (128, 128, 2))])
def test_fp8_has_tiles_of_its_own(precision: str | None, tile: tuple[int, int, int]) -> None:
    v3, *older = flash.explain(*meta(8192, 8192), arch="sm_90", precision=precision).estimates[:3]
    assert (v3.block_q, v3.block_kv, v3.stages) == tile
    assert all(bool(estimate.block_q) == (precision is None) for estimate in older)


def test_agrees_with_what_runs() -> None:
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    for backend in ("auto", "v1", "torch", "reference"):
        told = flash.explain(q, k, v, backend=backend)
        flash.attention(q, k, v, backend=backend)
        last = flash.last_dispatch()
        assert last is not None
        assert (told.backend, told.reasons) == (last.backend, last.reasons)


def test_layouts_agree() -> None:
    given = meta()
    swapped = [x.transpose(1, 2) for x in given]
    one, two = flash.explain(*given, arch="9.0"), flash.explain(*swapped, arch="9.0", layout="bhsd")
    assert one.as_dict() == two.as_dict()


def test_nothing_serves_it() -> None:
    found = flash.explain(*meta(dtype=torch.float32), arch="sm_90", backend="v3")
    assert found.backend is None
    assert "nothing serves it" in str(found)
    assert "not float32" in found.reasons["v3_hopper"][0]


@pytest.mark.parametrize("top_left", [False, True])
@pytest.mark.parametrize("band", [(None, None), (None, 0), (3, 0), (2, 5), (0, None), (None, 4)],
                         ids=str)  # fmt: skip
def test_pairs_are_counted_exactly(band: tuple[Any, Any], top_left: bool) -> None:
    spec = Spec(1.0, 0.0, *band, top_left)
    for rows in (0, 1, 2, 7, 12):
        for keys in (0, 1, 3, 7, 15):
            first, last = spec.band(rows, keys)
            low = -rows if first is None else first
            high = keys if last is None else last
            pairs = sum(r + low <= c <= r + high for r in range(rows) for c in range(keys))
            assert visible_pairs(spec, rows, keys) == pairs
