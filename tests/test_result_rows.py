"""Rows of result files that lack something, or say what is none: bad usage that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.digest import ROOT
from flash import cli_app
from flash.study import rows
from flash.study.cases import Case

GOOD = {
    **Case("forward", "bfloat16", 2, 128, 4, 64).key(), "competitor": "v2", "ran": "kernel",
    "ms": 1.0, "tflops": 2.0, "ms_rounds": [1.0, 1.1],
}  # fmt: skip
WRONG: list[tuple[str, Any]] = [
    ("dtype", "float7"), ("direction", "sideways"), ("mask", "window"), ("mask", None),
    ("ms", 0), ("ms", "fast"), ("ms", True), ("tflops", None), ("seqlen", "128"), ("heads", 1.5),
    ("batch", 0), ("competitor", 3), ("ms_rounds", 2.0), ("ms_rounds", [0.0]), ("softcap", "x"),
    ("ms_p10", "x"),
]  # fmt: skip


def refusal(tmp_path: Path, content: Any, *command: str) -> str:
    """What is said of the file, beside a good one."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"environment": {}, "rows": [GOOD]}))
    bad.write_text(json.dumps(content))
    words = [word.format(good=good, bad=bad) for word in command]
    found = CliRunner().invoke(cli_app.app, words, env={"COLUMNS": "400"})
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    assert found.stdout == ""
    assert "bad.json" in found.output
    return found.output


COMMANDS = [
    ("compare", "{good}", "{bad}"), ("compare", "{bad}", "{good}"),
    ("compare", "{bad}", "--model", "A100"), ("report", "{bad}"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", rows.FIELDS)
def test_a_key_that_is_missing(name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    lacking = {key: value for key, value in GOOD.items() if key != name}
    text = refusal(tmp_path, {"environment": {}, "rows": [GOOD, lacking]}, *command)
    assert "row 1 of" in text
    assert f"no {name}" in text


@pytest.mark.parametrize("command", COMMANDS[::3], ids=" ".join)
@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_value_that_is_none(
    name: str, value: Any, command: tuple[str, ...], tmp_path: Path
) -> None:
    text = refusal(tmp_path, {"environment": {}, "rows": [{**GOOD, name: value}]}, *command)
    assert f"{name} in row 0 of" in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "content",
    [{"environment": {}, "rows": ["x"]}, {"environment": {}, "rows": {"a": 1}},
     {"environment": 3, "rows": [GOOD]}],
    ids=str,
)  # fmt: skip
def test_no_rows_at_all(content: Any, command: tuple[str, ...], tmp_path: Path) -> None:
    refusal(tmp_path, content, *command)


def test_what_is_committed_is_right() -> None:
    found = 0
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            rows.check(content, path)
            found += len(content.get("rows", []))
    assert found > 100
