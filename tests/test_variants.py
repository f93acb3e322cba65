"""Ablations and the trace: their edits still fit the sources, and their data reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import ablations, variants
from bench.digest import ROOT
from bench.every_lane import EVERY_LANE
from bench.trace import __main__ as trace
from bench.variants import Variant
from flash import cli_app
from flash.study import files, timeline

EVERY = [*ablations.VARIANTS, trace.TRACED, EVERY_LANE]
MARKS = "0 100 1\n0 150 2\n0 200 0\n1 4294967290 1\n1 120 4\n1 180 5\n1 300 0\n"


@pytest.mark.parametrize("variant", EVERY, ids=lambda v: v.name)
def test_edits_fit_the_sources(variant: Variant) -> None:
    assert (ROOT / variant.folder / "forward.cuh").is_file()
    texts: dict[str, str] = {}
    for file, old, new in variant.edits:
        before = texts.get(file) or (ROOT / file).read_text()
        texts[file] = variants.edited(before, old, new)
        assert texts[file] != before
    for text in texts.values():
        assert text.count("{") == text.count("}")


def test_every_variant_has_its_baseline_and_its_own_folder() -> None:
    assert len({variant.name for variant in EVERY}) == len(EVERY)
    assert {v.version for v in ablations.VARIANTS if not v.edits} == {"v1", "v2", "v3"}
    with pytest.raises(ValueError, match="sources have changed"):
        variants.edited("a b", "c", "d")


def test_every_variant_is_timed_on_something() -> None:
    for variant in ablations.VARIANTS:
        found = [case for case in ablations.cases() if case.direction in variant.directions
                 and str(case.head_dim) in variant.dims.split(";")]  # fmt: skip
        assert found, variant.name
    assert len({ablations.words(case) for case in ablations.cases()}) == len(ablations.cases())


def test_a_copy_holds_the_edits(tmp_path: Path) -> None:
    variant = next(v for v in ablations.VARIANTS if v.without == "ping-pong")
    variants.copy(variant, tmp_path)
    assert "kTakesTurns = false;" in (tmp_path / "v3_hopper" / "traits.cuh").read_text()
    assert "named_sync(kTurn" in (ROOT / "v3_hopper" / "pipe.cuh").read_text()
    assert (tmp_path / "CMakeLists.txt").is_file()


def test_the_kernels_have_no_trace_of_the_trace() -> None:
    for path in (ROOT / "v3_hopper").glob("*.cuh"):
        assert "trace" not in path.read_text().lower()


def test_fp8_without_its_ideas_is_less_exact() -> None:
    rows = {row["without"]: row for row in ablations.quantized()}
    assert rows["Hadamard turns"]["rmse"] > 1.2 * rows["Hadamard turns"]["baseline"]
    assert rows["both"]["rmse"] >= rows["Hadamard turns"]["rmse"]


def rows() -> list[dict[str, Any]]:
    return trace.spans(MARKS)


def test_spans_from_marks_across_a_wrapping_clock() -> None:
    found = rows()
    assert [(r["role"], r["what"]) for r in found] == [
        ("producer", "waits"), ("producer", "loads K"), ("consumer 0", "waits"),
        ("consumer 0", "multiplies"), ("consumer 0", "softmax"),
    ]  # fmt: skip
    first = {r["role"]: r["begin"] for r in reversed(found)}
    assert first == {"producer": 106, "consumer 0": 0}
    assert [r["end"] - r["begin"] for r in found] == [50, 50, 126, 60, 120]


def test_flash_trace(tmp_path: Path) -> None:
    path, perfetto, picture = (tmp_path / n for n in ("timeline.json", "p.json", "t.svg"))
    files.write(path, {"environment": {"gpu": "G"}, "timeline": rows()})
    asked = ["trace", str(path), "--perfetto", str(perfetto), "--picture", str(picture)]
    result = CliRunner().invoke(cli_app.app, asked)
    assert result.exit_code == 0, result.output
    assert "consumer 0: waits" in result.stdout
    events = json.loads(perfetto.read_text())["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X"}
    assert sum(e["ph"] == "X" for e in events) == len(rows())
    assert picture.read_text().startswith("<?xml")
    assert CliRunner().invoke(cli_app.app, ["trace", str(tmp_path / "none")]).exit_code == 2


def test_a_window_is_cut_from_the_middle() -> None:
    spans = [{"role": "a", "what": "w", "begin": n * 10, "end": n * 10 + 10} for n in range(10)]
    found = timeline.window(spans, 30)
    assert (found[0]["begin"], found[-1]["end"]) == (0, 30)
    assert sum(r["end"] - r["begin"] for r in found) == 30
    assert timeline.window([], 30) == []
