"""Every kernel under NVIDIA's compute-sanitizer: `python -m bench.sanitize [--version v3] ...`.

A part is a version, a direction and a tool; its kernels are dealt to processes, each of which calls
its share on small shapes of every kind (bench.kernel_calls). Adds to
bench/results/<gpu>/sanitizer.json, so that parts can be asked for alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from bench import digest, kernel_calls, record, script, variants
from bench.every_lane import EVERY_LANE
from bench.limits.__main__ import compiler
from flash.study.competitors import OURS

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
PROBE = digest.ROOT / "bench" / "race_probe.cu"
EVERY_LANE_SEES = (("v3", "racecheck"), ("v3", "synccheck"))
BLIND = {("v3", "initcheck"): "it does not see what the copy engine writes, and reports every read"}
BUILDING = Lock()
DIMS, DTYPES = "64;96;128;192;256", "fp16;bf16;e4m3"
TOOLS = ("racecheck", "memcheck", "synccheck", "initcheck")
OPTIONS = {"memcheck": ("--padding", "256"), "racecheck": ("--racecheck-report", "analysis")}
DIRECTIONS = ("forward", "backward")
KEY = ("version", "direction", "tool")
SUMMARY = r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)"
NOISE = r"COMPUTE-SANITIZER|SUMMARY|Current Value|Saved host|Host Frame|^by thread|^Access"
DIFFERS = r"0x[0-9a-f]+ in block \([^)]*\) |Thread \([^)]*\) |flash::|\(int\)|\(bool\)"
CALLS = "calls "  # begins the line before a call
SHOWN = 20  # kinds of reports that are kept
Row = dict[str, Any]


def work(version: str, direction: str, share: str, only: str) -> None:
    """What runs under the sanitizer; prints a line before each call, and one for each kernel."""
    built = [k for k in kernel_calls.every(version) if k.direction == DIRECTIONS.index(direction)]
    kernels = [kernel for kernel in built if only in str(kernel)]
    first, step = map(int, share.split("/"))
    for kernel in kernels[first::step]:
        worst = 0.0
        for shape in kernel_calls.shapes(kernel):
            print(f"{CALLS}{kernel}, {shape.name}", flush=True)
            call = kernel_calls.prepare(kernel, shape)
            error = call.error(call.run())
            worst = error if error != error else max(worst, error)
        found = {"kernel": list(kernel[1:]), "error": float(f"{worst:.2e}")}
        print("kernel " + json.dumps(found), flush=True)


def inspect(name: str, direction: str, tool: str, share: int, args: argparse.Namespace) -> Row:
    """One share of a part: what is recorded of it."""
    version, path = OURS[name], os.environ.get("PYTHONPATH", "")
    about: Row = {}
    if (name, tool) in EVERY_LANE_SEES:
        with BUILDING:  # forward and backward share the copies
            place = variants.build(EVERY_LANE, args.place, DIMS, DTYPES, "forward;backward")
        path, about = f"{place}{os.pathsep}{path}", {"without": EVERY_LANE.without}
    begin = time.monotonic()
    command = [SANITIZER, "--tool", tool, *OPTIONS.get(tool, ()), "--kernel-name", "kns=flash",
               "--show-backtrace", "device", "--print-limit", "1000", sys.executable, "-m",
               "bench.sanitize", "--only", args.only, "--work", version, direction,
               f"{share}/{args.shares}"]  # fmt: skip
    status, text = output_of(command, args.seconds, path)
    about |= {"version": version, "direction": direction, "tool": tool,
             "digest": digest.digest(version), "date": record.now(),
             "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip
    return {**about, **verdict(text, status)}


def output_of(command: list[str], seconds: float, path: str) -> tuple[int, str]:
    """Status, -1 where time ran out, and everything it said; nothing of it stays behind."""
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY", "OMP_NUM_THREADS": "2",
                   "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=digest.ROOT, env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = -1
            process.wait()
        output.seek(0)
        return status, output.read()


def probe(place: Path) -> dict[str, int]:
    """How often the tools report each idiom of race_probe.cu; only nobody_meets is a fault."""
    program = place / "race_probe"
    subprocess.run([compiler(), "-arch=native", "-o", str(program), str(PROBE)], check=True)
    found: Counter[str] = Counter()
    for tool, report in (("racecheck", "Race reported between"), ("synccheck", "Barrier error")):
        command = [SANITIZER, "--tool", tool, *OPTIONS.get(tool, ()), str(program)]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found.update(re.findall(report + r".*?probe::(\w+)\(", text, re.S))
    return {
        idiom: found[idiom] for idiom in re.findall(r"__global__ void (\w+)", PROBE.read_text())
    }


def verdict(text: str, status: int) -> Row:
    """What a tool's output says; `errors` and `warnings` are those of its summary."""
    called = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("kernel {")]
    summary = re.search(SUMMARY, text)
    row: Row = {"kernels": [found["kernel"] for found in called],
                "error": max((found["error"] for found in called), default=None)}  # fmt: skip
    if summary is None or status:
        row["why"] = "ran out of time" if status < 0 else f"ended with status {status}"
        last = [line for line in text.splitlines() if line.startswith((CALLS, "kernel {"))][-1:]
        if last and last[0].startswith(CALLS):  # it may stand still there
            row["why"] += f" in {last[0].removeprefix(CALLS)}"
    if summary:
        row["errors"] = int(summary[1] or summary[2] or 0)
        row["warnings"] = int(summary[3] or 0)
    if row.get("errors") or row.get("warnings") or "why" in row:
        row["said"] = [line for line in text.splitlines() if not line.startswith("=")][-SHOWN:]
        row["report"] = [f"{count} times: {kind}" for kind, count in kinds(text).most_common(SHOWN)]
    return row


def together(shares: list[Row]) -> Row:
    """The shares of a part as one row; without a summary of each there is none."""
    row = {**shares[0], "kernels": sorted(kernel for s in shares for kernel in s["kernels"]),
           "error": max((s["error"] for s in shares if s["error"] is not None), default=None),
           "seconds": max(s["seconds"] for s in shares)}  # fmt: skip
    for count in ("errors", "warnings"):
        row.pop(count, None)
        if all(count in s for s in shares):
            row[count] = sum(s[count] for s in shares)
    for key in ("said", "report"):
        if lines := [line for s in shares for line in s.get(key, [])]:
            row[key] = lines[:SHOWN]
    if why := [s["why"] for s in shares if "why" in s]:
        row["why"] = "; ".join(why)
    return row


def kinds(text: str) -> Counter[str]:
    """The reports without what differs from thread to thread, and how often each came."""
    found: Counter[str] = Counter()
    for block in re.split(r"^=+ *$", text, flags=re.M):
        lines = [line.strip("= ") for line in block.splitlines() if line.startswith("===")]
        said = " | ".join(line for line in lines if not re.search(NOISE, line))
        if said := re.sub(DIFFERS, "", said):
            found[said] += 1
    return found


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--version", choices=[*OURS], action="append")
    parser.add_argument("--direction", choices=DIRECTIONS, action="append")
    parser.add_argument("--tool", choices=TOOLS, action="append")
    parser.add_argument("--only", default="", help="kernels whose name holds this, as 'bf16:64'")
    parser.add_argument("--workers", type=int, default=8, help="processes at a time")
    parser.add_argument("--shares", type=int, default=1, help="processes of a part")
    parser.add_argument("--seconds", type=float, default=300, help="for one process")
    parser.add_argument("--place", type=Path, help="where builds of their own are, or go")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        version, direction, share = args.work
        work(version, direction, share, args.only)
        return 0
    if script.lacks_gpu("sanitize"):
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        args.place = (args.place or Path(scratch)).resolve()
        return run(args)


def asked_for(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(version, direction, tool); a tool that is blind for a version only where it is named."""
    asked = (args.tool or TOOLS, args.version or OURS, args.direction or DIRECTIONS)
    return [(name, direction, tool) for tool, name, direction in itertools.product(*asked)
            if args.tool or (name, tool) not in BLIND]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    parts, bad = asked_for(args), 0
    for name, tool in BLIND:
        if not args.tool and name in (args.version or OURS):
            print(f"left out: {name} {tool}: {BLIND[name, tool]}; --tool {tool} runs it")
    path = script.path_of(args.out, "sanitizer")
    rows, idioms = record.read(path).get("sanitizer", []), probe(args.place)
    print("reports of", idioms, flush=True)
    with ThreadPoolExecutor(args.workers) as pool:
        running = {pool.submit(inspect, *part, share, args): part
                   for part in parts for share in range(args.shares)}  # fmt: skip
        found: dict[tuple[str, str, str], list[Row]] = {part: [] for part in parts}
        for done in as_completed(running):
            shares = found[running[done]]
            shares.append(done.result())
            if len(shares) < args.shares:
                continue
            row = together(shares)
            rows = record.merge(rows, row, KEY)
            bad += "why" in row or row["errors"] > 0 or row["warnings"] > 0
            counts = " ".join(f"{k} {row[k]}" for k in ("errors", "warnings", "why") if k in row)
            print(f"{row['version']} {row['direction']} {row['tool']}: {len(row['kernels'])} "
                  f"kernels, {counts}, {row['seconds']} s", flush=True)  # fmt: skip
            script.leave(args.out, "sanitizer", {"probe": idioms, "sanitizer": rows}, "sanitize")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
