"""The studies of a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import dram, end_to_end, gpu_check, study_tables
from bench.digest import ROOT
from flash.study import accuracy
from flash.study.cases import paper
from flash.study.facts import apart
from flash.study.sources import Source

TINY = tuple(
    end_to_end.Model(name, causal, width=64, heads=2, layers=2, vocabulary=64)
    for name, causal in (("decoder", True), ("encoder", False))
)
SCRIPTS = ("limits", "memory", "end_to_end", "dram", "ablations", "trace", "sanitize", "repeat",
           "breadth", "host", "fp8")  # fmt: skip


def test_training_agrees_and_learns() -> None:
    rows = end_to_end.curves(6, 64, "cpu", TINY)
    assert len(rows) == len(TINY) * len(end_to_end.ATTENTIONS)
    for model in TINY:
        own = [row for row in rows if row["model"] == model.name]
        assert apart(own) < 2e-3
        assert own[0]["losses"][-1] < own[0]["losses"][0]


@pytest.mark.parametrize("model", TINY, ids=lambda m: m.name)
def test_batches_ask_for_what_can_be_known(model: end_to_end.Model) -> None:
    data = end_to_end.batches(model, 2, 3, 32, "cpu")
    assert len(data) == 2
    for x, target in data:
        assert x.shape == target.shape == (3, 32)
        asked = target != end_to_end.IGNORED
        if model.causal:
            assert torch.equal(x[:, 1:], target[:, :-1])
        else:
            assert bool((x[asked] == model.vocabulary).all())
            assert bool((x[~asked] < model.vocabulary).all())


def counted(kernel: str, number: int, metric: str, unit: str, value: str) -> dict[str, str]:
    return {"ID": str(number), "Kernel Name": kernel, "Metric Name": dram.METRICS[metric],
            "Metric Unit": unit, "Metric Value": value}  # fmt: skip


def test_counts_are_summed_between_marks() -> None:
    rows = [
        counted(dram.MARK, 0, "dram_read", "byte", "9"),
        counted(dram.MARK, 0, "l2_read", "sector", "9"),
        counted("forward_kernel", 1, "dram_read", "Kbyte", "1,500.5"),
        counted("forward_kernel", 1, "l2_read", "sector", "2"),
        counted("other_kernel", 2, "dram_read", "Mbyte", "1"),
        counted(dram.MARK, 3, "dram_read", "byte", "9"),
        counted("forward_kernel", 4, "dram_write", "Gbyte", "2"),
    ]
    first, second = dram.sums(rows)
    assert first == {"dram_read": 1500500 + 1e6, "dram_write": 0, "l2_read": 64, "l2_write": 0,
                     "l2_reduce": 0}  # fmt: skip
    assert second["dram_write"] == 2e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
@pytest.mark.parametrize("name", [*SCRIPTS, "gpu_check"])
def test_without_a_gpu_a_study_says_so(name: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "needs a CUDA device" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_one_command_runs_every_study(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.STUDIES == SCRIPTS
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--end-to-end"])
    assert gpu_check.parse().end_to_end


def timed(name: str, tflops: float, **more: Any) -> dict[str, Any]:
    return {"direction": "forward", "competitor": name, "head_dim": 128, "mask": "full",
            "seqlen": 8192, "dtype": "bfloat16", "tflops": tflops, **more}  # fmt: skip


def test_the_table_of_generations_reads_the_data() -> None:
    source = Source("G", rows=[timed("v2", 300.0), timed("v3", 600.0)])
    source.parts["limits"] = [{"name": "mma.sync", "rate": 6e14}, {"name": "wgmma bf16",
                                                                   "rate": 8e14}]  # fmt: skip
    source.sustained = [timed("v3", 500.0, joules=1.0, ms=2.0)]
    v1, v2, v3 = study_tables.generations(source).splitlines()[2:]
    assert v1.count("–") == 6
    assert "| 300 | 50% |" in v2
    assert "| 600 | 75% |" in v3
    assert v3.endswith("| 1.00 |")


def test_the_table_against_the_official_kernels() -> None:
    rows = [timed("v2", 300.0), timed("sdpa-flash", 200.0), timed("v3", 600.0),
            timed("fa3", 800.0), timed("sdpa-cudnn", 500.0)]  # fmt: skip
    lines = study_tables.officials(Source("G", rows=rows)).splitlines()[2:]
    assert lines == [
        "| `v2` | forward | SDPA flash (FA2) | – | 1.50 | – | 1.50 | 1.50 (d 128, full, 8192) |",
        "| `v3` | forward | FA3, cuDNN | – | 0.75 | – | 0.75 | 0.75 (d 128, full, 8192) |",
    ]
    assert study_tables.officials(Source("G")) == ""


def test_fp8_errors_become_a_table() -> None:
    rows = [row for found in accuracy.study(accuracy.INPUTS, [64], [150], "cpu", 256)
            for row in found]  # fmt: skip
    assert [row["way"] for row in rows] == [*accuracy.WAYS] * 2
    for kind in accuracy.INPUTS:
        own = {row["way"]: row["relative"] for row in rows if row["inputs"] == kind}
        assert own[accuracy.BF16] < 0.01 < own[accuracy.TURNED] < 0.12
        assert own[accuracy.TURNED] < 1.1 * own["tensor"]
    assert {(row["heads"], row["rows"]) for row in rows} == {(1, 150)}
    rates = [{"tensor": name, "head_dim": 64, "dtype": "bfloat16", "tb_per_s": rate}
             for name, rate in
             (("V", 3.0), ("V by keys", 2.8), ("Q, K", 2.0), ("copy", 4.0))]  # fmt: skip
    pages = dict(study_tables.sections(Source("x", parts={"accuracy": rows, "quantizer": rates})))
    errors, speeds = pages.values()
    assert errors.count("| outliers | 64 | 150 |") == errors.count("| normal | 64 | 150 |") == 1
    assert "| 64 | bfloat16 | 3.00 (75%) | 2.80 (70%) | 2.00 (50%) | 4.00 |" in speeds


@pytest.mark.parametrize("seqlen", [1, 512, 4096, 131072])
def test_samples_fit(seqlen: int) -> None:
    heads, rows = accuracy.sampled(seqlen)
    assert heads >= 1
    assert rows <= seqlen
    assert heads * seqlen <= accuracy.MOST_TOKENS
    assert heads * rows <= accuracy.SAMPLES


def test_whoever_is_named_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who stands beside our kernels in fp32 alone; and a slip of the pen is told."""
    case = paper("forward", "float32", 64, False, 512)
    asked = gpu_check.competitors("v1,sdpa-efficient", True, case)
    assert asked == ["v1", "sdpa-efficient"]
    assert "sdpa-efficient" not in gpu_check.competitors("all", False, case)
    assert "v3-keys" not in gpu_check.competitors("all", False, case)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--bench", "v1,sdpa-eficient"])
    with pytest.raises(SystemExit):
        gpu_check.parse()


def test_a_selection_of_the_tests_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: None)
    monkeypatch.setattr(gpu_check, "read_report", lambda _: [("test_v2-one", "passed")])
    monkeypatch.setattr(gpu_check, "built", lambda _: [[0, 1, 64, 64]])
    for select, kept in (("one", False), ("", True)):
        args = argparse.Namespace(version="v2", select=select, workers=1)
        assert gpu_check.run_tests(tmp_path, {}, args)
        assert (tmp_path / "tests.json").exists() == kept
