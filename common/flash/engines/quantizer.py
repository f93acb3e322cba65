"""The fused quantizer on CUDA tensors: one kernel for Q, K and V together."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.errors import LaunchError
from flash.wrapped import under_transform

GRANULARITIES = {"block": 0, "head": 1, "tensor": 2}
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
HEAD_DIMS = (64, 96, 128, 192, 256)
_ALIGNED = 16


@cache
def module() -> Any:
    """The compiled quantizer, None where it was not built."""
    try:
        return importlib.import_module("flash.v3_hopper._quantize")
    except ImportError:
        return None


@cache
def runs_on(device: int) -> bool:
    """It is machine code for Hopper."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def serves(*tensors: Tensor) -> bool:
    """Tensors (.., rows, heads, dim) that the kernel reads as they are."""
    watched = torch.compiler.is_compiling() or under_transform()
    return not watched and all(map(_serves, tensors))


def _serves(x: Tensor) -> bool:
    if not x.is_cuda or type(x) is not Tensor:
        return False
    if x.dtype not in DTYPES or x.shape[-1] not in HEAD_DIMS or not x.numel():
        return False
    bits = x.data_ptr()
    for n, stride in zip(x.shape[:-1], x.stride(), strict=False):
        bits |= stride * x.element_size() if n > 1 else 0
    if x.stride(-1) != 1 or bits % _ALIGNED:
        return False
    return module() is not None and runs_on(x.device.index)


class Task(NamedTuple):
    """A tensor (batch, rows, heads, dim), and what is to become of it."""

    x: Tensor
    block: int  # rows that share a scale
    heads_kv: int
    rotate: bool
    spread: bool = False  # errors of a column cancel over rows; not of what is rotated
    packed: tuple[Tensor, int] | None = None  # (cu_seqlens, longest) of (total, heads, dim)
    keys_first: bool = False  # rows, multiples of 16, become contiguous; not of what is rotated


def quantize(tasks: Sequence[Task], granularity: str) -> list[tuple[Tensor, Tensor]]:
    """(e4m3 values, scales) of each, as `flash.quantize.quantize` gives them.

    One launch for all if they have one dtype and head dim, which a launch is for.
    """
    kinds = {(task.x.dtype, task.x.shape[-1]) for task in tasks}
    if len(kinds) > 1:
        return [found for task in tasks for found in quantize([task], granularity)]
    (dtype, dim), device = kinds.pop(), tasks[0].x.device
    with torch.cuda.device(device):
        found = [_outputs(task, granularity) for task in tasks]
        status = module().quantize(
            DTYPES[dtype], dim, GRANULARITIES[granularity],
            [_described(task, *places) for task, places in zip(tasks, found, strict=True)],
            torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    if status:
        text = f"quantize_fp8 on {device}: CUDA error {status} ({module().error_string(status)})"
        raise LaunchError(text, argument="backend", given="v3_hopper")
    return [(stored, scale) for stored, scale, _ in found]


def _sizes(task: Task) -> tuple[int, int]:
    """Sequences, and rows of the longest."""
    if task.packed is None:
        return task.x.shape[0], task.x.shape[1]
    return task.packed[0].shape[0] - 1, task.packed[1]


def empty(shape: Sequence[int], keys_first: bool, device: torch.device) -> Tensor:
    """(.., rows, heads, dim) in e4m3; keys first, (batch, heads, dim, rows) in memory."""
    if not keys_first:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    batch, rows, heads, dim = shape
    stored = torch.empty((batch, heads, dim, rows), dtype=torch.float8_e4m3fn, device=device)
    return stored.permute(0, 3, 1, 2)


def _outputs(task: Task, granularity: str) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, rows = _sizes(task)
    blocks = max(1, -(-rows // task.block)) if granularity == "block" else 1
    device, heads_kv = task.x.device, task.heads_kv
    stored = empty(task.x.shape, task.keys_first, device)
    scale = torch.empty((batch, blocks, heads_kv), dtype=torch.float32, device=device)
    if granularity == "block":
        return stored, scale, None
    return stored, scale, torch.zeros(batch * heads_kv, dtype=torch.float32, device=device)


def _described(task: Task, stored: Tensor, scale: Tensor, amax: Tensor | None) -> tuple[Any, ...]:
    """As the compiled module takes a tensor."""
    x, packed = task.x, task.packed
    strides = x.stride()[:3] if packed is None else (0, *x.stride()[:2])
    sizes = (*_sizes(task), x.shape[-2], task.heads_kv, task.block)
    places = (stored.data_ptr(), scale.data_ptr(), 0 if amax is None else amax.data_ptr(),
              0 if packed is None else packed[0].data_ptr())  # fmt: skip
    flags = (task.rotate, task.spread, task.keys_first)
    return (x.data_ptr(), *strides), sizes, *flags, places
