"""Measures cases: every competitor beside the others, an error for each figure, a row for each."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flash.demo import memory_of
from flash.errors import BackendUnavailableError, UnsupportedError
from flash.study import files
from flash.study.cases import SHORT, Case
from flash.study.competitors import NAMES, OURS, Run, Unfit, competitor, present, ran
from flash.study.inputs import Inputs, draw, error
from flash.study.timing import Board, HostStopwatch, Stopwatch

Row = dict[str, Any]


@dataclass
class Settings:
    """How long and what to measure beside the time."""

    device: str = "cuda"
    total_ms: float = 60.0  # of each competitor, all rounds together
    sustained: float = 0.0  # seconds of load for each row; 0: burst only
    memory: bool = True


@dataclass
class Measured:
    """What one case gave: rows, and for the others why not."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def stopwatch(device: str) -> Stopwatch:
    return Stopwatch(Board()) if device == "cuda" else HostStopwatch()


def choose(asked: str, device: str) -> list[str]:
    """ "v1,v2" -> those; "all": whatever can run here; "ours": the three generations."""
    if asked == "ours":
        return list(OURS)
    if asked == "all":
        on_cpu = {*OURS, "torch", "standard", "reference"}
        found = [name for name in NAMES if present(name) and (device == "cuda" or name in on_cpu)]
        return [name for name in found if name != "reference" or device == "cpu"]
    return list(dict.fromkeys(asked.split(",")))


def measure(case: Case, names: Sequence[str], watch: Stopwatch, how: Settings) -> Measured:
    """All competitors of one case in one race."""
    found = Measured(case)
    inputs = draw(case, how.device)
    runs, facts = prepare(found, names, inputs, how)
    with torch.no_grad():
        timings = watch.race(runs, how.total_ms, warm_ms=15 if how.device == "cuda" else 0.1)
        loads = {n: watch.sustained(run, how.sustained) for n, run in runs.items() if how.sustained}
    for name, timing in timings.items():
        row = {**case.key(), "competitor": name, "ran": ran(name, how.device),
               "tflops": rate(case, timing.median), **timing.as_dict(), **facts[name]}  # fmt: skip
        if name in loads:
            load = loads[name]
            row["sustained_tflops"] = rate(case, load["ms"])
            row |= {f"sustained_{key}": float(f"{load[key]:.5g}") for key in load}
        found.rows.append({**row, "date": files.now(), "repro": case.command(name)})
    return found


def rate(case: Case, ms: float) -> float:
    return float(f"{case.flops / ms / 1e9:.5g}")


def prepare(
    found: Measured, names: Sequence[str], inputs: Inputs, how: Settings
) -> tuple[dict[str, Run], dict[str, Row]]:
    """Call each competitor once: its error, its memory, or why it cannot."""
    runs: dict[str, Run] = {}
    facts: dict[str, Row] = {}
    for name in names:
        try:
            run = competitor(name, found.case, inputs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch tells there why it refuses, and raises too
                off = error(run(), inputs)
            facts[name] = {"error": None if off is None else float(f"{off:.3g}")}
            if how.memory:
                facts[name]["memory_bytes"] = memory_of(run, inputs.q.device)
            runs[name] = run
        except Exception as problem:
            found.skipped[name] = reason(problem, OURS.get(name, "v3_hopper"))
        gc.collect()  # a graph that failed half-way holds memory
    return runs, facts


def reason(problem: Exception, version: str = "") -> str:
    """In one line; of a refusal, what this version said."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    text = str(problem).strip().splitlines() or [""]
    if isinstance(problem, (UnsupportedError, BackendUnavailableError)):
        return "; ".join(problem.reasons.get(version, ())) or text[0]
    if isinstance(problem, Unfit):
        return text[0]
    return f"{type(problem).__name__}: {text[0][:160]}"


def run(
    cases: Sequence[Case], names: Sequence[str], how: Settings,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> Iterator[Measured]:  # fmt: skip
    """Case by case, so that whoever stops keeps what there is."""
    watch = stopwatch(how.device)
    for number, case in enumerate(cases):
        progress(number, describe(case))
        try:
            yield measure(case, names, watch, how)
        except torch.OutOfMemoryError:
            yield Measured(case, skipped=dict.fromkeys(names, "inputs alone are out of memory"))
        if how.device == "cuda":
            torch.cuda.empty_cache()


def describe(case: Case) -> str:
    """ "forward bf16 b4 s4096 h32/8 d128 causal"."""
    heads = f"h{case.heads}" + (f"/{case.kv_heads}" if case.kv_heads != case.heads else "")
    dims = f"d{case.head_dim}" + (f"/{case.dim_v}" if case.dim_v != case.head_dim else "")
    rows = f"s{case.seqlen}" + (f"/{case.keys}" if case.keys != case.seqlen else "")
    cap = [f"softcap {case.softcap:g}"] if case.softcap else []
    return " ".join([case.direction, SHORT[case.dtype], f"b{case.batch}", rows, heads, dims,
                     case.mask, *cap])  # fmt: skip


def content(rows: list[Row], skipped: list[Row], how: Settings, command: str) -> Row:
    """A whole result file."""
    board = Board().facts() if how.device == "cuda" else {}
    head = {"environment": files.environment(board, how.device), "command": command}
    return {**head, "date": files.now(), "skipped": skipped, "rows": rows}
