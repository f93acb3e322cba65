"""What a call would do: which backend and why not the others, tile, grid, memory, FLOPs, bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flash import analysis, tiles
from flash.capability import (
    BACKENDS,
    DTYPES,
    VERSIONS,
    Arch,
    arch_name,
    arch_of,
    capability,
    parse_arch,
)
from flash.checks import check_inputs
from flash.dispatch import Built, Decision, built_here, decide, engine_kind
from flash.execute import request_of
from flash.flops import backward_flops, forward_flops
from flash.hardware import Gpu, gpu
from flash.options import LAYOUTS, backend_name, check_precision, choice, make_spec, refuse_unknown
from flash.spec import Spec

_NAMES = ("q", "k", "v", "causal", "window", "scale", "softcap", "precision", "deterministic",
          "layout", "backend", "arch", "direction")  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Estimate:
    """How one backend would run the call; the figures of a tile are None where it has none."""

    backend: str
    engine: str
    runs: bool
    reasons: tuple[str, ...]
    flops: int
    bytes: int  # that the schedule asks for; L2 answers what is asked for again
    least_bytes: int  # every tensor once: what memory gives at least
    intensity: float  # FLOPs per byte from memory, at most
    block_q: int | None = None
    block_kv: int | None = None
    stages: int | None = None
    threads: int | None = None
    grid: int | None = None
    shared_bytes: int | None = None
    workspace_bytes: int | None = None
    tile_from: str = ""  # "module": the kernel itself, "table": the capability table
    ridge: float | None = None
    bound: str = ""  # "arithmetic" or "memory"
    milliseconds: float | None = None  # at datasheet rates: no kernel can be faster

    def line(self) -> str:
        mark = "->" if self.runs else "  "
        text = f"{mark} {self.backend} ({self.engine})"
        text += f": {'; '.join(self.reasons)}" if self.reasons else ": serves this call"
        if self.block_q is not None and self.shared_bytes is not None:
            text += (
                f"\n     tile {self.block_q} x {self.block_kv}, {self.stages} stages, "
                f"{self.threads} threads, grid {self.grid}, shared {self.shared_bytes / 1024:.1f} "
                f"KiB (from the {self.tile_from})"
            )
        asked = f"asks for {self.bytes / 1e6:.1f} MB, " if self.bytes != self.least_bytes else ""
        text += (
            f"\n     {self.flops / 1e9:.3f} GFLOP, {asked}each tensor once "
            f"{self.least_bytes / 1e6:.1f} MB: {self.intensity:.1f} FLOP/B"
        )
        if self.ridge is not None and self.milliseconds is not None:
            text += (
                f" against a ridge of {self.ridge:.0f}: bound by {self.bound}, "
                f"at least {self.milliseconds:.4f} ms"
            )
        return text


@dataclass(frozen=True)
class Explanation:
    """`str()` reads well, `as_dict()` is plain data."""

    decision: Decision
    gpu: str
    shape: Mapping[str, Any]
    estimates: tuple[Estimate, ...]

    @property
    def backend(self) -> str | None:
        return self.decision.backend

    @property
    def reasons(self) -> Mapping[str, tuple[str, ...]]:
        return self.decision.reasons

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.shape.items())
        where = arch_name(self.decision.arch) + (f" ({self.gpu})" if self.gpu else "")
        direction = self.decision.request.direction
        head = f"{direction} on {where}: {self.backend or 'nothing serves it'}"
        return "\n".join([head, sizes, *(e.line() for e in self.estimates)])

    def as_dict(self) -> dict[str, Any]:
        return {
            "decision": self.decision.as_dict(),
            "gpu": self.gpu,
            "shape": dict(self.shape),
            "estimates": [asdict(e) for e in self.estimates],
        }


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    precision: str | None = None,
    deterministic: bool = False,
    layout: str = "bshd",
    backend: str = "auto",
    arch: str | None = None,
    direction: str = "forward",
    **unknown: Any,
) -> Explanation:
    """What `attention` would do with these arguments; nothing runs.

    Args:
        arch: explain for this GPU ("sm_80", "9.0", "cpu") instead of the tensors' device, as if
            every version were built. Tensors may be on the meta device then.
        direction: "forward" or "backward".
    """
    refuse_unknown("explain", unknown, _NAMES)
    choice("layout", layout, LAYOUTS)
    choice("direction", direction, ("forward", "backward"))
    name = backend_name(backend)
    check_inputs(q, k, v, layout)
    spec = make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    fp8 = check_precision(precision, q.dtype, _HALF)
    if layout == "bhsd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    where: Arch = arch_of(q.device) if arch is None else _parse(arch)
    built: Mapping[str, Built] = {}
    if arch is None and not isinstance(where, str):
        built = built_here(q.device.index or 0)
    request = request_of(q, k, v, spec, name, fp8=fp8, direction=direction)
    decision = decide(where, request, built)
    unit = gpu(where)
    real = arch is None and q.device.type == "cuda"
    rows = tuple(_estimate(n, decision, (q, k, v), spec, unit, real) for n in BACKENDS)
    sizes = _sizes(q, k, v, request.dtype)
    shown = torch.cuda.get_device_name(q.device) if real else unit.name if unit else ""
    return Explanation(decision, shown, sizes, rows)


def _sizes(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "batch": q.shape[0], "seqlen_q": q.shape[1], "seqlen_k": k.shape[1],
        "heads_q": q.shape[2], "heads_kv": k.shape[2], "head_dim": q.shape[3],
        "head_dim_v": v.shape[3], "dtype": DTYPES[dtype],
    }  # fmt: skip


def _parse(arch: Any) -> Arch:
    if not isinstance(arch, str):
        from flash.errors import wrong_type

        raise wrong_type("arch", arch, 'a string such as "sm_80"')
    return parse_arch(arch)


def _estimate(
    name: str, decision: Decision, qkv: tuple[Tensor, Tensor, Tensor], spec: Spec,
    unit: Gpu | None, real: bool,
) -> Estimate:  # fmt: skip
    q, k, v = qkv
    request = decision.request
    forward = request.direction == "forward"
    flops = forward_flops(
        spec, q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    )
    flops = flops if forward else backward_flops(flops)
    tile = _tile(name, decision, qkv, spec, unit, real)
    least = _least_bytes(decision, qkv)
    nbytes = _bytes(name, decision, qkv, spec, tile) or least
    intensity = flops / least if least else 0.0
    bound: dict[str, Any] = {}
    if unit is not None:
        dtype = DTYPES[request.dtype]
        ridge = unit.ridge(dtype)
        seconds = max(flops / unit.flops(dtype), least / unit.bandwidth)
        kind = "arithmetic" if intensity >= ridge else "memory"
        bound = {"ridge": ridge, "bound": kind, "milliseconds": 1e3 * seconds}
    kind = engine_kind(name, decision.arch)
    reasons = tuple(decision.reasons.get(name, ()))
    runs = name == decision.backend
    return Estimate(name, kind, runs, reasons, flops, nbytes, least, intensity, **tile, **bound)


def _tile(
    name: str, decision: Decision, qkv: tuple[Tensor, Tensor, Tensor], spec: Spec,
    unit: Gpu | None, real: bool,
) -> dict[str, Any]:  # fmt: skip
    """From the module on its own GPU, else from the table."""
    q, k, v = qkv
    request = decision.request
    if name not in VERSIONS:
        return {}
    if real and q.dtype == request.dtype and not _absent(decision, name):
        from flash.engines import kernels

        runner = kernels.engine(name)
        problem, _ = runner.plan(request.direction == "backward", q, k, v, spec)
        plan = runner.module.plan(int(request.direction == "backward"), problem)
        if plan["block_q"]:
            return {**plan, "tile_from": "module"}
    batch, length, heads, _ = q.shape
    fp8 = request.dtype == torch.float8_e4m3fn
    found = capability(name).tile(
        request.direction, q.shape[3], v.shape[3], length, batch * heads * length,
        full=spec.left is None and spec.right is None, fp8=fp8,
    )  # fmt: skip
    if found is None:
        return {}
    itemsize = 1 if fp8 else q.element_size()
    rows, keys = found.block_q * q.shape[3], found.block_kv * (q.shape[3] + v.shape[3])
    split = q.shape[1] if request.direction == "forward" else k.shape[1]
    block = found.block_q if request.direction == "forward" else found.block_kv
    grid = -(-split // block) * q.shape[0] * q.shape[2]
    if unit is not None and name != "v2_parallel":
        grid = min(grid, unit.processors)  # persistent: CTAs take tiles in turn
    shown = asdict(found)
    blocks = 1 if shown.pop("whole") else found.stages
    return {
        **shown, "grid": grid, "workspace_bytes": None, "tile_from": "table",
        "shared_bytes": (rows + blocks * keys) * itemsize,
    }  # fmt: skip


def _absent(decision: Decision, name: str) -> bool:
    why = decision.reasons.get(name, ("",))
    return name != decision.backend and "could serve" not in why[0]


def _bytes(
    name: str, decision: Decision, qkv: tuple[Tensor, Tensor, Tensor], spec: Spec,
    tile: dict[str, Any],
) -> int:  # fmt: skip
    """The generation's closed form; 0 where there is none."""
    q, k, v = qkv
    if not (tile and q.numel() and k.numel()):
        return 0
    itemsize, out = _item_sizes(decision, q)
    shape = analysis.Shape(
        q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3],
        itemsize, out,
    )  # fmt: skip
    size = tiles.Tile(tile["block_q"], tile["block_kv"])
    return sum(analysis.hbm_bytes(name, decision.request.direction, shape, spec, size).values())


def _item_sizes(decision: Decision, q: Tensor) -> tuple[int, int]:
    """Bytes of an input's element, and of a result's."""
    itemsize = 1 if decision.request.dtype == torch.float8_e4m3fn else q.element_size()
    return itemsize, max(itemsize, 2)


def _least_bytes(decision: Decision, qkv: tuple[Tensor, Tensor, Tensor]) -> int:
    q, k, v = qkv
    itemsize, out = _item_sizes(decision, q)
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    inputs = (q.numel() + k.numel() + v.numel()) * itemsize
    result, stats = rows * v.shape[3] * out, rows * 4
    if decision.request.direction == "forward":
        return inputs + result + stats
    return 2 * inputs + 2 * result + stats
