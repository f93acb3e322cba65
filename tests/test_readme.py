"""README: its tables are those of the data, its code compiles, its links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flash
from bench import tables
from bench.digest import ROOT

PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("v*_*/*.md"), *ROOT.glob("bench/**/*.md"))
    if not path.is_symlink()
)
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def test_tables_are_those_of_the_data() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in tables.stale()]
    assert not names, f"stale: {names}; run `python -m bench.tables`"


def test_table_of_speeds() -> None:
    row = {"head_dim": 64, "mask": "full", "seqlen": 512, "error": 1e-3}
    content = {"rows": [{**row, "competitor": "v2", "tflops": 299.6},
                        {**row, "competitor": "sdpa-flash", "tflops": 250.2}]}  # fmt: skip
    assert tables.speeds(content).splitlines() == [
        "| d | mask | S | v2 | sdpa-flash |",
        "|---|---|---|---|---|",
        "| 64 | full | 512 | 300 | 250 |",
    ]
    assert tables.speeds(content, [1024]).count("\n") == 1


def test_markers_are_filled_and_kept(tmp_path: Path) -> None:
    text = "a\n<!-- table: results -->\nold\n<!-- end -->\nb"
    filled = tables.filled(text, tmp_path)
    assert "old" not in filled
    assert tables.filled(filled, tmp_path) == filled
    assert filled.startswith("a\n<!-- table: results -->\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_python_blocks_call_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
    for name in set(re.findall(r"flash\.(\w+)\(", "\n".join(blocks))):
        assert callable(getattr(flash, name)), f"README calls flash.{name}"


def test_every_public_call_is_in_the_readme() -> None:
    functions = [name for name in flash.__all__ if name[0].islower()]
    missing = [name for name in functions if f"flash.{name}" not in README]
    assert not missing


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = set(re.findall(r"^\s*make (\w+)", README + GUIDE, re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "CONTRIBUTING"])
def test_named_files_exist(text: str) -> None:
    for name in re.findall(r"`([\w.]+/[\w./]+\.(?:py|cuh|txt|md))`", text):
        assert (ROOT / name).exists(), f"{name} is spoken of"
    for first, second in re.findall(r"--no-index -w (\S+) (\S+)", text):
        assert (ROOT / first).exists()
        assert (ROOT / second).exists()


def test_environment_variables_exist() -> None:
    build = "".join(path.read_text() for path in (ROOT / "cmake").iterdir() if path.is_file())
    for name in set(re.findall(r"\bFLASH_[A-Z_]+\b", README + GUIDE)):
        spelled = name in build or name.removeprefix("FLASH_") in build
        assert spelled, f"{name} is spoken of and read by nobody"
