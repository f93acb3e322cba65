"""Timing: rounds that meet everybody, medians, and bursts in which the GPU waited for the host."""

from __future__ import annotations

import pytest

from flash.study import timing
from flash.study.timing import Call, HostStopwatch, summary


def test_summary_of_rounds() -> None:
    found = summary([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], {"clock_mhz": 5})
    assert (found.median, found.rounds, found.calls) == (3.0, [2.0, 4.0], 6)
    assert found.as_dict()["clock_mhz"] == 5


def test_a_race_meets_everybody_in_every_round() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    found = HostStopwatch().race(calls, total_ms=0.01, rounds=3, warm_ms=0)
    assert found.keys() == {"a", "b"}
    order = "".join(dict.fromkeys(seen[:2])) + "".join(seen[2:])
    assert order.count("ab") >= 3


class Hurried(HostStopwatch):
    """Ahead of its GPU only where the queue is held up for 4 ms a call."""

    def burst(self, call: Call, repeats: int, lag: float = 0.0) -> list[float]:
        ahead = lag >= 0.004
        self.late, self.submitted = (0 if ahead else repeats), 0.001
        return [1.0 if ahead else 9.0] * repeats


def test_a_burst_that_timed_the_host_is_run_again() -> None:
    found = Hurried().race({"a": lambda: None}, total_ms=30, rounds=3, warm_ms=1)["a"]
    assert (found.median, found.rounds, found.late) == (1.0, [1.0, 1.0, 1.0], 0)
    assert "late_calls" not in found.as_dict()


def test_a_row_tells_how_many_calls_timed_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TRIES", 1)
    found = Hurried().race({"a": lambda: None}, total_ms=30, rounds=1, warm_ms=1)["a"]
    assert found.as_dict()["late_calls"] == found.calls > 0
