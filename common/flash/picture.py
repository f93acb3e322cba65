"""The mask as a picture by tiles: computed in full, computed under the mask, or skipped."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from flash.spec import Spec
from flash.tiles import Band, Range, Tile


class Kind(Enum):
    FULL = "█"
    PARTIAL = "▒"
    SKIPPED = "·"


class Census(NamedTuple):
    """Tiles of each kind, and the work they hold."""

    full: int
    partial: int
    skipped: int
    pairs_computed: int  # (row, key) pairs in computed tiles
    pairs_visible: int  # of which the mask lets through


def kind(band: Band, rows: Range, keys: Range) -> Kind:
    seen = band.keys(rows)
    if rows.size <= 0 or keys.size <= 0 or keys.begin >= seen.end or keys.end <= seen.begin:
        return Kind.SKIPPED
    return Kind.FULL if band.all_visible(rows, keys) else Kind.PARTIAL


def spans(length: int, size: int) -> list[Range]:
    return [Range(begin, min(begin + size, length)) for begin in range(0, length, size)]


def visible_pairs(spec: Spec, seqlen_q: int, seqlen_k: int) -> int:
    """Pairs of row and key that the mask lets through, counted exactly."""
    band = Band(spec, seqlen_q, seqlen_k)
    return sum(band.keys(Range(row, row + 1)).size for row in range(seqlen_q))


def census(spec: Spec, seqlen_q: int, seqlen_k: int, tile: Tile) -> Census:
    band = Band(spec, seqlen_q, seqlen_k)
    count = dict.fromkeys(Kind, 0)
    computed = 0
    for rows in spans(seqlen_q, tile.q):
        for keys in spans(seqlen_k, tile.kv):
            found = kind(band, rows, keys)
            count[found] += 1
            computed += 0 if found is Kind.SKIPPED else rows.size * keys.size
    visible = visible_pairs(spec, seqlen_q, seqlen_k)
    return Census(count[Kind.FULL], count[Kind.PARTIAL], count[Kind.SKIPPED], computed, visible)


def picture(spec: Spec, seqlen_q: int, seqlen_k: int, tile: Tile, limit: int = 48) -> str:
    """One character per tile, rows of Q downwards; several tiles a character beyond `limit`."""
    if seqlen_q == 0 or seqlen_k == 0:
        return "(nothing to compute)"
    band = Band(spec, seqlen_q, seqlen_k)
    step = max(1, -(-max(seqlen_q // tile.q, seqlen_k // tile.kv) // limit))
    lines = []
    for rows in spans(seqlen_q, tile.q * step):
        kinds = (kind(band, rows, keys) for keys in spans(seqlen_k, tile.kv * step))
        lines.append("".join(found.value for found in kinds))
    scale = "" if step == 1 else f", {step} x {step} tiles a character"
    legend = " ".join(f"{k.value} {k.name.lower()}" for k in Kind)
    return "\n".join([*lines, f"{legend}; tile {tile.q} x {tile.kv}{scale}"])
