"""The house style that no formatter knows: budgets, headers, names, and files named alike."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
from pathlib import Path

import pytest

from bench.digest import ROOT, VERSIONS, has_kernels

FOLDERS = ("common", "v1_tiling", "v2_parallel", "v3_hopper", "tests", "bench", "cmake", ".ci")
CUDA_SUFFIXES = (".h", ".cuh", ".cu", ".cpp")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
CUDA = sorted(path for path in FILES if path.suffix in CUDA_SUFFIXES)
COLUMNS = 100
FILE_LINES = {".py": 300, ".cuh": 350, ".h": 350, ".cpp": 350, ".cu": 350}
COMMENTED_OUT = re.compile(
    r" *// *(?:[\w:<>*&\[\].]+ )*[\w:.\[\]<>]+ *(?:[-+*/]?=[^=;]+|\([^;]*\));$| *//.*\) *\{$"
)
FUNCTION_LINES, FORWARD_LINES = 50, 200
KERNEL_LINES = {"v1_tiling": 120, "v2_parallel": 120, "v3_hopper": 150}
DIFF_LINES = 160
ALIKE = (
    "README.md", "__init__.py", "schedule.py", "traits.cuh", "schedule.cuh", "load.cuh", "gemm.cuh",
    "softmax.cuh", "store.cuh", "forward.cuh", "backward.cuh", "launch.cuh",
)  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("path", [*PYTHON, *CUDA], ids=name_of)
every_cuda_file = pytest.mark.parametrize("path", CUDA, ids=name_of)
every_python_file = pytest.mark.parametrize("path", PYTHON, ids=name_of)


@every_file
def test_size_and_text(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= FILE_LINES[path.suffix], "a file over budget holds a second idea"
    if path.name == "forward.cuh":
        assert len(lines) <= FORWARD_LINES
    long = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert not long, f"over {COLUMNS} columns: lines {long}"
    assert "\t" not in text
    assert text.endswith("\n")
    assert not [n for n, line in enumerate(lines, 1) if line != line.rstrip()]


@every_file
def test_no_leftovers(path: Path) -> None:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    assert not [line for line in path.read_text().splitlines() if marks.search(line)]


@every_cuda_file
def test_cuda_header(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    assert re.match(r"// \S.*", first), "a file begins with one sentence, its idea"
    if path.suffix in (".h", ".cuh"):
        assert "#pragma once" in rest


@every_cuda_file
def test_no_commented_out_code_and_no_control_flow_in_macros(path: Path) -> None:
    text = path.read_text()
    assert not [line for line in text.splitlines() if COMMENTED_OUT.match(line)]
    macros = re.findall(r"^ *# *define\b(?:[^\n]*\\\n)*[^\n]*", text, re.M)
    assert not [macro for macro in macros if re.search(r"\b(if|for|while|do|switch)\b", macro)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("  // int row = threadIdx.x / 32;", True),
        ("  // __syncthreads();", True),
        ("  // x += y[2];", True),
        ("  // if (row < n) {", True),
        ("  // O = O + P V: one product per K/V block", False),
        ("// Calls visit(row, chunk) for each chunk of this thread;", False),
        ("// dQ = dS K", False),
    ],
)
def test_what_counts_as_commented_out(line: str, code: bool) -> None:
    assert bool(COMMENTED_OUT.match(line)) == code


def first_statement(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    """Signature and docstring are the contract, not the work."""
    return node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]


@every_python_file
def test_python_header_and_functions(path: Path) -> None:
    tree = ast.parse(path.read_text())
    doc = ast.get_docstring(tree) or ""
    if path.read_text().strip():
        assert re.match(r"[^\n]*[.:!?]", doc), "a module begins with one sentence, its idea"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - first_statement(node).lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


def code_only(text: str) -> str:
    """Comments and literals blanked out, line breaks kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda m: "\n" * m[0].count("\n"), text, flags=re.S)


def functions(text: str) -> list[tuple[str, int, bool]]:
    """(name, lines, is a kernel) of each function body, found by its braces."""
    code = re.sub(r"^\s*#[^\n]*", "", code_only(text), flags=re.M)
    found, stack, start = [], [], 0
    for match in re.finditer(r"[{};]", code):
        position, mark = match.start(), match[0]
        head = code[start:position]
        if mark == "{":
            opener = re.search(r"(\w+)\s*\([^;{}]*\)[^;{}()]*$", head)
            outside = all(kind == "scope" for kind, *_ in stack)
            scope = re.search(r"\b(namespace|struct|class|enum|union)\b[^()]*$", head)
            if outside and opener and not scope:
                begin = start + len(head) - len(head.lstrip())
                stack.append(("function", signature(head), begin, "__global__" in head))
            else:
                stack.append(("scope" if outside and scope else "inner", "", 0, False))
        elif mark == "}" and stack:
            kind, name, begin, kernel = stack.pop()
            if kind == "function":
                found.append((name, code.count("\n", begin, position) + 1, kernel))
        start = match.end()
    return found


def signature(head: str) -> str:
    """The function's own name: the word before the first parenthesis that is not an attribute."""
    names = re.findall(r"(\w+)\s*\(", head)
    attributes = {"__launch_bounds__", "alignas", "requires", "decltype", "noexcept"}
    return next((name for name in names if name not in attributes), "?")


def test_the_brace_meter() -> None:
    source = (
        "namespace a {\nstruct B { int x = 1; };\n"
        "// f() { does not count\nint f(int x) {\n  if (x) {\n    return 1;\n  }\n  return 0;\n}\n"
        "template <class T>\n__global__ void __launch_bounds__(T::n) k(\n    int x) {\n"
        "  auto g = [&]() { return x; };\n}\n}\n"
    )
    assert functions(source) == [("f", 6, False), ("k", 5, True)]


@every_cuda_file
def test_cuda_functions(path: Path) -> None:
    for name, length, kernel in functions(path.read_text()):
        limit = KERNEL_LINES.get(path.parent.name, 120) if kernel else FUNCTION_LINES
        assert length <= limit, f"{name} has {length} lines, {limit} are allowed"


@pytest.mark.parametrize("path", [p for p in CUDA if p.parent.name in VERSIONS], ids=name_of)
def test_the_version_is_only_in_the_namespace(path: Path) -> None:
    code = re.sub(r"^\s*#[^\n]*|\bnamespace flash::v\d\b|\bflash::v\d\b", "",
                  code_only(path.read_text()), flags=re.M)  # fmt: skip
    named = re.findall(r"\b\w*?(?:^|_|\b)[vV][123](?:\b|_)\w*", code)
    assert not named, "identifiers speak of the idea, not of the version"


@pytest.mark.parametrize("version", [v for v in VERSIONS if has_kernels(v)])
def test_files_are_named_alike(version: str) -> None:
    missing = [name for name in ALIKE if not (ROOT / version / name).is_file()]
    assert not missing


@pytest.mark.parametrize("pair", [VERSIONS[:2], VERSIONS[1:]], ids="-".join)
def test_forward_reads_as_a_diff_of_ideas(pair: tuple[str, str]) -> None:
    texts = []
    for version in pair:
        path = ROOT / version / "forward.cuh"
        assert path.is_file()
        texts.append(["".join(line.split()) for line in path.read_text().splitlines()])
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-" and line[2:]]
    assert len(changed) <= DIFF_LINES, f"{len(changed)} lines differ"


def test_nothing_is_excluded_from_the_linters() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    tools = re.findall(r"^\[tool\.(?:ruff|mypy)[^\n]*\n(.*?)(?=^\[|\Z)", project, re.S | re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert len(tools) >= 3
    for text in (*tools, hooks):
        assert not re.search(r"exclude|per-file-ignores|ignore_errors", text)


def test_every_cuda_file_is_given_to_the_formatter() -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    plan = subprocess.run(["make", "-n", "lint"], cwd=ROOT, env=bare, capture_output=True,
                          text=True, check=True).stdout  # fmt: skip
    given = set(next(line for line in plan.splitlines() if "clang-format --dry" in line).split())
    assert {name_of(path) for path in CUDA} <= given
