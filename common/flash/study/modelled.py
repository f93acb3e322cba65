"""Figures for a GPU that was not measured: a roofline from its datasheet, marked as modelled."""

from __future__ import annotations

from typing import Any

from flash.capability import Arch, capability
from flash.hardware import GPUS, Gpu
from flash.study.cases import Case, of_row
from flash.study.competitors import OURS

Row = dict[str, Any]
UNMODELLED = ("standard", "reference")  # they move S and P: another roofline
NEEDS = {  # peers that do not run everywhere: compute capabilities from, and up to
    "fa2": ((8, 0), (12, 0)), "sdpa-flash": ((8, 0), (12, 0)), "sdpa-cudnn": ((8, 0), (12, 0)),
    "fa3": ((9, 0), (9, 0)), "fa4": ((9, 0), (10, 3)),
}  # fmt: skip
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}


def find(name: str) -> tuple[Arch, Gpu]:
    wanted = name.lower().replace(" ", "")
    for arch, unit in GPUS.items():
        if unit.name.lower().replace(" ", "") == wanted:
            return arch, unit
    raise KeyError(", ".join(unit.name for unit in GPUS.values()))


def least_bytes(case: Case) -> int:
    """Every tensor of the call once: what no schedule can go below."""
    size = ITEMSIZE[case.dtype]
    rows = case.batch * case.seqlen * case.heads
    keys = case.batch * case.keys * case.kv_heads
    once = (rows + keys) * (case.head_dim + case.dim_v) * size + 4 * rows
    return once if case.direction == "forward" else 2 * once


def serves(name: str, arch: Arch, case: Case) -> bool:
    """This competitor runs on such a GPU."""
    if isinstance(arch, str):
        return False
    if name not in OURS:
        first, last = NEEDS.get(name, (arch, arch))
        return first <= arch <= last
    return any(
        row.covers(arch) and case.dtype in row.dtypes
        and any(case.head_dim <= d and case.dim_v <= dv for d, dv in row.dims(case.direction))
        for row in capability(OURS[name]).rows
    )  # fmt: skip


def content(measured: Row, name: str) -> Row:
    """The rows of `measured`, as a GPU of this name would bound them: no kernel can be faster."""
    arch, unit = find(name)
    rows = []
    for row in measured["rows"]:
        case = of_row(row)
        if row["competitor"] in UNMODELLED or not serves(row["competitor"], arch, case):
            continue
        seconds = max(case.flops / unit.flops(case.dtype), least_bytes(case) / unit.bandwidth)
        kept = {**case.key(), "competitor": row["competitor"], "ran": "model"}
        rows.append({**kept, "ms": 1e3 * seconds, "tflops": case.flops / seconds / 1e12,
                     "modelled": True})  # fmt: skip
    environment = {"gpu": f"{unit.name} (modelled from its datasheet)"}
    return {"environment": environment, "rows": rows}
