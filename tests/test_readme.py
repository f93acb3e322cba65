"""README: its tables are those of the data, its code runs, its links and commands exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import typer

import flash
from bench import gpu_check, tables
from bench.digest import ROOT
from flash import cli_app

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


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_anchors_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            there = (page.parent / target) if target else page
            assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


def test_python_blocks_run() -> None:
    """Every call of the README, on a CPU, with the tensors that it speaks of."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    q, k, v, dout = (torch.randn(1, 64, 4, 64, dtype=torch.bfloat16) for _ in range(4))
    out, lse = flash.attention(q, k, v, return_lse=True)
    cu_seqlens = torch.tensor([0, 24, 64], dtype=torch.int32)
    names = {"flash": flash, "q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse,
             "outs": [out, out], "lses": [lse, lse],
             "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}  # fmt: skip
    packed = {**names, "q": q[0], "k": k[0], "v": v[0]}
    for statement in (s for block in blocks for s in ast.parse(block).body):
        code = ast.unparse(statement)
        exec(code, dict(packed if "varlen" in code else names))


def options_of(command: str) -> set[str]:
    """The options of `flash <command>` or of `python -m bench.<command>`."""
    if command.startswith("bench."):
        path = ROOT / command.replace(".", "/")
        own = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        found = set(re.findall(r'"(--[\w-]+)"', own + (ROOT / "bench/script.py").read_text()))
        studies = gpu_check.STUDIES if command == "bench.gpu_check" else ()
        return found | {"--" + name.replace("_", "-") for name in studies}
    parameters = typer.main.get_command(cli_app.app).commands[command].params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_exist_with_their_options(page: Path) -> None:
    fence = r"^```\w*\n(.*?)^```"
    blocks = re.findall(fence, page.read_text(), re.S | re.M)
    inline = re.findall(r"`([^`\n]+)`", re.sub(fence, "", page.read_text(), flags=re.S | re.M))
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        found = re.match(r"(?:flash|python -m) ((?:bench\.)?[a-z]\w*)\b([^#]*)", line.strip())
        if found and (found[1].startswith("bench.") or line.startswith("flash")):
            missing = set(re.findall(r"--[\w-]+", found[2])) - options_of(found[1])
            assert not missing, f"{line}: {missing}"


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
    words = set(re.findall(r"\bFLASH_[A-Z_]+\b", build))
    for subsets in re.findall(r"foreach\(subset ([A-Z_ ]+)\)", build):
        words |= {f"FLASH_{name}" for name in subsets.split()}
    named = set(re.findall(r"\bFLASH_[A-Z_]+\b", README + GUIDE))
    assert named <= words, "spoken of and read by nobody"
