"""Times competitors side by side on one GPU: events, a flushed L2, interleaved rounds.

A median of short rounds is a burst figure; `sustained` runs one call until the clock settles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]


class Board:
    """Clock and power of the GPU, through NVML where nvidia-ml-py is installed."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception as error:
            self.missing = f"{type(error).__name__}: {error}"

    def now(self) -> dict[str, float]:
        """{"clock_mhz", "power_w"}, or nothing."""
        if self._nvml is None:
            return {}
        clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        power = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        return {"clock_mhz": clock, "power_w": round(power, 1)}

    def facts(self) -> dict[str, Any]:
        if self._nvml is None:
            return {"nvml": self.missing}
        limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000
        top = self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return {"driver": driver, "power_limit_w": limit, "max_clock_mhz": top}


@dataclass
class Timing:
    """Milliseconds of one competitor."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    calls: int
    board: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        spread = {"ms": self.median, "ms_p20": self.low, "ms_p80": self.high}
        rounded = {name: float(f"{value:.5g}") for name, value in spread.items()}
        return {**rounded, "calls": self.calls, **self.board}


class Stopwatch:
    """Event-timed calls, each after a write that empties L2 (and lets the host run ahead)."""

    def __init__(self, board: Board) -> None:
        self.board = board
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda")

    def burst(self, call: Call, repeats: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(repeats)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self.last = self.board.now()  # asked while the queue is still full
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def estimate(self, call: Call, warm_ms: float) -> float:
        """Warms up for `warm_ms` and returns the milliseconds of a call."""
        call()
        torch.cuda.synchronize()
        spent, best = 0.0, float("inf")
        while spent < warm_ms:
            times = self.burst(call, 3)
            spent, best = spent + sum(times), min(best, *times)
        return best

    def race(self, calls: Mapping[str, Call], total_ms: float = 60, rounds: int = 3,
             warm_ms: float = 15) -> dict[str, Timing]:  # fmt: skip
        """Every competitor in every round, so that drift of the clock meets all of them."""
        repeats = {}
        for name, call in calls.items():
            each = self.estimate(call, warm_ms)
            repeats[name] = int(min(400, max(4, total_ms / rounds / max(each, 1e-3))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        boards: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name] += self.burst(call, repeats[name])
                boards[name] = self.last
        return {name: _summary(times[name], boards[name]) for name in calls}

    def sustained(self, call: Call, seconds: float = 2.0) -> dict[str, float]:
        """Milliseconds, clock, watts and joules of a call when the GPU is kept busy."""
        each = max(self.estimate(call, 15), 1e-3)
        chunk = max(1, int(100 / each))
        begin, calls, seen = time.perf_counter(), 0, []
        while time.perf_counter() - begin < seconds:
            for _ in range(chunk):
                call()
            calls += chunk
            seen.append(self.board.now())
            torch.cuda.synchronize()
        ms = (time.perf_counter() - begin) * 1e3 / calls
        late = [b for b in seen[len(seen) // 2 :] if b]
        means = {k: statistics.mean(b[k] for b in late) for k in (late[0] if late else {})}
        joules = {"joules": means["power_w"] * ms / 1e3} if means else {}
        return {"ms": ms, **means, **joules}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _summary(times: list[float], board: dict[str, float]) -> Timing:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
    return Timing(statistics.median(ordered), low, high, len(ordered), board)
