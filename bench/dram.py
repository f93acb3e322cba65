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
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.digest import ROOT
from flash.analysis import Shape, hbm_bytes
from flash.capability import capability
from flash.study.cases import Case, of_row, paper
from flash.study.competitors import OURS, competitor
from flash.study.inputs import draw
from flash.study.measure import reason
from flash.study.modelled import least_bytes
from flash.study.timing import Board
from flash.tiles import Tile

MARK = "spin_kernel"
METRICS = {
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "l2_read": "lts__t_sectors_op_read.sum",
    "l2_write": "lts__t_sectors_op_write.sum",
    "l2_reduce": "lts__t_sectors_op_red.sum",
}
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


def closed_form(version: str, case: Case) -> int | None:
    tile = capability(version).tile(case.direction, case.head_dim, case.dim_v)
    if tile is None:
        return None
    shape = Shape(case.batch, case.heads, case.kv_heads, case.seqlen, case.keys, case.head_dim,
                  case.dim_v)  # fmt: skip
    cut = Tile(tile.block_q, tile.block_kv)
    return sum(hbm_bytes(version, case.direction, shape, case.spec, cut).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.dram needs a CUDA device; this machine has none", file=sys.stderr)
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
        row["closed_form"] = closed_form(OURS[name], of_row(row))
        row["least"] = least_bytes(case)
        rows.append(row)
        print(row, flush=True)
    if not rows:
        print("bench.dram: ncu counted nothing; is it installed and allowed?", file=sys.stderr)
        return 1
    path = args.out / record.slug(torch.cuda.get_device_name(0)) / "dram.json"
    head = {"environment": record.environment(Board().facts()), "commit": record.commit()}
    record.write(path, {**head, "date": record.now(), "command": "python -m bench.dram",
                        "traffic": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
