"""What every row of a result file must say before figures are read from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flash.errors import wrong_type, wrong_value
from flash.study.cases import DIRECTIONS, RARE, SHORT

Test = Callable[[Any], bool]
MASK = re.compile(r"(window (\d+|none),(\d+|none) )?causal|full|window (\d+|none),(\d+|none)")


def _number(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < float("inf")


def _count(x: Any) -> bool:
    return type(x) is int and x > 0


def _one_of(*allowed: str) -> Test:
    return lambda x: isinstance(x, str) and x in allowed


FIELDS: dict[str, tuple[Test, str]] = {
    "direction": (_one_of(*DIRECTIONS), " or ".join(DIRECTIONS)),
    "dtype": (_one_of(*SHORT), f"one of {', '.join(SHORT)}"),
    "mask": (lambda x: isinstance(x, str) and MASK.fullmatch(x) is not None, "a mask, as causal"),
    "competitor": (lambda x: isinstance(x, str), "the name of a backend"),
    **dict.fromkeys(("head_dim", "seqlen", "batch", "heads"), (_count, "a whole number above 0")),
    **dict.fromkeys(("ms", "tflops"), (_number, "a number above 0")),
}
NUMBERS = (lambda x: isinstance(x, list) and all(map(_number, x)), "a list of numbers above 0")
OPTIONAL: dict[str, tuple[Test, str]] = {
    **dict.fromkeys(RARE, (lambda x: not x or _number(x), "a number")),
    **dict.fromkeys(("ms_p10", "ms_p90"), (lambda x: x is None or _number(x), "a number above 0")),
    "ms_rounds": NUMBERS,
}


def check(content: Any, file: object) -> None:
    """Raises for the first row of `file` that lacks a key, or has a value that is none."""
    rows = content.get("rows", [])
    if not isinstance(rows, list):
        raise wrong_type(f"rows of {file}", rows, "a list")
    if not isinstance(content.get("environment", {}), dict):
        raise wrong_type(f"environment of {file}", content["environment"], "an object")
    for number, row in enumerate(rows):
        where = f"row {number} of {file}"
        if not isinstance(row, dict):
            raise wrong_type(where, row, "an object")
        missing = [name for name in FIELDS if name not in row]
        if missing:
            given = f"no {', '.join(missing)}"
            raise wrong_value(where, given, f"a row with {', '.join(FIELDS)}")
        for name, (right, expected) in (*FIELDS.items(), *OPTIONAL.items()):
            if name in row and not right(row[name]):
                raise wrong_value(f"{name} in {where}", row[name], expected)
