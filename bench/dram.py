"""Bytes that ncu counts for each generation, beside the closed form: `python -m bench.dram`.

One process runs every case under ncu, kernel by kernel from a cold L2; a spinning kernel stands
between two cases. Writes bench/results/<gpu>/dram.json.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from typing import Any

import torch

import flash
from bench import script
from bench.digest import ROOT
from flash.study.cases import Case, paper
from flash.study.competitors import OURS, competitor
from flash.study.inputs import draw
from flash.study.measure import reason
from flash.study.modelled import least_bytes

MARK = "spin_kernel"
METRICS = {
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "l2_read": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_write": "lts__t_sectors_srcunit_tex_op_write.sum",
    "l2_reduce": "lts__t_sectors_srcunit_tex_op_red.sum",
}  # srcunit_tex: asked for by an SM; the rest passes between the halves of L2
SECTOR = 32
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "sector": SECTOR}


def cases() -> list[Case]:
    return [paper(direction, "bfloat16", dim, causal, 4096)
            for direction in ("forward", "backward") for dim in (64, 128)
            for causal in (False, True)]  # fmt: skip


def work() -> None:
    """What runs under ncu: every case once, each behind a mark."""
    for case in cases():
        inputs = draw(case)
        for name in OURS:
            try:
                run = competitor(name, case, inputs)
                run()
            except Exception as problem:
                print(f"{name}: {reason(problem)}", file=sys.stderr)
                run = tuple
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1000)
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def profile() -> list[dict[str, float]]:
    """Sums of each metric over the kernels behind each mark."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    command = [ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off",
               "--metrics", ",".join(METRICS.values()), sys.executable, "-m", "bench.dram",
               "--work"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stderr.write(run.stderr[-2000:])
    lines = run.stdout.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return sums(list(csv.DictReader(io.StringIO("\n".join(lines[first:])))))


def sums(rows: list[dict[str, str]]) -> list[dict[str, float]]:
    short = {metric: name for name, metric in METRICS.items()}
    found: list[dict[str, float]] = []
    marks: set[str] = set()
    for row in rows:
        if MARK in row["Kernel Name"]:
            if row["ID"] not in marks:
                marks.add(row["ID"])
                found.append(dict.fromkeys(METRICS, 0.0))
            continue
        value = float(row["Metric Value"].replace(",", ""))
        found[-1][short[row["Metric Name"]]] += value * UNITS[row["Metric Unit"]]
    return found


def plan(version: str, case: Case) -> dict[str, int | None]:
    """The closed form with the tile of the kernel that runs, as `flash.explain` reports it."""
    shapes = ((case.heads, case.head_dim), (case.kv_heads, case.head_dim),
              (case.kv_heads, case.dim_v))  # fmt: skip
    q, k, v = (torch.empty(case.batch, case.seqlen, *shape, dtype=torch.bfloat16, device="cuda")
               for shape in shapes)  # fmt: skip
    found = flash.explain(q, k, v, backend=version, direction=case.direction, **case.options)
    own = next(e for e in found.estimates if e.backend == version)
    return {"closed_form": own.bytes, "block_q": own.block_q, "block_kv": own.block_kv}


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if script.lacks_gpu("dram"):
        return 2
    if args.work:
        work()
        return 0
    wanted = [(case, name) for case in cases() for name in OURS]
    counted = profile()
    rows: list[dict[str, Any]] = []
    for (case, name), found in zip(wanted, counted, strict=False):
        if not any(found.values()):
            continue
        row = {**case.key(), "competitor": name, **{k: int(v) for k, v in found.items()}}
        row |= {**plan(OURS[name], case), "least": least_bytes(case)}
        rows.append(row)
        print(row, flush=True)
    if not rows:
        print("bench.dram: ncu counted nothing; is it installed and allowed?", file=sys.stderr)
        return 1
    script.leave(args.out, "dram", {"traffic": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
