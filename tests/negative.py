"""The bad-input matrix: for every entry point a valid call, and every way to spoil one argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flash

Kwargs = dict[str, Any]
BATCH, ROWS, KEYS, HEADS, HEADS_KV, DIM = 2, 5, 7, 4, 2, 16
FP8 = torch.float8_e4m3fn
NOT_TENSORS: dict[str, Any] = {
    "none": None, "list": [1.0], "int": 3, "string": "q", "numpy": np.zeros((2, 5, 4, 16)),
}  # fmt: skip
WRONG_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.uint8, torch.int64)
OPTIONS: dict[str, tuple[tuple[Any, type[Exception]], ...]] = {
    "causal": (
        (None, TypeError), (1, TypeError), (0, TypeError), (1.0, TypeError), ("yes", ValueError),
        ("bottom_right", ValueError), ("", ValueError), (torch.tensor(True), TypeError),
        ((True,), TypeError),
    ),
    "window": (
        (5, TypeError), ("5", TypeError), (2.5, TypeError), ((1,), ValueError), ((), ValueError),
        ((1, 2, 3), ValueError), ((1.0, 2), TypeError), ((True, 1), TypeError),
        ((-1, 0), ValueError), ((0, -1), ValueError), ((None, -2), ValueError),
        ((-1, -1), ValueError), ({1, 2}, TypeError), (("1", 2), TypeError),
    ),
    "scale": (
        (float("nan"), ValueError), (float("inf"), ValueError), (-float("inf"), ValueError),
        ("1", TypeError), (True, TypeError), (torch.tensor(1.0), TypeError), (1j, TypeError),
        (Decimal(1), TypeError), ([1.0], TypeError), (10**400, ValueError), (1e300, ValueError),
    ),
    "softcap": (
        (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
        (1e300, ValueError), (1e-50, ValueError), (None, TypeError), ("a", TypeError),
        (True, TypeError), (torch.tensor(1.0), TypeError),
    ),
    "deterministic": ((1, TypeError), (None, TypeError), ("yes", TypeError)),
    "return_lse": ((1, TypeError), (None, TypeError), ("no", TypeError)),
    "precision": (
        ("fp16", ValueError), (8, TypeError), ("FP8", ValueError), (True, TypeError),
        ("fp8", flash.UnsupportedError),  # of float32 inputs
    ),
    "layout": (
        ("bhds", ValueError), ("BSHD", ValueError), (None, TypeError), (4, TypeError),
        ("", ValueError), ("packed", ValueError),
    ),
    "backend": (
        ("v4", ValueError), ("flash", ValueError), ("", ValueError), (None, TypeError),
        (3, TypeError), ("cuda", ValueError), ("V1", ValueError), (["v1"], TypeError),
    ),
    "arch": ((80, TypeError), ("ampere", ValueError), ("sm_", ValueError), ("", ValueError)),
    "direction": (("sideways", ValueError), (0, TypeError)),
    "is_causal": ((None, TypeError), (1, TypeError), ("top-left", TypeError)),
    "enable_gqa": ((None, TypeError), (1, TypeError), (False, ValueError)),
    "dropout_p": (
        (0.1, flash.UnsupportedError), (1.0, flash.UnsupportedError), (-0.1, ValueError),
        (1.5, ValueError), (float("nan"), ValueError), ("0", TypeError), (None, TypeError),
    ),
    "attn_mask": (([[True]], TypeError), (True, TypeError)),
    "backends": (("v1", TypeError), (["v9"], ValueError), (3, TypeError)),
    "repeats": ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)),
    "max_seqlen_q": (
        (-1, ValueError), (2**31, ValueError), (3.0, TypeError), (True, TypeError),
        ("5", TypeError), (torch.tensor(5), TypeError),
    ),
    "max_seqlen_k": ((-5, ValueError), (2**40, ValueError), ([7], TypeError)),
}  # fmt: skip
UNKNOWN = {
    "softmax_scale": "scale", "window_size": "window", "sm_scale": "scale", "caussal": "causal",
    "return_softmax_lse": "return_lse", "dropout": None, "block_table": None, "num_splits": None,
    "alibi_slopes": None, "nonsense": None,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A public function: its valid arguments, and which of them are the attention's tensors."""

    name: str
    function: Callable[..., Any]
    make: Callable[[torch.device], Kwargs]
    qkv: tuple[str, str, str] = ("q", "k", "v")
    axes: str = "bshd"
    options: tuple[str, ...] = ()
    unknown: bool = True

    def axis(self, name: str) -> int:
        order = {"bshd": "bshd", "bhsd": "bhsd", "packed": "shd"}[self.axes]
        return order.index(name)


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def dense(device: torch.device) -> Kwargs:
    return {
        "q": draw(device, BATCH, ROWS, HEADS, DIM), "k": draw(device, BATCH, KEYS, HEADS_KV, DIM),
        "v": draw(device, BATCH, KEYS, HEADS_KV, DIM),
    }  # fmt: skip


def swapped(device: torch.device) -> Kwargs:
    turned = {name: x.transpose(1, 2).contiguous() for name, x in dense(device).items()}
    return {**turned, "layout": "bhsd"}


def sdpa_call(device: torch.device) -> Kwargs:
    q, k, v = list(swapped(device).values())[:3]
    return {"query": q, "key": k, "value": v, "enable_gqa": True}


def packed(device: torch.device) -> Kwargs:
    def ends(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return {
        "q": draw(device, ROWS, HEADS, DIM), "k": draw(device, KEYS, HEADS_KV, DIM),
        "v": draw(device, KEYS, HEADS_KV, DIM), "cu_seqlens_q": ends(0, 2, ROWS),
        "cu_seqlens_k": ends(0, 4, KEYS),
    }  # fmt: skip


def saved(call: Callable[[torch.device], Kwargs]) -> Callable[[torch.device], Kwargs]:
    """The backward call of a forward one."""

    def make(device: torch.device) -> Kwargs:
        given = call(device)
        forward = flash.attention_varlen if "cu_seqlens_q" in given else flash.attention
        out, lse = forward(**given, return_lse=True)
        return {**given, "dout": torch.randn_like(out).contiguous(), "out": out, "lse": lse}

    return make


SCORES = ("causal", "window", "scale", "softcap", "deterministic", "backend")
_ALL = (*SCORES, "return_lse", "precision")
_EXPLAIN = (*SCORES, "precision", "layout", "arch", "direction")
_LENGTHS = ("max_seqlen_q", "max_seqlen_k")
_SDPA = ("is_causal", "scale", "enable_gqa", "dropout_p", "attn_mask", "backend")
_COMPARE = ("causal", "window", "scale", "backends", "repeats")
ENTRIES = (
    Entry("attention", flash.attention, dense, options=(*_ALL, "layout")),
    Entry("attention-bhsd", flash.attention, swapped, axes="bhsd", options=_ALL),
    Entry("varlen", flash.attention_varlen, packed, axes="packed", options=(*_ALL, *_LENGTHS)),
    Entry("backward", flash.attention_backward, saved(dense), options=(*SCORES, "layout")),
    Entry("backward-bhsd", flash.attention_backward, saved(swapped), axes="bhsd", options=SCORES),
    Entry("backward-varlen", flash.attention_backward, saved(packed), axes="packed",
          options=(*SCORES, *_LENGTHS)),
    Entry("sdpa", flash.sdpa, sdpa_call, ("query", "key", "value"), "bhsd", _SDPA),
    Entry("explain", flash.explain, dense, options=_EXPLAIN),
    Entry("compare", lambda **given: flash.compare(**{"repeats": 1, **given}), dense,
          options=_COMPARE, unknown=False),
)  # fmt: skip


@dataclass(frozen=True)
class Spoiled:
    """One wrong argument, and the error it must meet."""

    entry: Entry
    what: str
    change: Callable[[Kwargs, torch.device], Kwargs]
    error: type[Exception]

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.what}"


def spoiled_options(entry: Entry) -> Iterator[Spoiled]:
    for name in entry.options:
        for i, (value, error) in enumerate(OPTIONS[name]):
            yield Spoiled(entry, f"{name}{i}", lambda _k, _d, n=name, x=value: {n: x}, error)
    if "window" in entry.options:
        both = {"causal": True, "window": (3, 1)}
        yield Spoiled(entry, "window-causal", lambda _k, _d: both, ValueError)
    if entry.unknown:
        for name in UNKNOWN:
            yield Spoiled(entry, f"unknown-{name}", lambda _k, _d, n=name: {n: 1}, TypeError)


def cut(x: Tensor, axis: int, size: int) -> Tensor:
    return x.narrow(axis, 0, size).contiguous()


def elsewhere(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu" if x.device.type == "meta" else "meta")


def spoiled_tensors(entry: Entry) -> Iterator[Spoiled]:
    """Each of q, k and v: kind, dtype, device, rank, shape, stride."""

    def edit(what: str, name: str, run: Callable[[Tensor], Any], error: type[Exception]) -> Spoiled:
        return Spoiled(entry, f"{name}-{what}", lambda k, _d: {name: run(k[name])}, error)

    for name in entry.qkv:
        for what, value in NOT_TENSORS.items():
            yield edit(what, name, lambda _x, given=value: given, TypeError)
        for dtype in WRONG_DTYPES:
            yield edit(str(dtype)[6:], name, lambda x, d=dtype: x.to(d), TypeError)
        yield edit("mixed", name, lambda x: x.to(torch.bfloat16), TypeError)
        yield edit("device", name, elsewhere, ValueError)
        yield edit("1d", name, lambda x: x.flatten(), ValueError)
        yield edit("2d", name, lambda x: x.flatten(0, -2), ValueError)
        if name == entry.qkv[2]:  # V may have its own, if it is one that is served
            yield edit("head-dim", name, lambda x: cut(x, -1, 12), flash.UnsupportedError)
        else:
            yield edit("head-dim", name, lambda x: cut(x, -1, 8), ValueError)
        yield edit("stride", name, lambda x: x.mT.contiguous().mT, ValueError)
        if entry.axes != "packed":
            axis = entry.axis("b")
            yield edit("batch", name, lambda x, a=axis: cut(x, a, 1), ValueError)
        if name != entry.qkv[0]:
            axis = entry.axis("h")
            yield edit("heads", name, lambda x, a=axis: cut(x, a, 1), ValueError)
            axis = entry.axis("s")
            yield edit("keys", name, lambda x, a=axis: cut(x, a, 3), ValueError)


def spoiled_together(entry: Entry) -> Iterator[Spoiled]:
    """All of q, k and v changed alike."""

    def resize(dim: int) -> Callable[[Kwargs, torch.device], Kwargs]:
        def change(given: Kwargs, device: torch.device) -> Kwargs:
            shapes = {name: (*given[name].shape[:-1], dim) for name in entry.qkv}
            return {name: draw(device, *shape) for name, shape in shapes.items()}

        return change

    def retype(dtype: torch.dtype) -> Callable[[Kwargs, torch.device], Kwargs]:
        return lambda given, _d: {name: given[name].to(dtype) for name in entry.qkv}

    heads = entry.axis("h")

    def with_heads(count: int, names: Sequence[str]) -> Callable[[Kwargs, torch.device], Kwargs]:
        return lambda given, _d: {name: cut(given[name], heads, count) for name in names}

    for dim in (0, 3, 20, 257, 264, 512):
        yield Spoiled(entry, f"dim{dim}", resize(dim), flash.UnsupportedError)
    for dtype in WRONG_DTYPES:
        yield Spoiled(entry, f"all-{str(dtype)[6:]}", retype(dtype), TypeError)
    for count in (3, 0):
        yield Spoiled(entry, f"{count}-heads", with_heads(count, entry.qkv[:1]), ValueError)
    yield Spoiled(entry, "0-kv-heads", with_heads(0, entry.qkv[1:]), ValueError)
