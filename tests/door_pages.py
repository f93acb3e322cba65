"""The example of a page of docs/doors, run as it stands."""

from __future__ import annotations

import re

from bench.digest import ROOT

LINES = 10


def run_example(page: str) -> None:
    text = (ROOT / "docs" / "doors" / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 1
    code = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(code) <= LINES, "ten lines are enough"
    exec(compile(blocks[0], f"docs/doors/{page}.md", "exec"), {"__name__": "__main__"})
