"""What the doors' tests share: the device, and the example of a page, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from grid import DEVICE

from bench.digest import ROOT

LINES = 10


@pytest.fixture
def on_device() -> Iterator[None]:
    """Tensors are made on the GPU where there is one: then the doors lead to the kernels."""
    with DEVICE:
        yield


def run_example(page: str) -> None:
    text = (ROOT / "docs" / "doors" / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 1
    code = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(code) <= LINES, "ten lines are enough"
    exec(compile(blocks[0], f"docs/doors/{page}.md", "exec"), {"__name__": "__main__"})
