"""The command line: exit codes, JSON that parses, and a clear word when an extra is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flash import cli_app, demo, doctor, picture, verify
from flash.spec import Spec
from flash.tiles import Tile

SMALL = ["--seqlen", "130", "--heads", "1"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli_app.app, list(arguments), env={"COLUMNS": "160"})


def parsed(*arguments: str, code: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["doctor", "explain", "demo", "verify"])
def test_help_of_every_command(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_doctor() -> None:
    facts = parsed("doctor")
    subjects = {finding["subject"] for finding in facts["findings"]}
    assert facts["ok"] is True
    assert {"machine", "torch", "import flash", "v1_tiling", "v2_parallel", "v3_hopper"} <= subjects
    assert "flash doctor" in call("doctor").output


def impostor(name: str, file: str) -> Any:
    return SimpleNamespace(metadata={"Name": name}, files=[PurePosixPath(file)])


@pytest.mark.parametrize("name", ["flash", "lightning-flash"])
def test_doctor_reports_a_clash(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [impostor(name, "flash/__init__.py"), impostor("other", "flash.txt")]
    monkeypatch.setattr(metadata, "distributions", lambda: found)
    facts = parsed("doctor", code=1)
    clash = next(f for f in facts["findings"] if f["subject"] == "import flash")
    assert clash["state"] == doctor.PROBLEM
    assert name in clash["text"]
    assert f"pip uninstall {name}" in clash["remedy"]
    assert call("doctor").exit_code == 1


def test_doctor_wants_a_recent_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert doctor.torch_itself().state == doctor.PROBLEM
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    assert doctor.torch_itself().state == doctor.OK


def test_demo() -> None:
    found = parsed("demo", "--device", "cpu", "--seqlen", "1024", "--heads", "1")
    lines = found["lines"]
    names = [(line["name"], line["direction"]) for line in lines]
    assert names[0] == (demo.STANDARD, "forward")
    assert len(names) == 1 + 2 * len(demo.VERSIONS)
    for line in lines:
        assert line["error"] < 2e-3
        assert line["ms"] is None
        assert min(line["hbm_bytes"], line["flops"], line["memory"]) > 0
    traffic = {(line["name"], line["direction"]): line["hbm_bytes"] for line in lines}
    assert traffic["v1_tiling", "forward"] > traffic["v2_parallel", "forward"]
    assert found["exact_flops"] == 4 * 64 * 1024 * 1025 // 2


def test_demo_draws_tables_and_masks() -> None:
    result = call("demo", "--device", "cpu", *SMALL, "--no-causal")
    assert result.exit_code == 0
    for word in (*demo.VERSIONS, "HBM traffic", "Rel. error", "Memory", "█ full"):
        assert word in result.output
    assert "Time ms" not in result.output


def test_verify_passes_here() -> None:
    found = parsed("verify", "--device", "cpu")
    assert found["ok"] is True
    assert len(found["outcomes"]) == found["planned"]
    assert {outcome["backend"] for outcome in found["outcomes"]} == set(demo.VERSIONS)


def test_verify_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.run_all

    def wrong(inputs: Any, options: Any, backend: str) -> Any:
        out, *rest = right(inputs, options, backend)
        return (out * 1.05 if backend == "v2_parallel" else out, *rest)

    monkeypatch.setattr(verify, "run_all", wrong)
    found = parsed("verify", "--device", "cpu", code=1)
    failed = {o["backend"] for o in found["outcomes"] if not o["passed"]}
    assert failed == {"v2_parallel"}
    assert "WRONG" in call("verify", "--device", "cpu").output


def test_verify_counts_an_exception_as_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(verify, "run_all", broken)
    outcomes = [outcome for _, _, outcome in verify.run("cpu", torch.bfloat16)]
    assert any(not outcome.passed and "no such kernel" in outcome.detail for outcome in outcomes)


def test_verify_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(verify.time, "monotonic", lambda: float(next(clock)))
    assert len(list(verify.run("cpu", torch.bfloat16, seconds=60.0))) == 2


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "9.0", "sm_120", "cpu"])
def test_explain_without_a_gpu(arch: str) -> None:
    found = parsed("explain", "--q", "2,1024,16,128", "--kv-heads", "4", "--causal", "--arch", arch)
    text = json.dumps(found)
    for backend in demo.VERSIONS:
        assert backend in text


def test_explain_draws_the_mask() -> None:
    result = call("explain", "--q", "1,1024,8,64", "--window", "128,none", "--picture")
    assert result.exit_code == 0
    assert "skipped" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--q", "1,2"],
        ["explain", "--q", "1,2,3,x"],
        ["explain", "--window", "1"],
        ["explain", "--backend", "v9"],
        ["explain", "--q", "1,64,3,64", "--kv-heads", "2"],
        ["explain", "--arch", "banana"],
        ["demo", "--device", "tpu"],
        ["demo", "--dtype", "e4m3"],
        ["demo", "--seqlen", "0"],
        ["demo", "--head-dim", "60"],
        ["demo", "--head-dim", "264"],
        ["verify", "--dtype", "e4m3"],
        ["verify", "--dtype", "int8"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_and_no_traceback(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_cuda_asked_for_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("verify", "--device", "cuda").exit_code == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_degrades_with_a_clear_message(missing: str) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {missing!r} else find(n, *a)\n"
        "from flash.cli import main; main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"needs {missing}" in run.stderr
    assert "pip install 'flash-generations[cli]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_picture_of_a_causal_mask() -> None:
    drawn = picture.picture(Spec(1.0, right=0), 4, 4, Tile(1, 1)).splitlines()
    assert drawn[:4] == ["█···", "██··", "███·", "████"]
    assert picture.census(Spec(1.0, right=0), 4, 4, Tile(2, 2)) == (1, 2, 1, 12, 10)


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(16, 8), Tile(64, 128), Tile(7, 5)])
@pytest.mark.parametrize("spec", [Spec(1.0), Spec(1.0, right=0), Spec(1.0, left=9, right=3),
                                  Spec(1.0, right=0, top_left=True)])  # fmt: skip
def test_census_against_counting(spec: Spec, tile: Tile) -> None:
    rows, keys = 37, 50
    first, last = spec.band(rows, keys)
    r, c = torch.arange(rows)[:, None], torch.arange(keys)[None]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen &= True if first is None else c >= r + first
    seen &= True if last is None else c <= r + last
    cut = [part for band in seen.split(tile.q) for part in band.split(tile.kv, dim=1)]
    found = picture.census(spec, rows, keys, tile)
    assert found.pairs_visible == int(seen.sum())
    assert found.full == sum(bool(part.all()) for part in cut)
    assert found.partial == sum(bool(part.any() and not part.all()) for part in cut)
    assert found.skipped == sum(not part.any() for part in cut)
    assert found.pairs_computed == sum(part.numel() for part in cut if part.any())
