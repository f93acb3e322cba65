"""Every backend on the same inputs: time, error against fp64, memory and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flash.analysis import peak_bytes
from flash.attention import attention
from flash.capability import BACKENDS
from flash.checks import check_dtype, check_kind
from flash.dispatch import last_dispatch
from flash.engines.layout import FP8
from flash.errors import BackendUnavailableError, UnsupportedError, wrong_type, wrong_value
from flash.explain import explain
from flash.options import backend_name

_PLANNED = ("causal", "window", "scale", "softcap", "precision", "deterministic", "layout")


@dataclass(frozen=True)
class Measured:
    """One backend; what it cannot do is None, and `note` says why."""

    backend: str
    engine: str = ""
    milliseconds: float | None = None  # median
    max_error: float | None = None  # of the output, against fp64
    relative_error: float | None = None  # root of the summed squares, against fp64's
    lse_error: float | None = None
    memory_bytes: int | None = None  # allocated at the peak, inputs left out
    moved_bytes: int | None = None  # between kernel and memory, by its closed form
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`str()` is a table, `as_dict()` plain data."""

    device: str
    rows: tuple[Measured, ...]

    def __getitem__(self, backend: str) -> Measured:
        name = backend_name(backend)
        found = [row for row in self.rows if row.backend == name]
        if not found:
            there = ", ".join(row.backend for row in self.rows)
            raise wrong_value("backend", backend, f"one of those compared: {there}")
        return found[0]

    def as_dict(self) -> dict[str, Any]:
        return {"device": self.device, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ("backend", "engine", "ms", "max error", "rel. error", "lse error", "MB", "MB moved")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            errors = (row.max_error, row.relative_error, row.lse_error)
            megabytes = (row.memory_bytes, row.moved_bytes)
            lines.append((
                row.backend, row.engine, _text(row.milliseconds, ".3f"),
                *(_text(e, ".2e") for e in errors),
                *(_text(None if b is None else b / 1e6, ".3f") for b in megabytes),
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w)
                      for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        ]  # fmt: skip
        notes = [f"{row.backend}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*table, *notes])


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backends: Sequence[str] = BACKENDS,
    repeats: int = 5,
    **options: Any,
) -> Comparison:
    """Run `attention` with each backend; `options` are those of `attention`, without `backend`.

    A backend that cannot serve the call has its reasons in `note`. Times are medians of `repeats`
    calls after one that is not counted.
    """
    for name in ("backend", "out", "return_lse"):
        if name in options:
            raise wrong_value(name, options[name], "left out: compare sets it itself")
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise wrong_type("repeats", repeats, "an int")
    if repeats < 1:
        raise wrong_value("repeats", repeats, "at least 1")
    if isinstance(backends, str) or not isinstance(backends, Sequence):
        raise wrong_type("backends", backends, "a list of backend names")
    names = tuple(dict.fromkeys(backend_name(name) for name in backends))
    for argument, x in (("q", q), ("k", k), ("v", v)):
        check_kind(argument, x)
        check_dtype(argument, x)
        if x.device.type == "meta":
            hint = "flash.explain needs none"
            raise wrong_value(f"{argument}.device", "meta", "one whose tensors have values", hint)
    with torch.no_grad():
        exact = _exact(q, k, v, options)
        rows = tuple(_measure(name, (q, k, v), exact, options, repeats) for name in names)
    return Comparison(str(q.device), rows)


def _exact(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The fp64 answer for the inputs as they are stored."""
    plain = {name: value for name, value in options.items() if name != "precision"}
    if q.dtype == FP8:
        found: Any = attention(q, k, v, return_lse=True, backend="reference", **plain)
    else:
        wide = (x.double() for x in (q, k, v))
        found = attention(*wide, return_lse=True, backend="reference", **plain)
    return found[0].double(), found[1].double()


def _measure(
    name: str, qkv: tuple[Tensor, Tensor, Tensor], exact: tuple[Tensor, Tensor],
    options: dict[str, Any], repeats: int,
) -> Measured:  # fmt: skip
    def run() -> Any:
        return attention(*qkv, return_lse=True, backend=name, **options)

    try:
        out, lse = run()
    except (UnsupportedError, BackendUnavailableError) as error:
        why = error.reasons.get(name, ())
        return Measured(name, note="; ".join(why) or str(error).splitlines()[0])
    decision = last_dispatch()
    device = qkv[0].device
    difference = (out.double() - exact[0]).abs()
    norm = torch.linalg.vector_norm(exact[0])
    relative = float(torch.linalg.vector_norm(difference) / norm) if float(norm) else 0.0
    visible = exact[1] > -torch.inf
    lse_error = (lse.double() - exact[1]).abs()[visible]
    planned = {key: options[key] for key in _PLANNED if key in options}
    estimates = explain(*qkv, backend=name, **planned).estimates
    return Measured(
        name,
        decision.engine if decision else "",
        _milliseconds(run, device, repeats),
        float(difference.max()) if difference.numel() else 0.0,
        relative,
        float(lse_error.max()) if lse_error.numel() else 0.0,
        _memory(run, device),
        next(e.bytes for e in estimates if e.backend == name),
    )


def _milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        return peak_bytes(run)
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before
