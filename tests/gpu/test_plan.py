"""The table from which `explain` answers without a GPU says what the kernels say of themselves."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from grid import DEVICE, versions

from flash.capability import capability
from flash.engines import kernels
from flash.spec import Spec

DTYPES = {code: dtype for dtype, code in kernels.CODES.items()}


@pytest.mark.parametrize("rows", [4096, 8192])
@pytest.mark.parametrize("version", versions())
def test_tiles_of_the_table(version: str, rows: int) -> None:
    """16-bit kernels; those of other dtypes have tiles of their own, which the module names."""
    runner, wrong, seen = kernels.engine(version), {}, 0
    for direction, code, dim, dim_v in kernels.instances(version):
        dtype, way = DTYPES[code], ("forward", "backward")[direction]
        if dtype not in (torch.float16, torch.bfloat16):
            continue
        shapes = [(1, rows, 32, d) for d in (dim, dim, dim_v)]
        q, k, v = (torch.empty(shape, dtype=dtype, device=DEVICE) for shape in shapes)
        problem, _ = runner.plan(direction, q, k, v, Spec(1.0))
        plan = runner.module.plan(direction, problem)
        tile = capability(version).tile(way, dim, dim_v, rows, 32 * rows, full=True)
        fields = ("block_q", "block_kv", "stages", "threads")
        said = {name: (asdict(tile)[name] if tile else None) for name in fields}
        seen += 1
        if said != {name: plan[name] for name in fields}:
            wrong[way, dim, dim_v] = tuple(plan[name] for name in fields)
    assert seen
    assert not wrong, f"the kernels' own tiles: {wrong}"
