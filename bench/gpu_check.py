"""One command on a GPU machine: build, test, time, and leave the evidence in bench/results/<gpu>/.

Parts can be asked for alone and in any order; a later part adds to the files of an earlier one:
  python -m bench.gpu_check                          everything
  python -m bench.gpu_check --tests [--version v2]
  python -m bench.gpu_check --bench v2 --direction backward [--head-dim 128] [--again]
  python -m bench.gpu_check --sustained v3
  python -m bench.gpu_check --limits | --memory | --end-to-end | --dram | --ablations | --trace
  python -m bench.gpu_check --fp8                    errors of FP8, the quantizer's bandwidth
  python -m bench.gpu_check --sanitize | --repeat    for parts: python -m bench.sanitize --help
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench import digest, record
from flash.study.cases import KEY, Case, paper
from flash.study.competitors import OURS, SOURCES, competitor, present
from flash.study.inputs import draw
from flash.study.measure import Settings, measure
from flash.study.timing import Board, Stopwatch

SHARED_TESTS = (
    "test_forward", "test_backward", "test_properties", "test_properties_layout", "test_varlen",
    "test_sdpa", "test_ops", "test_magnitudes",
)  # fmt: skip
HANG_SECONDS = 60  # for one test; the slowest took under 5 s on one H200
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")
PEERS = ("sdpa-flash", "sdpa-cudnn", "fa3", "fa4")  # beside ours unless --alone
NAMES = (*OURS, *PEERS, "sdpa-efficient")  # the last one where it is named: fp32 has no other
FP8_NAMES = ("v3", "v3-keys", "fa3")
STUDIES = ("limits", "memory", "end_to_end", "dram", "ablations", "trace", "sanitize", "repeat",
           "breadth", "host", "fp8")  # fmt: skip


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("bench.gpu_check needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    board = Board()
    studies = [name for name in STUDIES if getattr(args, name)]
    everything = not (args.tests or args.bench or args.sustained or studies)
    folder = args.out / record.slug(torch.cuda.get_device_name(0))
    head = record.head(board.facts())
    if args.build or everything:
        build()
    failed = False
    if args.tests or everything:
        failed = not run_tests(folder, head, args)
    if args.bench or everything:
        run_benches(folder, head, board, args)
    if args.sustained or everything:
        run_sustained(folder, head, board, args)
    for name in STUDIES if everything else studies:
        run_study(name, args.out)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", action="store_true", help="pip install the working tree first")
    parser.add_argument("--tests", action="store_true", help="run the GPU tests")
    parser.add_argument("--version", choices=[*OURS], help="only this version's tests")
    parser.add_argument("--select", default="", help="pytest -k: a part, not recorded")
    parser.add_argument("--workers", type=int, default=4, help="pytest processes")
    parser.add_argument("--bench", nargs="?", const="all", help="all, or names: v2,sdpa-flash,...")
    parser.add_argument("--direction", choices=["forward", "backward"])
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--head-dim", type=int, action="append")
    parser.add_argument("--seqlen", type=int, action="append")
    parser.add_argument("--alone", action="store_true", help="without the peers beside")
    parser.add_argument("--again", action="store_true", help="also what is up to date")
    parser.add_argument("--sustained", nargs="?", const="all", help="under seconds of load")
    for name in STUDIES:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, action="store_true", help=f"python -m bench.{name}")
    parser.add_argument("--minutes", type=float, default=8, help="stop starting cases after this")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    for asked in (args.bench, args.sustained):
        unknown = {*(asked or "all").split(",")} - {"all", *NAMES, *FP8_NAMES}
        if unknown:
            parser.error(f"nobody is called {', '.join(sorted(unknown))}")
    return args


def build() -> None:
    """Install the working tree for the GPU of this machine."""
    install = [sys.executable, "-m", "pip", "install", "--no-deps", str(digest.ROOT)]
    subprocess.run(install, check=True)


def run_study(name: str, out: Path) -> None:
    """A study of its own, in its own process; it writes its own file."""
    command = [sys.executable, "-m", f"bench.{name}", "--out", str(out)]
    print(f"{name}: rc={subprocess.run(command, cwd=digest.ROOT, check=False).returncode}")


# --- tests


def run_tests(folder: Path, head: dict[str, Any], args: argparse.Namespace) -> bool:
    """Run the kernels' tests and record, version by version, what passed on which sources."""
    paths = [f"tests/{name}.py" for name in SHARED_TESTS]
    targets = [path for path in ("tests/gpu", *paths) if (digest.ROOT / path).exists()]
    wanted = [args.version] if args.version else list(OURS)
    select = args.select or (f"{args.version}_ or {args.version}-" if args.version else "")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = ["-m", "pytest", *targets, "-q", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(args.workers)]
        if importlib.util.find_spec("pytest_timeout"):  # a hung kernel costs a worker, not the run
            command += ["--timeout", str(HANG_SECONDS), "--timeout-method", "thread"]
        command += ["-k", select] if select else []
        subprocess.run([sys.executable, *command], cwd=digest.ROOT, check=False)
        outcomes = read_report(report)
    path = folder / "tests.json"
    content = {**record.read(path), **head}
    versions = content.setdefault("versions", {})
    for name in wanted:
        version = OURS[name]
        counts = Counter(outcome for test, outcome in outcomes if names(test, name))
        print(f"{version}: {dict(counts) or 'no tests ran'}")
        if (counts["passed"] or counts["failed"]) and not args.select:  # a part proves no version
            versions[version] = {
                "digest": digest.digest(version),
                "build": digest.build(),
                "passed": counts["passed"],
                "failed": counts["failed"],
                "skipped": counts["skipped"],
                "kernels": built(version),
                "date": record.now(),
                "command": "python " + " ".join(c for c in command if "junit" not in c),
            }
    if not args.select:
        record.write(path, content)
    return bool(outcomes) and all(outcome != "failed" for _, outcome in outcomes)


def read_report(path: Path) -> list[tuple[str, str]]:
    """(test, passed | failed | skipped) from a JUnit report."""
    if not path.is_file():
        return []
    outcomes = []
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        outcomes.append((name, "failed" if bad else "skipped" if "skipped" in kinds else "passed"))
    return outcomes


def names(test: str, version: str) -> bool:
    """A test speaks of a version when its name or parameters do; of all when they name none."""
    spoken = [name for name, folder in OURS.items() if folder in test or f"{name}-" in test
              or f"-{name}" in test or f"[{name}" in test]  # fmt: skip
    return version in spoken or not spoken


def built(version: str) -> list[list[int]]:
    """(direction, dtype, head dim, head dim of V) of every kernel in the installed module."""
    from flash.engines import kernels

    return sorted(list(row) for row in kernels.instances(version))


# --- benches


def cases(args: argparse.Namespace) -> list[Case]:
    found = []
    dims = args.head_dim or (64, 128, 256)
    for dtype in [args.dtype] if args.dtype else ("bfloat16", "float8_e4m3fn"):
        for direction in [args.direction] if args.direction else ("forward", "backward"):
            if direction == "backward" and dtype == "float8_e4m3fn":
                continue
            for dim in dims:
                for causal in (False, True):
                    for seqlen in args.seqlen or (512, 2048, 8192, 16384):
                        found.append(paper(direction, dtype, dim, causal, seqlen))
    return found


def competitors(asked: str | None, alone: bool, case: Case) -> list[str]:
    chosen = list(SOURCES) if asked in (None, "all") else asked.split(",")
    peers = () if alone else PEERS
    able = FP8_NAMES if case.dtype == "float8_e4m3fn" else NAMES
    return [name for name in able if name in {*chosen, *peers} and present(name)]


def run_benches(folder: Path, head: dict[str, Any], board: Board, args: argparse.Namespace) -> None:
    stopwatch, deadline = Stopwatch(board), time.monotonic() + 60 * args.minutes
    command = "python -m bench.gpu_check " + " ".join(sys.argv[1:])
    todo = cases(args)
    for number, case in enumerate(todo, 1):
        path = folder / f"{case.direction}_{case.dtype}.json"
        content = {**record.read(path), **head}
        rows = content.setdefault("rows", [])
        wanted = competitors(args.bench, args.alone, case)
        if not args.again and all(fresh(rows, case, name) for name in wanted if name in SOURCES):
            continue
        if time.monotonic() > deadline:
            print(f"stopped after {args.minutes} minutes; the same command goes on from here")
            return
        for row in timed(case, wanted, stopwatch):
            rows = record.merge(rows, {**row, "command": command}, KEY)
        record.write(path, {**content, "rows": rows})
        line = "  ".join(f"{r['competitor']} {r['tflops']:.0f}" for r in rows if same(r, case))
        print(f"[{number}/{len(todo)}] {' '.join(map(str, case.key().values()))}: {line}",
              flush=True)  # fmt: skip


def same(row: dict[str, Any], case: Case) -> bool:
    return all(row.get(name) == value for name, value in case.key().items())


def fresh(rows: list[dict[str, Any]], case: Case, name: str) -> bool:
    """This version has no kernels, or was timed here with the sources it has now."""
    current = digest.digest(SOURCES[name])
    return not current or any(
        same(row, case) and row["competitor"] == name and row.get("digest") == current
        for row in rows
    )


def timed(case: Case, wanted: list[str], stopwatch: Stopwatch) -> list[dict[str, Any]]:
    """One row for each competitor that can run the case; ours name the sources they speak of."""
    found = measure(case, wanted, stopwatch, Settings())
    for name, why in found.skipped.items():
        print(f"  {name}: {why[:100]}")
    for row in found.rows:
        if row["competitor"] in SOURCES:
            row["digest"] = digest.digest(SOURCES[row["competitor"]])
    return found.rows


def run_sustained(
    folder: Path, head: dict[str, Any], board: Board, args: argparse.Namespace
) -> None:
    """Seconds of load at S = 8192: what the power limit leaves, and joules per call."""
    stopwatch, path = Stopwatch(board), folder / "sustained.json"
    for dim in args.head_dim or (64, 128, 256):
        for direction in [args.direction] if args.direction else ("forward", "backward"):
            case = paper(direction, args.dtype or "bfloat16", dim, False, 8192)
            inputs = draw(case)
            for name in competitors(args.sustained, args.alone, case):
                content = {**record.read(path), **head}
                try:
                    run = competitor(name, case, inputs)
                    found = stopwatch.sustained(run)
                except Exception as problem:
                    print(f"  {name}: {type(problem).__name__}")
                    continue
                row = {**case.key(), "competitor": name, **found, "date": record.now(),
                       "tflops": round(case.flops / found["ms"] / 1e9, 2)}  # fmt: skip
                if name in OURS:
                    row["digest"] = digest.digest(OURS[name])
                rows = record.merge(content.get("rows", []), row, KEY)
                record.write(path, {**content, "rows": rows})
                print(" ".join(f"{k}={v}" for k, v in row.items() if k in ("competitor", "tflops",
                      "clock_mhz", "power_w", "joules")), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
