"""Measuring and comparing: cases and their rows, ratios with intervals, files that survive."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flash import cli_app
from flash.flops import forward_flops
from flash.study import accuracy, cases, competitors, files, measure, modelled, ratios
from flash.study.cases import Case

TINY = ["--shape", "1,64,2,64", "--device", "cpu", "--budget-ms", "1"]
PLAIN = Case("forward", "bfloat16", 2, 128, 4, 64)
EVERY = [case for _, found in cases.PRESETS.values() for case in found]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli_app.app, list(arguments), env={"COLUMNS": "200"})


def row(ms: float, rounds: list[float] | None = None, **more: Any) -> dict[str, Any]:
    found = {**PLAIN.key(), "competitor": "v2", "ran": "kernel", "ms": ms, "tflops": 1 / ms, **more}
    return {**found, **({"ms_rounds": rounds} if rounds else {})}


def held(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"environment": {"gpu": "A"}, "rows": list(rows)}


# --- cases


@pytest.mark.parametrize("case", EVERY, ids=measure.describe)
def test_a_row_leads_back_to_its_case(case: Case) -> None:
    for direction in cases.DIRECTIONS:
        wanted = cases.expand([case], [direction], None)[0]
        assert cases.of_row(wanted.key()) == wanted


@pytest.mark.parametrize("case", EVERY, ids=measure.describe)
def test_the_repro_command(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the same case."""
    asked: list[Case] = []

    def race(wanted: list[Case], names: list[str], *_: Any) -> Any:
        asked.extend(wanted)
        assert names == ["v2"]
        return {"environment": {}, "skipped": [], "rows": []}, True

    monkeypatch.setattr("flash.cli_study.race", race)
    command = case.command("v2").split()
    assert command[0] == "flash"
    assert call(*command[1:]).exit_code == 0
    assert asked == [case]


def test_flops_are_those_of_the_contract() -> None:
    for case in EVERY:
        assert case.flops == forward_flops(
            case.spec, case.batch, case.heads, case.seqlen, case.keys, case.head_dim, case.dim_v
        )
    back = cases.expand([PLAIN], ["backward"], None)[0]
    assert back.flops == PLAIN.flops * 5 / 2


def test_the_papers_convention() -> None:
    case = cases.paper("forward", "bfloat16", 128, False, 512)
    assert (case.batch * case.seqlen, case.heads * case.head_dim) == (16384, 2048)


# --- bench


def test_bench_measures_what_runs_on_a_cpu(tmp_path: Path) -> None:
    out, table = tmp_path / "a.json", tmp_path / "a.csv"
    asked = [*TINY, "--causal", "--direction", "both", "--out", str(out), "--csv", str(table)]
    result = call("bench", *asked, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == files.read(out)
    assert content["environment"].keys() >= {"device", "torch", "python"}
    names = {(r["direction"], r["competitor"]) for r in content["rows"]}
    ran = {"v1", "v2", "v3", "torch", "standard", "reference"}
    assert names == {(way, name) for way in cases.DIRECTIONS for name in ran}
    for found in content["rows"]:
        assert 0 < found["error"] < 2e-2
        assert found["ms_p10"] <= found["ms"] <= found["ms_p90"]
        assert found["memory_bytes"] > 0
        assert found["repro"].startswith("flash bench ")
        assert found["ran"] == ("schedule" if found["competitor"] in competitors.OURS else
                                found["ran"])  # fmt: skip
        flops = cases.of_row(found).flops
        assert found["tflops"] == pytest.approx(flops / found["ms"] / 1e9, rel=1e-3)
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [line["competitor"] for line in lines] == [r["competitor"] for r in content["rows"]]


def test_bench_serves_every_option_of_a_shape() -> None:
    rare = ["--heads-kv", "1", "--seqlen-k", "96", "--head-dim-v", "32", "--window", "40,none",
            "--softcap", "20", "--backend", "ours", "--columns", "all"]  # fmt: skip
    result = call("bench", *TINY, *rare)
    assert result.exit_code == 0, result.output
    assert "schedule" in result.stdout
    assert "s64/96 h2/1 d64/32 window 40,none" in result.stdout


def test_bench_says_why_a_backend_is_left_out() -> None:
    found = json.loads(call("bench", *TINY, "--backend", "v2,fp8", "--direction", "backward",
                            "--json").stdout)  # fmt: skip
    assert [r["competitor"] for r in found["rows"]] == ["v2"]
    assert "forward pass" in found["skipped"][0]["why"]


def test_interrupted_bench_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.measure

    def stop(case: Case, *rest: Any) -> Any:
        if case.seqlen == 128:
            raise KeyboardInterrupt
        return right(case, *rest)

    monkeypatch.setattr(measure, "measure", stop)
    out = tmp_path / "a.json"
    result = call("bench", *TINY, "--seqlen", "64,128", "--backend", "v2", "--out", str(out))
    assert result.exit_code == 130
    assert [r["seqlen"] for r in files.read(out)["rows"]] == [64]
    assert "1 rows of 2 cases are kept" in result.stderr


def test_rates_as_shares_of_measured_ceilings(tmp_path: Path) -> None:
    limits = tmp_path / "limits.json"
    files.write(limits, {"limits": [{"name": "mma.sync", "rate": 1e12}]})
    asked = [*TINY, "--backend", "v2,torch", "--limits", str(limits), "--json"]
    found = json.loads(call("bench", *asked).stdout)["rows"]
    schedule, library = found
    assert "share" not in schedule
    assert library["share"] == pytest.approx(library["tflops"], rel=1e-2)


def test_list_names_presets_and_backends() -> None:
    text = call("bench", "--list").stdout
    for name in (*cases.PRESETS, *competitors.NAMES):
        assert name in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--preset", "gpt9"],
        ["bench", "--backend", "v9"],
        ["bench", "--backend", "fa3"],
        ["bench", "--direction", "sideways"],
        ["bench", "--shape", "1,2,3"],
        ["bench", "--shape", "0,64,2,64"],
        ["bench", "--shape", "1,64,3,64", "--heads-kv", "2"],
        ["bench", "--shape", "1,64,2,60"],
        ["bench", "--shape", "1,64,2,64", "--softcap", "-1"],
        ["bench", "--shape", "1,64,2,64", "--seqlen", "64,0"],
        ["bench", "--causal"],
        ["bench", "--preset", "small", "--seqlen", "64"],
        ["bench", "--columns", "beauty"],
        ["explain", "--q=-1,64,2,64"],
        ["compare"],
        ["compare", "pyproject.toml", "--fp8"],
        ["compare", "--fp8", "--head-dim", "80"],
        ["compare", "--fp8", "--seqlen", "0"],
        ["compare", "missing.json"],
        ["compare", "pyproject.toml", "pyproject.toml"],
        ["report", "missing"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_and_no_traceback(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""


# --- compare


def test_ratio_and_interval_from_rounds() -> None:
    steady = row(2.0, [2.0, 2.01, 1.99, 2.0, 2.0])
    half = row(1.0, [1.0, 1.005, 0.995, 1.0, 1.0])
    center, low, high = ratios.ratio(steady, half)
    assert center == pytest.approx(2.0)
    assert 1.97 < low < 2.0 < high < 2.03
    center, low, high = ratios.ratio(row(2.0, [1.5, 2.5]), row(1.0, [0.7, 1.4]))
    assert low < 1 < high


def test_ratio_without_rounds_or_spread() -> None:
    assert ratios.ratio(row(2.0), row(1.0)) == (2.0, 2.0, 2.0)
    center, low, high = ratios.ratio(row(2.0, ms_p10=1.9, ms_p90=2.1), row(2.0))
    assert low < center < high


def test_regressions_come_first_and_fail_on_request(tmp_path: Path) -> None:
    rounds = [1.0, 1.001, 0.999]
    before = held(*(row(1.0, rounds, competitor=name) for name in ("v1", "v2", "v3")))
    after = held(row(1.0, rounds, competitor="v1"), row(0.5, [0.5, 0.5005], competitor="v2"),
                 row(1.5, [1.5, 1.501], competitor="v3"))  # fmt: skip
    found = ratios.compare(before, after, 0.03)
    assert [r.verdict(0.03) for r in found.ratios] == ["slower", "faster", "same"]
    assert found.markdown().index("slower") < found.markdown().index("faster")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (before, after), strict=True):
        files.write(path, content)
    names = [str(path) for path in paths]
    assert call("compare", *names).exit_code == 0
    assert call("compare", *names, "--fail-on-regression").exit_code == 1
    assert call("compare", names[0], names[0], "--fail-on-regression").exit_code == 0
    assert call("compare", *names, "--markdown").stdout.startswith("**1 slower, 1 faster, 1 same")
    assert json.loads(call("compare", *names, "--json").stdout)["regressions"] == 1


def test_fp8_errors_are_measured_on_request() -> None:
    found = json.loads(
        call("compare", "--fp8", "--head-dim", "64", "--seqlen", "90", "--json").stdout
    )
    assert {row["way"] for row in found["rows"]} == set(accuracy.WAYS)
    assert all(0 < row["rmse"] < row["relative"] < 0.2 for row in found["rows"])
    assert "Block, turned" in call("compare", "--fp8", "--head-dim", "64", "--seqlen", "9").stdout


def test_rows_without_a_partner_are_counted() -> None:
    found = ratios.compare(held(row(1.0), row(1.0, competitor="v1")), held(row(1.0)), 0.03)
    assert len(found.ratios) == 1
    assert found.only == (1, 0)


def test_who_wins_is_said_per_device() -> None:
    first = held(row(1.0, tflops=10, competitor="v1"), row(1.0, tflops=20, competitor="v2"))
    second = {**held(row(1.0, tflops=30, competitor="v1"), row(1.0, tflops=20)),
              "environment": {"gpu": "B"}}  # fmt: skip
    wins = ratios.compare(first, second, 0.03).winners
    assert [(w[0], w[2]) for w in wins] == [("A", "v2"), ("B", "v1")]
    schedules = held(row(1.0, competitor="v1", ran="schedule"), row(1.0, ran="schedule"))
    assert not ratios.compare(schedules, schedules, 0.03).winners


@pytest.mark.parametrize("name", ["A100", "h100", "RTX 4090"])
def test_a_model_is_marked_and_bounds_what_it_models(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write(path, held(row(1.0), row(1.0, competitor="v3"), row(1.0, competitor="standard")))
    text = call("compare", str(path), "--model", name, "--markdown").stdout
    assert "(modelled)" in text
    assert "modelled from its datasheet" in text
    model = modelled.content(files.read(path), name)
    _, unit = modelled.find(name)
    names = {r["competitor"] for r in model["rows"]}
    assert names == ({"v2", "v3"} if name == "h100" else {"v2"})
    for found in model["rows"]:
        assert found["tflops"] * 1e12 <= unit.half_flops * 1.0001
    assert call("compare", str(path), "--model", "Abacus").exit_code == 2
    peers = modelled.content(held(row(1.0, competitor="fa3"), row(1.0, competitor="fa4")), name)
    assert len(peers["rows"]) == (2 if name == "h100" else 0), "peers too, where they run"


# --- files


def test_slug_and_device_name() -> None:
    assert files.slug("NVIDIA H200") == "nvidia-h200"
    assert files.device_name({"environment": {"device": "some CPU"}}) == "some CPU"


def test_files_keep_one_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = held(row(1.0), row(2.0, competitor="v1"))
    files.write(path, content)
    assert files.read(path) == content
    assert sum('"competitor"' in line for line in path.read_text().splitlines()) == 2
