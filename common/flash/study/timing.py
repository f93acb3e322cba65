"""Times competitors side by side: interleaved rounds, on a GPU by events and with L2 flushed.

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
ROUNDS = 5
MAX_CALLS = 400  # of one competitor in one round
TRIES = 4  # of a burst in which the GPU had to wait for the host
LONGEST_HOLD = 0.2  # seconds
CLOCKS = 2e9  # of a GPU in a second, about


class Board:
    """Clock and power of the GPU, through NVML where nvidia-ml-py is installed."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self.missing = ""
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
    """Milliseconds of one competitor; `rounds` are the medians that show how steady it was."""

    median: float
    p10: float
    p90: float
    rounds: list[float]
    calls: int
    board: dict[str, float]
    late: int = 0  # calls that the GPU waited for, so that their time is the host's, too

    def as_dict(self) -> dict[str, Any]:
        figures = {"ms": self.median, "ms_p10": self.p10, "ms_p90": self.p90}
        rounded = {name: _short(value) for name, value in figures.items()}
        rounds = [_short(value) for value in self.rounds]
        late = {"late_calls": self.late} if self.late else {}
        return {**rounded, "ms_rounds": rounds, "calls": self.calls, **late, **self.board}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


class Stopwatch:
    """Event-timed calls, each after a write that empties L2."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.last: dict[str, float] = {}
        self.submitted = 0.0  # host seconds of a call in the last burst
        self.late = 0  # calls of the last burst that the GPU waited for
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda")

    def burst(self, call: Call, repeats: int, lag: float = 0.0) -> list[float]:
        """Where the host lags behind by `lag` seconds a call, the queue is held up until it is
        ahead; else a short call would time the host.
        """
        pairs = [(_event(), _event()) for _ in range(repeats)]
        if lag > 0:
            torch.cuda._sleep(int(CLOCKS * min(LONGEST_HOLD, lag * repeats)))
        self.late, begin = 0, time.perf_counter()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            self.late += start.query()  # the GPU was there before all of the call was
            end.record()
        self.submitted = (time.perf_counter() - begin) / repeats
        self.last = self.board.now()  # asked while the queue is still full
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def estimate(self, call: Call, warm_ms: float) -> tuple[float, float]:
        """Warms up for `warm_ms`; milliseconds of a call, and seconds that the host lags behind."""
        call()
        self._wait()
        spent, best, host = 0.0, float("inf"), float("inf")
        while spent < warm_ms:
            times = self.burst(call, 3 if spent else 1)
            host = min(host, self.submitted)
            spent, best = spent + sum(times), min(best, *times)
        return best, host - best / 1e3

    def _wait(self) -> None:
        torch.cuda.synchronize()

    def race(self, calls: Mapping[str, Call], total_ms: float = 60, rounds: int = ROUNDS,
             warm_ms: float = 15) -> dict[str, Timing]:  # fmt: skip
        """Every competitor in every round, so that drift of the clock meets all of them."""
        repeats, lag = {}, {}
        for name, call in calls.items():
            each, lag[name] = self.estimate(call, warm_ms)
            least = 3 if each < total_ms else 1
            fit = int(total_ms / rounds / max(each, 1e-3))
            repeats[name] = min(MAX_CALLS, max(least, fit))
        times: dict[str, list[list[float]]] = {name: [] for name in calls}
        late = dict.fromkeys(calls, 0)
        boards: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for name, call in calls.items():
                found, lag[name] = self.ahead(call, repeats[name], lag[name])
                times[name].append(found)
                late[name] += self.late
                boards[name] = self.last
        return {name: summary(times[name], boards[name], late[name]) for name in calls}

    def ahead(self, call: Call, repeats: int, lag: float) -> tuple[list[float], float]:
        """A burst in which the host is ahead all the time, and the lag that it took: where the
        GPU had to wait, another one with the queue held up for longer.
        """
        for _ in range(TRIES):
            times = self.burst(call, repeats, lag)
            if not self.late:
                break
            lag = max(2 * lag, self.submitted)
        return times, lag

    def sustained(self, call: Call, seconds: float = 2.0) -> dict[str, float]:
        """Milliseconds, clock, watts and joules of a call when the device is kept busy."""
        each = max(self.estimate(call, 15)[0], 1e-3)
        chunk = max(1, int(100 / each))
        begin, calls, seen = time.perf_counter(), 0, []
        while time.perf_counter() - begin < seconds:
            for _ in range(chunk):
                call()
            calls += chunk
            seen.append(self.board.now())
            self._wait()
        ms = (time.perf_counter() - begin) * 1e3 / calls
        late = [b for b in seen[len(seen) // 2 :] if b]
        means = {k: statistics.mean(b[k] for b in late) for k in (late[0] if late else {})}
        joules = {"joules": means["power_w"] * ms / 1e3} if means else {}
        return {"ms": ms, **means, **joules}


class HostStopwatch(Stopwatch):
    """The same on a CPU, by the clock on the wall."""

    def __init__(self) -> None:
        self.board = Board.__new__(Board)
        self.board._nvml, self.board.missing = None, "no GPU"
        self.last, self.submitted, self.late = {}, 0.0, 0

    def burst(self, call: Call, repeats: int, lag: float = 0.0) -> list[float]:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def _wait(self) -> None:
        pass


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def summary(rounds: list[list[float]], board: dict[str, float], late: int = 0) -> Timing:
    ordered = sorted(ms for times in rounds for ms in times)
    tenth = len(ordered) // 10
    low, high = ordered[tenth], ordered[len(ordered) - 1 - tenth]
    medians = [statistics.median(times) for times in rounds]
    return Timing(statistics.median(ordered), low, high, medians, len(ordered), board, late)
