"""The sanitizer and the repeated runs speak of the kernels as they are now, and found nothing."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from test_evidence import FILES, WITH_KERNELS

from bench import digest, kernel_calls, proof_tables, record, repeat, sanitize
from bench.every_lane import EVERY_LANE
from bench.kernel_calls import Kernel
from bench.proof_tables import listed

MEMCHECK = """kernel {"kernel": [0, 3, 64, 64], "error": 0.05}
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void flash::v3::fp8::kernel<(int)64>(flash::Arguments)+0x1010 in a.cuh:7
=========     by thread (288,0,0) in block (8,0,0)
=========     Access to 0x7fb9709f4348 is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at void flash::v3::fp8::kernel<(int)64>(flash::Arguments)+0x1010 in a.cuh:7
=========     by thread (289,0,0) in block (8,0,0)
=========     Access to 0x7fb9709f4348 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
recorded = pytest.mark.skipif(
    not any(path.name == "sanitizer.json" for path in FILES), reason="nothing is recorded yet"
)
CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@recorded
@pytest.mark.parametrize("version", WITH_KERNELS)
def test_what_was_seen_of_the_present_sources_is_clean(version: str) -> None:
    for path in FILES:
        rows = proof_tables.current(path.parent, path.name, "sanitizer", version)
        assert not [row for row in rows if row.get("errors") or row.get("warnings")]
        rows = proof_tables.current(path.parent, path.name, "repeat", version)
        assert not [row for row in rows if row["differing"]]


@recorded
def test_what_was_not_seen_is_told() -> None:
    """After a change of a kernel: run `python -m bench.sanitize` and `python -m bench.repeat`."""
    readme = (digest.ROOT / "README.md").read_text()
    for folder in {path.parent for path in FILES if path.name == "sanitizer.json"}:
        for gap in proof_tables.gaps(folder, sanitize.TOOLS):
            assert gap in readme


@recorded
def test_the_page_of_v3_counts_what_is_recorded() -> None:
    page = (digest.ROOT / "v3_hopper" / "README.md").read_text()
    for folder in {path.parent for path in FILES if path.name == "repeat.json"}:
        tests = record.read(folder / "tests.json")["versions"].get("v3_hopper")
        rows = proof_tables.current(folder, "repeat.json", "repeat", "v3_hopper")
        if tests and rows and tests["digest"] == digest.digest("v3_hopper"):
            runs = sum(row["runs"] for row in rows)
            assert f"{tests['passed']} GPU tests passed; {runs:,} runs" in page


def test_a_gap_is_counted(tmp_path: Path) -> None:
    every = proof_tables.gaps(tmp_path, ("racecheck",))
    assert f"racecheck v2_parallel {len(listed('v2_parallel'))} kernels" in every
    kernels = [list(kernel) for kernel in listed("v2_parallel")]
    row = {"version": "v2_parallel", "digest": digest.digest("v2_parallel"), "tool": "racecheck",
           "kernels": kernels[1:]}  # fmt: skip
    record.write(tmp_path / "sanitizer.json", {"sanitizer": [row]})
    assert "racecheck v2_parallel 1 kernels" in proof_tables.gaps(tmp_path, ("racecheck",))
    record.write(tmp_path / "sanitizer.json", {"sanitizer": [{**row, "kernels": kernels}]})
    assert not [gap for gap in proof_tables.gaps(tmp_path, ("racecheck",)) if "racecheck v2" in gap]


@recorded
def test_racecheck_does_not_follow_one_lane_that_arrives_for_its_warp() -> None:
    """Why it is given copies of v3's kernels in which every lane arrives for itself."""
    for path in FILES:
        if path.name == "sanitizer.json":
            probe = record.read(path)["probe"]
            assert probe["every_lane_arrives"] == 0
            assert probe["one_lane_arrives"] > 0
            assert probe["nobody_meets"] > 0


def test_one_lane_arrives_behind_a_meeting() -> None:
    """What those copies cannot show."""
    lone = re.compile(r"\n(.*)\n +if \((?:leader|threadIdx\.x % 32 == 0)\) \w+\.arrive\(\);")
    for file in {file for file, *_ in EVERY_LANE.edits}:
        for before in lone.findall((digest.ROOT / file).read_text()):
            assert before.strip() == "__syncwarp();", file


def test_a_description_is_given_back_behind_a_meeting() -> None:
    """Nor this: of all who have read it, one arrives."""
    meetings = ("__syncwarp();", "sync();  // every thread has read its last of it")
    for name in ("pipe", "fp8_pipe", "load", "guard"):
        lines = (digest.ROOT / "v3_hopper" / f"{name}.cuh").read_text().splitlines()
        found = [i for i, line in enumerate(lines) if re.search(r"work_empty.*\.arrive\(\);", line)]
        assert found, name
        for i in found:
            assert lines[i].strip().startswith("if ("), name
            assert {line.strip() for line in lines[i - 2 : i]} & set(meetings), name


def test_recorded_calls_were_right() -> None:
    """The calls that the sanitizer saw computed what they should: no kernel was watched idle."""
    for path in FILES:
        for row in (*record.read(path).get("sanitizer", []), *record.read(path).get("repeat", [])):
            assert row["error"] is None or row["error"] < 0.08, row


def test_a_blind_tool_runs_only_where_it_is_named() -> None:
    every = argparse.Namespace(tool=None, version=None, direction=None)
    parts = sanitize.asked_for(every)
    assert len(parts) == len(set(parts)) == (3 * 4 - 1) * 2
    assert {tool for name, _, tool in parts if name == "v3"} == {*sanitize.TOOLS} - {"initcheck"}
    named = argparse.Namespace(tool=["initcheck"], version=["v3"], direction=["forward"])
    assert sanitize.asked_for(named) == [("v3", "forward", "initcheck")]


def test_a_report_is_grouped_and_counted() -> None:
    row = sanitize.verdict(MEMCHECK, 0)
    assert (row["errors"], row["warnings"], row["kernels"]) == (2, 0, [[0, 3, 64, 64]])
    (report,) = row["report"]
    assert report.startswith("2 times: Invalid __global__ read")
    assert "a.cuh:7" in report
    assert "0x7fb9709f4348" not in report


def test_a_clean_run_and_one_without_an_end() -> None:
    row = sanitize.verdict(CLEAN, 0)
    assert proof_tables.verdict(row) == "clean"
    assert "report" not in row
    assert proof_tables.verdict(sanitize.verdict("", -1)) == "ran out of time"
    assert proof_tables.verdict(sanitize.verdict(CLEAN, 9)) == "ended with status 9"
    stuck = f"{CLEAN}\n{sanitize.CALLS}backward fp16:64, causal\n========= a report"
    assert sanitize.verdict(stuck, -1)["why"] == "ran out of time in backward fp16:64, causal"


def test_shares_of_a_part_are_one_row() -> None:
    clean, found = ({**sanitize.verdict(text, 0), "seconds": 1.5} for text in (CLEAN, MEMCHECK))
    both = sanitize.together([clean, found])
    assert (both["errors"], both["warnings"]) == (found["errors"], 0)
    assert both["kernels"] == sorted(clean["kernels"] + found["kernels"])
    assert both["report"] == found["report"]
    cut = sanitize.together([clean, {**sanitize.verdict("", -1), "seconds": 9.0}])
    assert (proof_tables.verdict(cut), cut["seconds"]) == ("ran out of time", 9.0)
    assert "errors" not in cut
    assert cut["kernels"] == clean["kernels"]


KERNELS = [
    Kernel("v2_parallel", 0, 1, 64, 64), Kernel("v2_parallel", 1, 1, 64, 64),
    Kernel("v3_hopper", 0, 1, 192, 128), Kernel("v3_hopper", 0, 3, 64, 64),
    Kernel("v3_hopper", 0, 3, 96, 96),
]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_calls_run_and_are_right(kernel: Kernel) -> None:
    """On a CPU the schedules run in the kernels' place."""
    for shape in kernel_calls.shapes(kernel):
        if shape.heads > 8 or max(shape.lengths_q) > 8000:
            continue
        call = kernel_calls.prepare(kernel, shape, "cpu")
        assert call.error(call.run()) < (0.08 if kernel.code == kernel_calls.E4M3 else 4e-3)


def test_long_tiles_are_reached() -> None:
    """Both proofs call v3's tiles of long sequences, where there are any."""
    traits = (digest.ROOT / "v3_hopper" / "traits.cuh").read_text()
    dims = {int(d) for d in re.findall(r"kHasLong<(\d+), \1> = true", traits)}
    assert dims == set(kernel_calls.LONG_DIMS)
    found = dict(re.findall(r"(kLongRows\w*) = ([\d <]+);", traits))
    base, _, shift = found["kLongRowsOfAllHeads"].partition("<<")
    least = int(found["kLongRows"]), int(base) << int(shift or 0)
    for shapes in (kernel_calls.shapes, repeat.shapes):
        for dim in dims:
            every = shapes(Kernel("v3_hopper", 0, 1, dim, dim))
            rows = [s for s in every if not s.packed and s.lengths_q[0] >= least[0]]
            assert any(s.heads * s.lengths_q[0] >= least[1] for s in rows)


def test_descriptions_of_tiles_come_round() -> None:
    """The sanitizer sees v3's forward kernels write a tile's description over an older one."""
    slots = {int(n) for path in (digest.ROOT / "v3_hopper").glob("*traits.cuh")
             for n in re.findall(r"kWorkSlots = (\d+);", path.read_text())}  # fmt: skip
    for code, most_rows in ((1, 192), (3, 256)):
        (shape,) = [s for s in kernel_calls.shapes(Kernel("v3_hopper", 0, code, 64, 64))
                    if s.name == "many rounds"]  # fmt: skip
        tiles = -(-shape.lengths_q[0] // most_rows) * shape.heads
        assert tiles > 132 * max(slots)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.direction], ids=str)
def test_replays_of_the_backward_pass_are_deterministic(kernel: Kernel) -> None:
    assert all(shape.options["deterministic"] for shape in repeat.shapes(kernel))


def test_bits_are_all_of_them() -> None:
    for size in (3, 4):
        x = torch.randn(size, 2).bfloat16()[:, :1] if size == 3 else torch.randn(size, 2)
        y = x.clone()
        assert not repeat.differing((x,), (y,))
        y.view(-1)[-1] += 1
        assert repeat.differing((x,), (y,))


def test_pages_name_the_shapes(tmp_path: Path) -> None:
    rows = [{"version": "v9", "name": f"{way} bf16:64", "shape": shape, "runs": 7, "differing": 0,
             "digest": "abc", "date": "2026-01-02T"}
            for way in ("forward", "backward") for shape in ("a", "b")]  # fmt: skip
    record.write(tmp_path / "repeat.json", {"repeat": [*rows, {**rows[0], "shape": "c"}]})
    text = proof_tables.repeated(tmp_path)
    assert "| `v9` | forward | 1 | 3 | 7 | 0 | abc | 2026-01-02 |" in text
    assert text.endswith("a; b; c (v9 forward only).")


def test_pages_show_the_proofs(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    dirty = {**sanitize.verdict(MEMCHECK, 0), "tool": "memcheck"}
    clean = {**sanitize.verdict(CLEAN, 0), "tool": "racecheck"}
    now = digest.digest("v3_hopper")
    about = {"version": "v3_hopper", "direction": "forward", "digest": now, "date": "2026-01-02T"}
    rows = [{**about, **dirty}, {**about, **clean}]
    record.write(folder / "sanitizer.json", {"sanitizer": rows})
    once = {"version": "v3_hopper", "name": "forward bf16:64", "shape": "full", "runs": 10_000,
            "kernel": [0, 1, 64, 64],
            "differing": 0, "digest": now, "date": "2026-01-02T"}  # fmt: skip
    record.write(folder / "repeat.json", {"repeat": [once]})
    (_, sanitized), (_, repeated) = proof_tables.sections(folder)
    assert "2 errors, 0 warnings | clean" in sanitized
    assert f"10000 | 0 | {now}" in repeated
    assert "v3_hopper forward memcheck: 2 errors" in proof_tables.summary(folder)
    assert "10,000 repeated runs" in proof_tables.summary(folder)
