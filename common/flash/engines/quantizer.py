"""The fused quantizer on CUDA tensors: one kernel for each of Q, K and V."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flash.errors import LaunchError

GRANULARITIES = {"block": 0, "head": 1, "tensor": 2}
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
HEAD_DIMS = (64, 128, 256)
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
    return not torch.compiler.is_compiling() and all(map(_serves, tensors))


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


def quantize(
    x: Tensor, granularity: str, block: int, heads_kv: int, rotate: bool,
    packed: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(e4m3 values, scales) as `flash.quantize.quantize` gives them.

    `packed` is (cu_seqlens, longest sequence) of a tensor (total, heads, dim), per block.
    """
    heads, dim = x.shape[-2:]
    if packed is None:
        batch, rows, strides, ends = x.shape[0], x.shape[1], x.stride()[:3], 0
    else:
        batch, rows, strides = packed[0].shape[0] - 1, packed[1], (0, *x.stride()[:2])
        ends = packed[0].data_ptr()
    blocks = max(1, -(-rows // block)) if granularity == "block" else 1
    device = x.device
    with torch.cuda.device(device):
        stored = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty((batch, blocks, heads_kv), dtype=torch.float32, device=device)
        amax = None
        if granularity != "block":
            amax = torch.zeros(batch * heads_kv, dtype=torch.float32, device=device)
        status = module().quantize(
            DTYPES[x.dtype], (x.data_ptr(), *strides), (batch, rows, heads, heads_kv, dim), block,
            GRANULARITIES[granularity], rotate, stored.data_ptr(), scale.data_ptr(),
            0 if amax is None else amax.data_ptr(), ends,
            torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    if status:
        text = f"quantize_fp8 on {device}: CUDA error {status} ({module().error_string(status)})"
        raise LaunchError(text, argument="backend", given="v3_hopper")
    return stored, scale
