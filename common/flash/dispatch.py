"""Which backend serves a request: a pure function of GPU, request and what is built."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from flash.capability import (
    BACKENDS,
    DTYPES,
    VERSIONS,
    Arch,
    Capability,
    Row,
    arch_name,
    arch_of,
    capability,
)
from flash.errors import (
    BackendUnavailableError,
    FlashError,
    UnsupportedError,
    describe_reasons,
)


class Request(NamedTuple):
    """What matters for the choice of a backend."""

    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    direction: str = "forward"  # or "backward"
    backend: str = "auto"
    features: tuple[str, ...] = ()  # of capability.Capability.features, beyond the plain call
    alignment: int = 16  # bytes that all pointers and strides are multiples of, at most 16


class Built(NamedTuple):
    """What this machine has of one version."""

    reason: str = ""  # not empty: cannot run here, and why
    instances: frozenset[tuple[str, str, int, int]] | None = None  # None: all of the table
    too_large: frozenset[tuple[str, str, int, int]] = frozenset()  # for this GPU


@dataclass(frozen=True)
class Decision:
    """The outcome: which backend, and every reason against every other."""

    request: Request
    arch: Arch
    backend: str | None  # None: nothing serves the request
    engine: str = ""  # "kernels", "schedule", "sdpa" or "reference"
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    backward: Decision | None = None  # what will run the gradient, if one is wanted

    def __str__(self) -> str:
        request = self.request
        what = f"{DTYPES.get(request.dtype, request.dtype)}, head dim {request.head_dim}"
        if request.head_dim_v != request.head_dim:
            what += f" and {request.head_dim_v}"
        what += "".join(f", {feature}" for feature in request.features)
        where = arch_name(self.arch)
        head = f"{request.direction} ({what}) on {where}: {self.backend or 'nothing'}"
        lines = [head + (f", {self.engine}" if self.engine else "")]
        if self.reasons:
            lines.append(describe_reasons(self.reasons))
        if self.backward is not None:
            lines.append(str(self.backward))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        request = {**self.request._asdict(), "dtype": DTYPES[self.request.dtype]}
        return {
            "request": request,
            "arch": arch_name(self.arch),
            "backend": self.backend,
            "engine": self.engine,
            "reasons": {name: list(why) for name, why in self.reasons.items()},
            "backward": None if self.backward is None else self.backward.as_dict(),
        }


def _dims_text(dims: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(str(d) if d == dv else f"{d}/{dv}" for d, dv in dims)


def _fits(dims: tuple[tuple[int, int], ...], request: Request, exact: bool) -> bool:
    if exact:
        return (request.head_dim, request.head_dim_v) in dims
    return any(request.head_dim <= d and request.head_dim_v <= dv for d, dv in dims)


def _row_reasons(table: Capability, arch: Arch, request: Request) -> list[str]:
    """Compute capability, dtype and head dims against the rows of the table."""
    dtype = DTYPES[request.dtype]
    here: list[Row] = list(table.rows)
    if not isinstance(arch, str):
        here = [row for row in table.rows if row.covers(arch)]
        if not here:
            needs = " or ".join(dict.fromkeys(row.where() for row in table.rows))
            return [f"needs compute capability {needs}, this is {arch[0]}.{arch[1]}"]
    typed = [row for row in here if dtype in row.dtypes]
    if not typed:
        served = dict.fromkeys(name for row in here for name in row.dtypes)
        return [f"serves {', '.join(served)}, not {dtype}, on {arch_name(arch)}"]
    dims = tuple(pair for row in typed for pair in row.dims(request.direction))
    if not dims:
        return [f"has no {request.direction} pass in {dtype}"]
    exact = dtype in table.exact_head_dims
    if not _fits(dims, request, exact):
        asked = _dims_text(((request.head_dim, request.head_dim_v),))
        bound = "head dims" if exact else "head dims up to"
        return [f"{request.direction} {bound} {_dims_text(dims)} in {dtype}, not {asked}"]
    return []


def _build_reasons(built: Built, request: Request) -> list[str]:
    if built.reason:
        return [built.reason]
    if built.instances is None:
        return []
    dtype = DTYPES[request.dtype]

    def listed(rows: frozenset[tuple[str, str, int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(
            sorted((d, dv) for way, kind, d, dv in rows
                   if way == request.direction and kind == dtype)
        )  # fmt: skip

    dims = listed(built.instances)
    if _fits(dims, request, exact=False):
        return []
    if _fits(listed(built.too_large), request, exact=False):
        what = f"a {request.direction} tile of head dim {request.head_dim}"
        return [f"this GPU has too little shared memory for {what}"]
    have = f"only head dims {_dims_text(dims)}" if dims else "no kernel"
    return [f"the build here has {have} for {request.direction} in {dtype}"]


def reasons_against(
    name: str, arch: Arch, request: Request, built: Mapping[str, Built]
) -> tuple[str, ...]:
    """Why this backend cannot serve the request; empty when it can."""
    table = capability(name)
    why = _row_reasons(table, arch, request)
    why += [f"has no {f}" for f in request.features if f not in table.features]
    if name in VERSIONS and not isinstance(arch, str):
        if request.alignment % table.alignment:
            why.append(f"needs pointers and strides that are multiples of {table.alignment} bytes")
        why += _build_reasons(built.get(name, Built()), request)
    return tuple(why)


def engine_kind(name: str, arch: Arch) -> str:
    if name in VERSIONS:
        return "schedule" if isinstance(arch, str) else "kernels"
    return "sdpa" if name == "torch" else "reference"


def decide(arch: Arch, request: Request, built: Mapping[str, Built]) -> Decision:
    """The newest generation that serves the request, else an older one, else torch.

    On a CPU `auto` is torch: schedules are for study and must be named. `reference` must be named.
    """
    against: dict[str, tuple[str, ...]] = {}
    chosen: str | None = None
    for name in BACKENDS:
        why = reasons_against(name, arch, request, built)
        if not why and chosen is None and request.backend in ("auto", name):
            study = name == "reference" or (name in VERSIONS and isinstance(arch, str))
            if request.backend == name or not study:
                chosen = name
                continue
        against[name] = why or (_not_needed(name, arch, request, chosen),)
    kind = engine_kind(chosen, arch) if chosen else ""
    return Decision(request, arch, chosen, kind, against)


def _not_needed(name: str, arch: Arch, request: Request, chosen: str | None) -> str:
    if request.backend != "auto":
        return f"could serve it, but backend={request.backend!r} was asked for"
    if name == "reference":
        return "exact and slow; runs when named"
    if name in VERSIONS and isinstance(arch, str):
        return "its schedule runs on this device, for study; runs when named"
    return f"could serve it; {chosen} comes first"


@lru_cache(maxsize=64)
def built_here(device: int) -> Mapping[str, Built]:
    """What this machine has of each version, for one CUDA device; modules are loaded once."""
    from flash.engines import kernels

    ways, names = ("forward", "backward"), {c: DTYPES[t] for t, c in kernels.CODES.items()}
    found = {}
    for version in VERSIONS:
        loaded = kernels.load(version)
        if loaded.module is None:
            found[version] = Built(loaded.reason)
            continue
        rows = kernels.instances(version)
        refusal = kernels.probe(version, device)
        reason = f"its module cannot run on this device: {refusal}" if refusal else ""
        large = frozenset() if reason else kernels.too_large(version, device)
        sets = [
            frozenset((ways[w], names[c], d, dv) for w, c, d, dv in kept)
            for kept in (rows - large, large)
        ]
        found[version] = Built(reason, *sets)
    return found


def no_backend(decision: Decision) -> FlashError:
    """The error of a request that nothing serves, with all reasons."""
    request = decision.request
    asked = "no backend" if request.backend == "auto" else f"backend {request.backend!r} cannot"
    verb = " serves" if request.backend == "auto" else " serve"
    what = f"this {request.direction} ({DTYPES[request.dtype]}, head dim {request.head_dim}"
    what += f"/{request.head_dim_v}) on {arch_name(decision.arch)}"
    able = [n for n, why in decision.reasons.items() if "could serve" in why[0]]
    advice = f"use backend={able[0]!r} or 'auto'" if able else "change dtype or head dim"
    text = f"{asked}{verb} {what}; {advice}:\n{describe_reasons(decision.reasons)}"
    machine = (
        "needs compute capability", "its kernels", "its module", "the build", "flash.", "this GPU",
    )  # fmt: skip
    named = decision.reasons.get(request.backend, ())
    absent = named and all(why.startswith(machine) for why in named)
    kind: type[FlashError] = BackendUnavailableError if absent else UnsupportedError
    return kind(text, argument="backend", given=request.backend, reasons=decision.reasons)


def resolve(request: Request, device: torch.device, backward: Request | None = None) -> Decision:
    """The decision for tensors on this device; raises when nothing serves the request.

    With `backward`, the backend of the gradient is settled as well, before anything runs.
    """
    if device.index is None and device.type == "cuda":  # another one at another time
        device = torch.device("cuda", torch.cuda.current_device())
    return _resolve(request, device, backward)


@lru_cache(maxsize=4096)
def _resolve(request: Request, device: torch.device, backward: Request | None) -> Decision:
    arch = arch_of(device)
    built = {} if isinstance(arch, str) else built_here(device.index)
    decision = decide(arch, request, built)
    if decision.backend is None:
        raise no_backend(decision)
    if backward is not None:
        decision = replace(decision, backward=_resolve(backward, device, None))
    return decision


def engine(decision: Decision) -> Any:
    """The object with forward and backward that runs this decision."""
    from flash.engines import kernels, reference, schedules, torch_sdpa

    if decision.engine == "kernels":
        return kernels.engine(str(decision.backend))
    if decision.engine == "schedule":
        return schedules.Schedule(str(decision.backend))
    return torch_sdpa if decision.engine == "sdpa" else reference


_state = threading.local()


def record(decision: Decision) -> None:
    _state.last = decision


def last_dispatch() -> Decision | None:
    """What served the last call of this thread, and why not the others; None before the first."""
    return getattr(_state, "last", None)
