"""Wrong values of what only some calls take: outputs, scales, lengths, saved results, parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from negative import ENTRIES, FP8, HEADS, HEADS_KV, KEYS, Entry, Kwargs, dense, draw, elsewhere
from test_errors import raises_well, works
from torch import Tensor

import flash

ENTRY = {entry.name: entry for entry in ENTRIES}
DEVICES = ("cpu", "meta")
Change = Callable[[Kwargs, torch.device], Kwargs]


def whole(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


WRONG_OUT: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "list": (lambda x: [x], TypeError),
    "int": (lambda x: 3, TypeError),
    "dtype": (lambda x: whole(x).to(torch.bfloat16), TypeError),
    "integer": (lambda x: whole(x).to(torch.int32), TypeError),
    "device": (elsewhere, ValueError),
    "rank": (lambda x: whole(x).flatten(0, 1), ValueError),
    "rows": (lambda x: whole(x)[:, 1:].contiguous(), ValueError),
    "dim": (lambda x: whole(x)[..., :8].contiguous(), ValueError),
    "stride": (lambda x: whole(x).mT.contiguous().mT, ValueError),
    "expanded": (lambda x: whole(x)[:1, :1].expand(x.shape), ValueError),
    "leaf": (lambda x: whole(x).requires_grad_(), ValueError),
}
OUTPUTS = (
    ("attention", "out", "q"), ("attention-bhsd", "out", "q"), ("varlen", "out", "q"),
    ("backward", "dq", "q"), ("backward", "dk", "k"), ("backward", "dv", "v"),
    ("backward-bhsd", "dq", "q"), ("backward-varlen", "dk", "k"),
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", WRONG_OUT)
@pytest.mark.parametrize(("name", "argument", "like"), OUTPUTS)
def test_wrong_output(name: str, argument: str, like: str, wrong: str, device: str) -> None:
    entry, where = ENTRY[name], torch.device(device)
    given = entry.make(where)
    make, error = WRONG_OUT[wrong]
    found = raises_well(entry, {**given, argument: make(given[like])}, error)
    assert str(found.argument).startswith(argument)
    works(entry, where)


@pytest.mark.parametrize(("name", "argument", "like"), OUTPUTS)
def test_output_must_not_be_an_input(name: str, argument: str, like: str) -> None:
    entry, where = ENTRY[name], torch.device("cpu")
    given = entry.make(where)
    raises_well(entry, {**given, argument: given[like]}, ValueError)
    works(entry, where)


def test_gradients_must_not_share_memory() -> None:
    entry = ENTRY["backward"]
    given = entry.make(torch.device("cpu"))
    same = torch.empty_like(given["k"])
    raises_well(entry, {**given, "dk": same, "dv": same}, ValueError)


def test_slices_of_one_buffer_are_fine() -> None:
    qkv = torch.randn(2, 6, 3, 4, 16)
    grads = torch.zeros_like(qkv)
    q, k, v = qkv.unbind(2)
    out, lse = flash.attention(q, k, v, return_lse=True)
    dout = torch.randn_like(out)
    dq, dk, dv = grads.unbind(2)
    found = flash.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    fresh = flash.attention_backward(dout, q, k, v, out, lse)
    for a, b, c in zip(found, fresh, grads.unbind(2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_output_with_a_gradient_wanted() -> None:
    entry = ENTRY["attention"]
    given = entry.make(torch.device("cpu"))
    given["q"].requires_grad_()
    raises_well(entry, {**given, "out": whole(given["q"].detach())}, ValueError)
    with torch.no_grad():
        entry.function(**given, out=whole(given["q"].detach()))


def fp8_call(device: torch.device) -> Kwargs:
    given = {name: x.to(FP8) for name, x in dense(device).items()}
    scale = torch.ones(2, 1, HEADS_KV, device=device)
    return {**given, "q_descale": scale, "k_descale": scale, "v_descale": scale}


SCALES: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "missing": (lambda s: None, ValueError),
    "float": (lambda s: 1.0, TypeError),
    "half": (lambda s: s.half(), TypeError),
    "double": (lambda s: s.double(), TypeError),
    "device": (elsewhere, ValueError),
    "batch": (lambda s: s[:1], ValueError),
    "heads": (lambda s: s[..., :1], ValueError),
    "blocks": (lambda s: s.expand(2, 3, HEADS_KV), ValueError),
    "scalar": (lambda s: s[0, 0, 0], ValueError),
    "flat": (lambda s: s.flatten(), ValueError),
}
BAD_VALUES = (0.0, -1.0, float("nan"), float("inf"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", SCALES)
@pytest.mark.parametrize("argument", ["q_descale", "k_descale", "v_descale"])
def test_wrong_scale(argument: str, wrong: str, device: str) -> None:
    where = torch.device(device)
    entry = Entry("fp8", flash.attention, fp8_call)
    given = fp8_call(where)
    make, error = SCALES[wrong]
    found = raises_well(entry, {**given, argument: make(given[argument])}, error)
    assert str(found.argument).startswith(argument)
    works(entry, where)


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("argument", ["q_descale", "k_descale", "v_descale"])
def test_scale_must_be_positive(argument: str, value: float) -> None:
    entry = Entry("fp8", flash.attention, fp8_call)
    given = fp8_call(torch.device("cpu"))
    bad = torch.full_like(given[argument], value)
    raises_well(entry, {**given, argument: bad}, ValueError)


@pytest.mark.parametrize("name", ["attention", "attention-bhsd", "varlen"])
@pytest.mark.parametrize("argument", ["q_descale", "k_descale", "v_descale"])
def test_scale_of_wide_inputs(name: str, argument: str) -> None:
    entry = ENTRY[name]
    given = entry.make(torch.device("cpu"))
    raises_well(entry, {**given, argument: torch.ones(2, 1, HEADS_KV)}, ValueError)
    works(entry, torch.device("cpu"))


def test_fp8_has_no_backward() -> None:
    given = fp8_call(torch.device("cpu"))
    out, lse = flash.attention(**given, return_lse=True)
    bare = {name: given[name] for name in "qkv"}
    entry = Entry("fp8", flash.attention_backward, fp8_call)
    raises_well(entry, {**bare, "dout": out, "out": out, "lse": lse}, TypeError)


CU: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "none": (lambda c: None, TypeError),
    "list": (lambda c: [0, 2, 5], TypeError),
    "int64": (lambda c: c.long(), TypeError),
    "float": (lambda c: c.float(), TypeError),
    "device": (elsewhere, ValueError),
    "2d": (lambda c: c[None], ValueError),
    "empty": (lambda c: c[:0], ValueError),
    "strided": (lambda c: c.repeat_interleave(2)[::2], ValueError),
    "short": (lambda c: c[:2], ValueError),
}
CU_VALUES = {
    "start": lambda c: c + torch.tensor([1, 0, 0], dtype=torch.int32),
    "decreasing": lambda c: torch.stack([c[0], c[2], c[1]]),
    "negative": lambda c: torch.stack([c[0], -c[1], c[2]]),
    "last": lambda c: c + torch.tensor([0, 0, 1], dtype=torch.int32),
    "early": lambda c: c - torch.tensor([0, 0, 1], dtype=torch.int32),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", CU)
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("name", ["varlen", "backward-varlen"])
def test_wrong_lengths(name: str, argument: str, wrong: str, device: str) -> None:
    entry, where = ENTRY[name], torch.device(device)
    given = entry.make(where)
    make, error = CU[wrong]
    raises_well(entry, {**given, argument: make(given[argument])}, error)
    works(entry, where)


@pytest.mark.parametrize("wrong", CU_VALUES)
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("name", ["varlen", "backward-varlen"])
def test_wrong_ends(name: str, argument: str, wrong: str) -> None:
    entry, where = ENTRY[name], torch.device("cpu")
    given = entry.make(where)
    found = raises_well(entry, {**given, argument: CU_VALUES[wrong](given[argument])}, ValueError)
    assert str(found.argument).startswith(argument)
    works(entry, where)


@pytest.mark.parametrize("longest", [0, 1, 2])
@pytest.mark.parametrize("argument", ["max_seqlen_q", "max_seqlen_k"])
def test_longest_is_longer(argument: str, longest: int) -> None:
    entry = ENTRY["varlen"]
    given = entry.make(torch.device("cpu"))
    raises_well(entry, {**given, argument: longest}, ValueError)


SAVED: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "none": (lambda x: None, TypeError),
    "list": (lambda x: [1.0], TypeError),
    "half": (lambda x: x.half(), TypeError),
    "integer": (lambda x: x.to(torch.int32), TypeError),
    "device": (elsewhere, ValueError),
    "first": (lambda x: x[:1].contiguous(), ValueError),
    "rank": (lambda x: x.flatten(), ValueError),
    "swapped": (lambda x: x.transpose(-1, -2).contiguous(), ValueError),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", SAVED)
@pytest.mark.parametrize("argument", ["dout", "out", "lse", "dlse"])
@pytest.mark.parametrize("name", ["backward", "backward-bhsd", "backward-varlen"])
def test_wrong_saved(name: str, argument: str, wrong: str, device: str) -> None:
    entry, where = ENTRY[name], torch.device(device)
    given = entry.make(where)
    make, error = SAVED[wrong]
    if argument == "dlse" and wrong == "none":
        entry.function(**given, dlse=None)  # legal: no gradient arrives through LSE
        return
    found = raises_well(entry, {**given, argument: make(given.get(argument, given["lse"]))}, error)
    assert found.argument == argument
    works(entry, where)


def merge_call(device: torch.device) -> Kwargs:
    outs = [draw(device, 2, 5, HEADS, 16) for _ in range(2)]
    return {"outs": outs, "lses": [draw(device, 2, HEADS, 5) for _ in range(2)]}


MERGE: dict[str, tuple[Change, type[Exception]]] = {
    "no-parts": (lambda k, d: {"outs": [], "lses": []}, ValueError),
    "none": (lambda k, d: {"outs": None}, TypeError),
    "int": (lambda k, d: {"lses": 3}, TypeError),
    "count": (lambda k, d: {"lses": k["lses"][:1]}, ValueError),
    "part-kind": (lambda k, d: {"outs": [k["outs"][0], None]}, TypeError),
    "lse-kind": (lambda k, d: {"lses": [k["lses"][0], 1.0]}, TypeError),
    "dtype": (lambda k, d: {"outs": [k["outs"][0], k["outs"][1].half()]}, TypeError),
    "integer": (lambda k, d: {"outs": [x.int() for x in k["outs"]]}, TypeError),
    "lse-dtype": (lambda k, d: {"lses": [x.half() for x in k["lses"]]}, TypeError),
    "device": (lambda k, d: {"outs": [k["outs"][0], elsewhere(k["outs"][1])]}, ValueError),
    "shape": (lambda k, d: {"outs": [k["outs"][0], k["outs"][1][:1]]}, ValueError),
    "lse-shape": (lambda k, d: {"lses": [x.mT.contiguous() for x in k["lses"]]}, ValueError),
    "rank": (lambda k, d: {"outs": [x.flatten() for x in k["outs"]]}, ValueError),
    "layout": (lambda k, d: {"layout": "sbhd"}, ValueError),
    "layout-kind": (lambda k, d: {"layout": 1}, TypeError),
    "other-layout": (lambda k, d: {"layout": "bhsd"}, ValueError),
    "unknown": (lambda k, d: {"lse": 1}, TypeError),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", MERGE)
def test_wrong_parts(wrong: str, device: str) -> None:
    entry, where = Entry("merge", flash.merge, merge_call), torch.device(device)
    given = merge_call(where)
    change, error = MERGE[wrong]
    raises_well(entry, {**given, **change(given, where)}, error)
    works(entry, where)


@pytest.mark.parametrize("backend", ["v1", "v2", "v3"])
@pytest.mark.parametrize("name", ["attention", "varlen", "attention-bhsd"])
def test_named_backend_never_falls_back(name: str, backend: str) -> None:
    entry = ENTRY[name]
    given = entry.make(torch.device("cpu"))
    wide = {n: x.double() if n in "qkv" else x for n, x in given.items()}
    found = raises_well(entry, {**wide, "backend": backend}, flash.UnsupportedError)
    assert set(found.reasons) == set(flash.capabilities())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["sparse", "nested", "strided nested"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_kinds_of_tensors(name: str, kind: str) -> None:
    given = dense(torch.device("cpu"))
    if kind == "sparse":
        given[name] = given[name].to_sparse()
    else:
        kept = torch.strided if kind == "strided nested" else torch.jagged
        given[name] = torch.nested.nested_tensor(list(given[name]), layout=kept)
    raises_well(ENTRY["attention"], given, flash.UnsupportedError)
    works(ENTRY["attention"], torch.device("cpu"))


def test_sizes_are_named() -> None:
    given = dense(torch.device("cpu"))
    given["k"] = draw(torch.device("cpu"), 2, KEYS + 1, HEADS_KV, 16)
    found = raises_well(ENTRY["attention"], given, ValueError)
    assert str(KEYS + 1) in str(found)
    assert str(KEYS) in str(found)
