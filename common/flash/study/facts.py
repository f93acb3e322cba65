"""Figures that both pictures and tables state; needs no matplotlib."""

from __future__ import annotations

from collections.abc import Iterable

from flash.study.sources import Row


def picojoules(row: Row) -> float:
    """Of one counted FLOP, from a row of sustained load."""
    return float(row["joules"] / (row["tflops"] * 1e12 * row["ms"] / 1e3) * 1e12)


def apart(rows: list[Row]) -> float:
    """Largest relative distance of loss curves from the first one, at any step."""
    base = rows[0]["losses"]
    return max(abs(x - y) / y for r in rows for x, y in zip(r["losses"], base, strict=True))


def by_case(rows: Iterable[Row]) -> dict[tuple[int, str, int], dict[str, float]]:
    """(d, mask, S) -> TFLOP/s of each competitor."""
    found: dict[tuple[int, str, int], dict[str, float]] = {}
    for row in rows:
        case = (row["head_dim"], row["mask"], row["seqlen"])
        found.setdefault(case, {})[row["competitor"]] = row["tflops"]
    return found


def regular(rows: Iterable[Row]) -> list[Row]:
    """Plain self-attention, full or causal."""
    rare = ("seqlen_k", "heads_kv", "head_dim_v", "softcap")
    return [r for r in rows if r["mask"] in ("full", "causal") and not any(map(r.get, rare))]
