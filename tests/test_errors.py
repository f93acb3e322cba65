"""Every wrong argument of every entry point: a typed error that names it, and no harm done."""

from __future__ import annotations

import inspect
import re
from typing import Any

import negative
import pytest
import torch
from negative import ENTRIES, Entry, Spoiled

import flash
from flash import options

CASES = [
    case
    for entry in ENTRIES
    for make in (negative.spoiled_options, negative.spoiled_tensors, negative.spoiled_together)
    for case in make(entry)
]
DEVICES = ("cpu", "meta")


def skips(case: Spoiled, device: str) -> bool:
    """Meta tensors hold no values to compare."""
    return device == "meta" and case.entry.name == "compare"


PAIRS = [(case, device) for case in CASES for device in DEVICES if not skips(case, device)]


def raises_well(entry: Entry, given: dict[str, Any], error: type[Exception]) -> flash.FlashError:
    """The call raises this kind of error, typed, attributed and with advice."""
    with pytest.raises(error) as caught:
        entry.function(**given)
    found = caught.value
    assert isinstance(found, flash.FlashError), f"{type(found).__name__}: {found}"
    assert found.argument, "the error names no argument"
    assert found.argument.split("[")[0].split(".")[0].split(" ")[0] in str(found)
    assert found.expected is not None or found.reasons
    assert len(str(found)) > 20
    return found


def works(entry: Entry, device: torch.device) -> None:
    result = entry.function(**entry.make(device))
    assert result is not None


@pytest.mark.parametrize(("case", "device"), PAIRS, ids=[f"{c}-{d}" for c, d in PAIRS])
def test_wrong_argument(case: Spoiled, device: str) -> None:
    where = torch.device(device)
    given = case.entry.make(where)
    raises_well(case.entry, {**given, **case.change(given, where)}, case.error)
    works(case.entry, where)


def test_there_are_enough() -> None:
    assert len(PAIRS) >= 600


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.unknown], ids=lambda e: e.name)
@pytest.mark.parametrize("wrong", [w for w, right in negative.UNKNOWN.items() if right])
def test_unknown_name_tells_the_right_one(entry: Entry, wrong: str) -> None:
    given = entry.make(torch.device("cpu"))
    found = raises_well(entry, {**given, wrong: 1}, TypeError)
    assert found.argument == wrong
    if negative.UNKNOWN[wrong] in entry.options:
        assert negative.UNKNOWN[wrong] in str(found)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.unknown], ids=lambda e: e.name)
@pytest.mark.parametrize("wrong", options.OTHER_NAMES)
def test_no_name_is_told_that_does_not_exist(entry: Entry, wrong: str) -> None:
    found = raises_well(entry, {**entry.make(torch.device("cpu")), wrong: 1}, TypeError)
    known = inspect.signature(entry.function).parameters
    told = re.search(r"it is called '(\w+)'|did you mean '(\w+)'", str(found))
    assert told is None or (told[1] or told[2]) in known


def test_the_packed_call_has_no_layout() -> None:
    q, ends = torch.randn(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"unknown argument 'layout' .*; it takes q, k, v"):
        flash.attention_varlen(q, q, q, ends, ends, layout="bshd")


def test_a_head_dim_too_large_is_not_to_be_padded() -> None:
    q = torch.randn(1, 4, 1, 264)
    with pytest.raises(flash.UnsupportedError, match="up to 256; use torch's"):
        flash.attention(q, q, q, backend="reference")
