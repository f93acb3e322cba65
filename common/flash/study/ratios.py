"""Two result files held against each other: ratios with intervals, and who wins where."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flash.study.cases import KEY, SHORT, of_row
from flash.study.files import device_name
from flash.study.measure import describe

Row = dict[str, Any]
OURS = ("v1", "v2", "v3")
# Student's t at 97.5 % for 1, 2, 3 ... degrees of freedom; the normal value beyond.
T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
NORMAL = 1.960
P10_TO_P90 = 2.563  # standard deviations between the two in a normal distribution


@dataclass(frozen=True)
class Ratio:
    """Time before over time after of one row: above 1 is faster. 95 % interval."""

    case: str
    competitor: str
    before: Row
    after: Row
    ratio: float
    low: float
    high: float

    @property
    def modelled(self) -> bool:
        return bool(self.before.get("modelled") or self.after.get("modelled"))

    def verdict(self, threshold: float) -> str:
        """A change counts when the interval leaves out 1 and the ratio leaves the threshold."""
        if self.modelled:
            return "modelled"
        if self.high < 1 and self.ratio < 1 - threshold:
            return "slower"
        return "faster" if self.low > 1 and self.ratio > 1 + threshold else "same"


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, str]  # devices
    ratios: tuple[Ratio, ...]  # regressions first, then the rest, worst first
    threshold: float
    only: tuple[int, int]  # rows that the other file lacks
    winners: tuple[tuple[str, str, str, str], ...]  # device, group, winner, by how much

    @property
    def regressions(self) -> list[Ratio]:
        return [r for r in self.ratios if r.verdict(self.threshold) == "slower"]

    def as_dict(self) -> Row:
        rows = [{"case": r.case, "competitor": r.competitor, "ms_before": r.before["ms"],
                 "ms_after": r.after["ms"], "ratio": r.ratio, "low": r.low, "high": r.high,
                 "verdict": r.verdict(self.threshold)} for r in self.ratios]  # fmt: skip
        winners = [dict(zip(("device", "group", "winner", "margin"), w, strict=True))
                   for w in self.winners]  # fmt: skip
        return {"devices": self.names, "threshold": self.threshold, "only": self.only,
                "regressions": len(self.regressions), "rows": rows, "winners": winners}  # fmt: skip

    def lines(self) -> list[tuple[str, ...]]:
        return [
            (r.verdict(self.threshold), r.case, r.competitor, figure(r.before), figure(r.after),
             f"{r.ratio:.3f}", f"{r.low:.3f} to {r.high:.3f}")
            for r in self.ratios
        ]  # fmt: skip

    def summary(self) -> str:
        kinds = [r.verdict(self.threshold) for r in self.ratios]
        counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        measured = [r.ratio for r in self.ratios if not r.modelled]
        mean = f"; geometric mean of the ratios {geomean(measured):.3f}" if measured else ""
        bound = "" if "modelled" not in kinds else " (a bound that no kernel there exceeds)"
        left = f"; {self.only[0]} and {self.only[1]} rows have no partner" if any(self.only) else ""
        return f"{counted or 'no row in common'}{bound}{mean}{left}"

    def markdown(self) -> str:
        head = ("", "case", "backend", self.names[0], self.names[1], "ratio", "95 %")
        marks = {"slower": "🔴 slower", "faster": "🟢 faster", "same": "", "modelled": "modelled"}
        rows = [(marks[line[0]], *line[1:]) for line in self.lines()]
        parts = [f"**{self.summary()}** (ratio: time before / time after)", "", table(head, rows)]
        if self.winners:
            parts += ["", table(("device", "cases", "fastest generation", "ahead by"),
                                self.winners)]  # fmt: skip
        return "\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(row: Row) -> str:
    mark = " (modelled)" if row.get("modelled") else ""
    return f"{row['tflops']:.4g} TFLOP/s{mark}"


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else 1.0


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def spread(row: Row) -> tuple[float, int]:
    """Variance of the mean of log time, and its degrees of freedom.

    Rounds are used where a row has them: calls of one round share a clock and are no independent
    samples.
    """
    rounds = [math.log(ms) for ms in row.get("ms_rounds", ()) if ms > 0]
    if len(rounds) > 1:
        return statistics.variance(rounds) / len(rounds), len(rounds) - 1
    if row.get("ms_p10") and row.get("ms_p90"):
        deviation = math.log(row["ms_p90"] / row["ms_p10"]) / P10_TO_P90
        return deviation**2, 1  # of one round: nothing is known about others
    return 0.0, 0


def ratio(before: Row, after: Row) -> tuple[float, float, float]:
    """Ratio of times and its 95 % interval, by Welch's t on logarithms."""
    (va, na), (vb, nb) = spread(before), spread(after)
    center = before["ms"] / after["ms"]
    total = va + vb
    if total == 0:
        return center, center, center
    weights = (v**2 / n for v, n in ((va, na), (vb, nb)) if n)
    freedom = max(1, int(total**2 / max(sum(weights), 1e-300)))
    t = T975[freedom - 1] if freedom <= len(T975) else NORMAL
    margin = math.exp(t * math.sqrt(total))
    return center, center / margin, center * margin


def compare(first: Row, second: Row, threshold: float) -> Comparison:
    """`first` is before, `second` after; rows are matched by case and backend."""
    before, after = ({key(r): r for r in content["rows"]} for content in (first, second))
    found = []
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        case = describe(of_row(a))
        found.append(Ratio(case, a["competitor"], a, b, *ratio(a, b)))
    order = {"slower": 0, "same": 2, "faster": 1, "modelled": 3}
    found.sort(key=lambda r: (order[r.verdict(threshold)], r.ratio, r.case, r.competitor))
    devices = (device_name(first), device_name(second))
    if devices[0] == devices[1]:
        devices = ("before", "after")
    wins = [*winners(devices[0], first["rows"]), *winners(devices[1], second["rows"])]
    only = (len(before.keys() - after.keys()), len(after.keys() - before.keys()))
    return Comparison(devices, tuple(found), threshold, only, tuple(wins))


def winners(device: str, rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Which generation is fastest on this device, by direction, head dim, mask and dtype."""
    groups: dict[str, dict[tuple[Any, ...], dict[str, Row]]] = {}
    for row in rows:
        if row["competitor"] in OURS and row.get("ran", "kernel") == "kernel":
            dtype = "" if row["dtype"] == "bfloat16" else f", {SHORT[row['dtype']]}"
            name = f"{row['direction']} d{row['head_dim']} {row['mask']}{dtype}"
            case = key({**row, "competitor": ""})
            groups.setdefault(name, {}).setdefault(case, {})[row["competitor"]] = row
    found = []
    for name, cases in groups.items():
        shared = {v for v in OURS if all(v in case for case in cases.values())}
        means = {v: geomean(case[v]["tflops"] for case in cases.values()) for v in shared}
        if len(means) < 2:
            continue
        best, second = sorted(means, key=lambda v: -means[v])[:2]
        margin = f"{means[best] / means[second]:.2f} times {second}"
        found.append((device, name, best, margin))
    return found
