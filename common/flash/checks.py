"""The tensors of a call: kind, dtype, device, shape and strides, each error naming its argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash.capability import DTYPES, FP8, HEAD_DIM_STEP, MAX_HEAD_DIM
from flash.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    UnsupportedError,
    unsupported,
    wrong_type,
    wrong_value,
)
from flash.overlap import overlaps_itself, share
from flash.wrapped import under_transform

AXES = {
    "bshd": ("batch", "seq", "heads", "dim"),
    "bhsd": ("batch", "heads", "seq", "dim"),
    "packed": ("total", "heads", "dim"),
}

KEY_STEP = 16  # of V with contiguous keys


def check_kind(name: str, x: Any) -> None:
    """A strided torch tensor."""
    if not isinstance(x, Tensor):
        raise wrong_type(name, x, "a torch.Tensor", f"convert it, e.g. torch.as_tensor({name})")
    if x.is_nested or x.layout != torch.strided or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
        hint = "pack ragged batches for attention_varlen" if x.is_nested else "pass a dense tensor"
        text = f"{name} is a {kind} tensor; supported are dense strided tensors; {hint}"
        raise UnsupportedError(text, argument=name, given=kind, expected="strided")


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        text = f"{name}.dtype is {x.dtype}; supported are {names}; convert it with {name}.to()"
        raise ArgumentTypeError(text, argument=name, given=x.dtype, expected=tuple(DTYPES))


def check_same(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """Same dtype and device as another argument."""
    if x.dtype != like.dtype:
        text = f"{name}.dtype is {x.dtype} but {other}.dtype is {like.dtype}; convert one of them"
        raise ArgumentTypeError(text, argument=name, given=x.dtype, expected=like.dtype)
    check_device(name, x, other, like)


def check_device(name: str, x: Tensor, other: str, like: Tensor) -> None:
    if x.device != like.device:
        text = f"{name} is on {x.device} but {other} is on {like.device}; move them to one device"
        raise ArgumentValueError(text, argument=name, given=x.device, expected=like.device)


def check_unit_stride(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        hint = f"call {name}.contiguous()"
        raise wrong_value(f"{name}.stride(-1)", x.stride(-1), "1", hint)


def check_value_strides(v: Tensor, axes: tuple[str, ...]) -> None:
    """FP8's V may come with its keys contiguous: memory (batch, heads, head dim, keys)."""
    if v.dtype != FP8 or "seq" not in axes or v.stride(-1) == 1 or v.stride(axes.index("seq")) != 1:
        return check_unit_stride("v", v)
    keys = v.shape[axes.index("seq")]
    packed = v.stride(axes.index("heads")) == v.shape[-1] * v.stride(-1)
    if keys % KEY_STEP != 0 or not packed:
        expected = f"memory (batch, heads, head dim, keys) and a multiple of {KEY_STEP} keys"
        raise wrong_value("v.stride()", v.stride(), expected, "call v.contiguous()")


def check_shape(name: str, x: Tensor, expected: tuple[Any, ...], why: str) -> None:
    if tuple(x.shape) != expected:
        text = f"{name} must have shape {expected} ({why}), got {tuple(x.shape)}"
        raise ArgumentValueError(text, argument=name, given=tuple(x.shape), expected=expected)


def _check_dims(name: str, x: Tensor, axes: tuple[str, ...], layout: str) -> None:
    if x.ndim != len(axes):
        expected = f"{len(axes)} dimensions ({', '.join(axes)})"
        text = f'{name} has {x.ndim} dimensions; layout "{layout}" needs {expected}'
        hint = "; for packed sequences use attention_varlen" if x.ndim == 3 else ""
        raise ArgumentValueError(text + hint, argument=name, given=x.ndim, expected=len(axes))


def check_head_dim(name: str, dim: int) -> None:
    if dim < HEAD_DIM_STEP or dim > MAX_HEAD_DIM or dim % HEAD_DIM_STEP:
        up = max(1, -(-dim // HEAD_DIM_STEP)) * HEAD_DIM_STEP
        hint = f"pad with torch.nn.functional.pad, e.g. to {up}, and pass scale"
        if dim > MAX_HEAD_DIM:
            hint = "use torch's scaled_dot_product_attention, or more heads of fewer dims"
        text = (
            f"{name} has head dim {dim}; supported are multiples of {HEAD_DIM_STEP} up to "
            f"{MAX_HEAD_DIM}; {hint}"
        )
        raise UnsupportedError(text, argument=name, given=dim, expected=HEAD_DIM_STEP)


def _match(axis: str, names: tuple[str, str], sizes: tuple[int, int], hint: str) -> None:
    if sizes[0] != sizes[1]:
        text = f"{axis}: {names[0]} has {sizes[0]}, {names[1]} has {sizes[1]}; {hint}"
        raise ArgumentValueError(text, argument=names[1], given=sizes[1], expected=sizes[0])


def check_heads(heads_q: int, heads_k: int, heads_v: int) -> None:
    _match("heads", ("k", "v"), (heads_k, heads_v), "K and V need the same number of heads")
    if heads_q < 1 or heads_k < 1:
        name, given = ("q", heads_q) if heads_q < 1 else ("k", heads_k)
        raise wrong_value(f"{name} heads", given, "at least 1")
    if heads_q % heads_k:
        hint = "query heads share K/V heads in equal groups"
        raise wrong_value("q heads", heads_q, f"a multiple of the {heads_k} heads of k", hint)


def check_sizes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """Dimensions that fit one another."""
    axes = AXES[layout]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_dims(name, x, axes, layout)
    seq, heads = axes.index("total" if layout == "packed" else "seq"), axes.index("heads")
    if layout != "packed":
        hint = "broadcast with .expand(), which copies nothing"
        _match("batch", ("q", "k"), (q.shape[0], k.shape[0]), hint)
        _match("batch", ("k", "v"), (k.shape[0], v.shape[0]), hint)
    _match("sequence", ("k", "v"), (k.shape[seq], v.shape[seq]), "every key needs one value")
    check_heads(q.shape[heads], k.shape[heads], v.shape[heads])
    _match("head dim", ("q", "k"), (q.shape[-1], k.shape[-1]), "Q K^T needs equal head dims")


def check_inputs(q: Any, k: Any, v: Any, layout: str) -> None:
    """q, k and v of one call; layout is bshd, bhsd or packed."""
    named = (("q", q), ("k", k), ("v", v))
    for name, x in named:
        check_kind(name, x)
        check_dtype(name, x)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_sizes(q, k, v, layout)
    axes = AXES[layout]
    check_head_dim("q", q.shape[-1])
    check_head_dim("v", v.shape[-1])
    for name, x in named:
        if name == "v":
            check_value_strides(x, axes)
        else:
            check_unit_stride(name, x)
        if x.dtype == FP8 and x.requires_grad:
            text = f"{name} is FP8 and requires grad; FP8 is forward only; use precision='fp8'"
            raise UnsupportedError(text, argument=name, given="requires_grad", expected=False)


def check_output(name: str, x: Any, shape: tuple[Any, ...], like: Tensor, dtype: torch.dtype,
                 inputs: tuple[Tensor, ...]) -> None:  # fmt: skip
    """A tensor to write: right shape and dtype, no element twice, no memory of an input."""
    check_kind(name, x)
    if under_transform():
        hint = "use what is returned"
        raise unsupported(name, "a tensor", "None under a function transform", hint)
    if x.dtype != dtype:
        text = f"{name}.dtype is {x.dtype}, must be {dtype}; allocate it with torch.empty"
        raise ArgumentTypeError(text, argument=name, given=x.dtype, expected=dtype)
    check_device(name, x, "q", like)
    check_shape(name, x, shape, "that of the result")
    check_unit_stride(name, x)
    if x.requires_grad:
        hint = "results written in place have no gradient"
        raise wrong_value(f"{name}.requires_grad", True, "False", hint)
    if overlaps_itself(x):
        raise wrong_value(f"{name}.stride()", x.stride(), "free of overlap", "do not expand it")
    in_memory = x.device.type != "meta" and not torch.compiler.is_compiling()
    if in_memory and any(share(x, other) for other in inputs):
        text = f"{name} shares memory with another tensor of the call; give it its own"
        raise ArgumentValueError(text, argument=name, given="overlap", expected="own memory")
