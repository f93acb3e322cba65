"""The compiled generations: a call is a few tuples of pointers and strides, and a status."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.engines import layout
from flash.errors import BackendUnavailableError, LaunchError, unsupported
from flash.spec import Descale, Grads, Result, Spec, Varlen

CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float8_e4m3fn: 3}
FORWARD, BACKWARD = 0, 1
_NO_STATS = (0, 0, 0)
_NO_DESCALE = (0, 0, 0, 0, 0)
_MAX_PLANS = 4096
# The stream of this thread on a device, as a number; only builds with CUDA have it.
stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


class Module(NamedTuple):
    """What became of importing a version's compiled module."""

    module: Any  # None when it cannot be imported
    reason: str  # why not


@cache
def load(version: str) -> Module:
    """Import `flash.<version>._kernels` once; a failure is kept with its reason."""
    name = f"flash.{version}._kernels"
    try:
        return Module(importlib.import_module(name), "")
    except ModuleNotFoundError as error:
        if error.name not in (name, "_kernels"):
            return Module(None, f"{name} failed to import: {error}")
        return Module(None, f"its kernels are not built here; {how_to_build(version)}")
    except ImportError as error:
        return Module(None, f"{name} failed to load: {error}")


def how_to_build(version: str) -> str:
    arch = "90a" if version == "v3_hopper" else "80;90a"
    return f'build them with `FLASH_ARCHS="{arch}" pip install .` on a machine with nvcc'


@cache
def instances(version: str) -> frozenset[tuple[int, int, int, int]]:
    """(direction, dtype code, head dim, head dim of V) of every kernel that was built."""
    module = load(version).module
    return frozenset() if module is None else frozenset(module.instances())


@cache
def probe(version: str, device: int) -> str:
    """Empty when this device can run this module, else CUDA's reason; asked once per device.

    The module asks its first forward kernel; one built for the backward pass alone has none to ask.
    """
    module = load(version).module
    if all(direction != FORWARD for direction, *_ in instances(version)):
        return ""
    with torch.cuda.device(device):
        code = module.probe()
    return "" if code == 0 else str(module.error_string(code))


@cache
def too_large(version: str, device: int) -> frozenset[tuple[int, int, int, int]]:
    """The kernels for whose smallest tile this device has too little shared memory."""
    module = load(version).module
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 1 << 30)
    found = set()
    with torch.cuda.device(device):
        for direction, code, dim, dim_v in instances(version):
            p = module.Problem()
            p.dtype, p.head_dim, p.head_dim_v = code, dim, dim_v
            p.batch = p.heads_q = p.heads_kv = 1
            p.seqlen_q = p.seqlen_k = p.total_q = p.total_k = 4096
            if module.plan(direction, p)["shared_bytes"] > room:
                found.add((direction, code, dim, dim_v))
    return frozenset(found)


@cache
def engine(version: str) -> Kernels:
    loaded = load(version)
    if loaded.module is None:
        text = f"backend {version!r} is not available: {loaded.reason}"
        raise BackendUnavailableError(text, argument="backend", given=version)
    return Kernels(version, loaded.module)


def view(t: Tensor) -> tuple[int, int, int, int]:
    s = t.stride()
    if len(s) == 4:
        return t.data_ptr(), s[0], s[1], s[2]
    return t.data_ptr(), 0, s[0], s[1]


def stats(t: Tensor | None) -> tuple[int, int, int]:
    if t is None:
        return _NO_STATS
    s = t.stride()
    return (t.data_ptr(), s[0], s[1]) if len(s) == 3 else (t.data_ptr(), 0, s[0])


def _descale(t: Tensor | None, rows: int) -> tuple[int, int, int, int, int]:
    if t is None:
        return _NO_DESCALE
    batch, block, head = t.stride()
    return t.data_ptr(), batch, 0 if t.shape[1] == 1 else block, head, rows


def _cu(varlen: Varlen | None) -> tuple[int, int]:
    if varlen is None:
        return 0, 0
    return varlen.cu_seqlens_q.data_ptr(), varlen.cu_seqlens_k.data_ptr()


def _rows_contiguous(t: Tensor | None) -> Tensor | None:
    """Row statistics as kernels read them: float32, rows side by side."""
    if t is None or (t.dtype == torch.float32 and (t.stride(-1) == 1 or t.shape[-1] <= 1)):
        return t
    return t.to(torch.float32).contiguous()


class Kernels:
    """The engine of one version on CUDA tensors."""

    def __init__(self, version: str, module: Any) -> None:
        self.version = version
        self.module = module
        self._plans: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def plan(self, direction: int, q: Tensor, k: Tensor, v: Tensor, spec: Spec,
             varlen: Varlen | None = None) -> tuple[Any, int]:  # fmt: skip
        """The problem as the module takes it, and its workspace in bytes; kept by shape."""
        lengths = None if varlen is None else (varlen.cu_seqlens_q.shape[0] - 1, *varlen[2:])
        key = (direction, q.dtype, q.shape, k.shape, v.shape, spec, lengths)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            problem = self._problem(q, k, v, spec, lengths)
            found = problem, self.module.plan(direction, problem)["workspace_bytes"]
            self._plans[key] = found
        return found

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, lengths: tuple[int, int, int] | None
    ) -> Any:
        p = self.module.Problem()
        p.dtype = CODES[q.dtype]
        if lengths is None:
            p.batch, p.seqlen_q, p.seqlen_k = q.shape[0], q.shape[1], k.shape[1]
            p.total_q, p.total_k = p.batch * p.seqlen_q, p.batch * p.seqlen_k
        else:
            p.batch, p.seqlen_q, p.seqlen_k = lengths
            p.total_q, p.total_k = q.shape[0], k.shape[0]
        p.heads_q, p.heads_kv = q.shape[-2], k.shape[-2]
        p.head_dim, p.head_dim_v = q.shape[-1], v.shape[-1]
        p.scale, p.softcap = spec.scale, spec.softcap
        p.window_left = -1 if spec.left is None else min(spec.left, 2**31 - 1)
        p.window_right = -1 if spec.right is None else min(spec.right, 2**31 - 1)
        p.top_left, p.deterministic = spec.top_left, spec.deterministic
        return p

    def check(self, status: int, direction: str, device: torch.device) -> None:
        if status:
            text = self.module.error_string(status)
            raise LaunchError(
                f"{self.version} {direction} on {device}: CUDA error {status} ({text})",
                argument="backend",
                given=self.version,
            )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        *,
        descale: Descale | None = None,
        varlen: Varlen | None = None,
        out: Tensor | None = None,
    ) -> Result:
        result = layout.new_result(q, v, out)
        if q.numel() == 0 or k.numel() == 0:
            return layout.fill_empty(result)
        problem, size = self.plan(FORWARD, q, k, v, spec, varlen)
        scales = descale or Descale()
        if scales.q is not None and scales.q.shape[2] != k.shape[-2]:
            hint = "query heads that share a K/V head share its scale, as quantize_fp8 gives it"
            expected = f"{k.shape[-2]}, one for each K/V head"
            raise unsupported("q_descale heads", scales.q.shape[2], expected, hint)
        device = q.device
        with torch.cuda.device(device):
            workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
            status = self.module.forward(
                problem, view(q), view(k), view(v), view(result.out), stats(result.lse),
                *_cu(varlen), _descale(scales.q, scales.block_q),
                _descale(scales.k, scales.block_kv), _descale(scales.v, scales.block_kv),
                0 if workspace is None else workspace.data_ptr(),
                stream(device.index),
            )  # fmt: skip
        self.check(status, "forward", device)
        return result

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: Spec,
        *,
        varlen: Varlen | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> Grads:
        grads = layout.new_grads(q, k, v, dq, dk, dv)
        if q.numel() == 0 or k.numel() == 0:
            for grad in grads:
                grad.zero_()
            return grads
        problem, size = self.plan(BACKWARD, q, k, v, spec, varlen)
        row_lse, row_dlse = _rows_contiguous(lse), _rows_contiguous(dlse)
        device = q.device
        with torch.cuda.device(device):
            workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
            status = self.module.backward(
                problem, view(q), view(k), view(v), view(out), view(dout),
                view(grads.dq), view(grads.dk), view(grads.dv), stats(row_lse),
                stats(row_dlse), *_cu(varlen),
                0 if workspace is None else workspace.data_ptr(),
                stream(device.index),
            )  # fmt: skip
        self.check(status, "backward", device)
        return grads
