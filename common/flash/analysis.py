"""The papers' claims as code: what standard attention moves and keeps, what each generation moves.

The closed forms below are those of the READMEs; tests hold them against counted bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from flash.spec import Spec
from flash.tiles import Band, Tile, blocks


class Device(NamedTuple):
    """Dense 16-bit tensor-core rate and memory bandwidth by the datasheet."""

    name: str
    flops: float  # per second
    bandwidth: float  # bytes per second

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which arithmetic, not memory, is the bound."""
        return self.flops / self.bandwidth


A100 = Device("A100", 312e12, 2.0e12)
H100 = Device("H100", 990e12, 3.35e12)
DEVICES = (A100, H100)


class Step(NamedTuple):
    """One kernel of standard attention: it reads its inputs and writes its result in full."""

    name: str
    flops: int
    nbytes: int

    @property
    def intensity(self) -> float:
        return self.flops / self.nbytes

    def bound_by(self, device: Device) -> str:
        return "memory" if self.intensity < device.ridge else "arithmetic"


SOFTMAX_FLOPS = 5  # per score: max, subtract, exponential, sum, divide


def score_bytes(seqlen: int, itemsize: int = 2, heads: int = 1, batch: int = 1) -> int:
    """Memory that standard attention needs for S and P."""
    return 2 * batch * heads * seqlen * seqlen * itemsize


def standard_steps(seqlen: int, dim: int, itemsize: int = 2) -> tuple[Step, Step, Step]:
    """S = Q K^T, P = softmax(S), O = P V of one head."""
    pairs, rows = seqlen * seqlen, seqlen * dim
    gemm = Step("S = Q K^T", 2 * pairs * dim, (2 * rows + pairs) * itemsize)
    softmax = Step("P = softmax(S)", SOFTMAX_FLOPS * pairs, 2 * pairs * itemsize)
    return gemm, softmax, Step("O = P V", 2 * pairs * dim, gemm.nbytes)


def paper_tile(dim: int, sram_elements: int) -> Tile:
    """The first paper's tile: K/V block ceil(M / 4d), Q block at most d rows."""
    kv = -(-sram_elements // (4 * dim))
    return Tile(q=min(kv, dim), kv=kv)


@dataclass(frozen=True)
class Shape:
    """One call, in the letters of the closed forms."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    dim: int
    dim_v: int
    itemsize: int = 2
    itemsize_out: int = 2
    itemsize_acc: int = 4

    def letters(self, spec: Spec, tile: Tile) -> dict[str, int]:
        visits = Visits.of(Band(spec, self.seqlen_q, self.seqlen_k), tile)
        return {
            "B": self.batch, "H": self.heads_q, "H_kv": self.heads_kv, "N": self.seqlen_q,
            "N_k": self.seqlen_k, "d": self.dim, "d_v": self.dim_v, "e": self.itemsize,
            "e_o": self.itemsize_out, "a": self.itemsize_acc, **visits._asdict(),
        }  # fmt: skip


class Visits(NamedTuple):
    """Sums over the pairs of (Q block, K/V block) that meet."""

    R: int  # rows of the Q block, over all pairs
    C: int  # keys of the K/V block, over all pairs
    R_1: int  # rows of the Q blocks that meet any K/V block
    C_1: int  # keys of the K/V blocks that meet any Q block

    @classmethod
    def of(cls, band: Band, tile: Tile) -> Visits:
        row_sum = key_sum = met_rows = met_keys = reached = 0
        for rows in blocks(band.every_row(), tile.q, band.seqlen_q):
            seen = band.keys(rows)
            if seen.size == 0:
                continue
            begin = seen.begin // tile.kv * tile.kv
            many = -(-(seen.end - begin) // tile.kv)
            end = min(begin + many * tile.kv, band.seqlen_k)
            row_sum, key_sum = row_sum + many * rows.size, key_sum + end - begin
            # both ends of a band only move on, from one block of rows to the next
            met_rows, met_keys = met_rows + rows.size, met_keys + max(0, end - max(begin, reached))
            reached = max(reached, end)
        return cls(row_sum, key_sum, met_rows, met_keys)


Forms = dict[tuple[str, str], str]  # (tensor, "read" or "write") -> bytes

_V1_FORWARD: Forms = {
    ("Q", "read"): "B * H * R * d * e",
    ("K", "read"): "B * H * C_1 * d * e",
    ("V", "read"): "B * H * C_1 * d_v * e",
    ("O", "read"): "B * H * (R - R_1) * d_v * a",
    ("O", "write"): "B * H * (R - R_1) * d_v * a + B * H * N * d_v * e_o",
    ("m", "read"): "B * H * (R - R_1) * a",
    ("m", "write"): "B * H * (R - R_1) * a",
    ("l", "read"): "B * H * (R - R_1) * a",
    ("l", "write"): "B * H * (R - R_1) * a",
    ("LSE", "write"): "B * H * N * a",
}
_V1_BACKWARD: Forms = {
    ("Q", "read"): "B * H * R * d * e",
    ("K", "read"): "B * H_kv * N_k * d * e",
    ("V", "read"): "B * H_kv * N_k * d_v * e",
    ("O", "read"): "B * H * R * d_v * e",
    ("dO", "read"): "B * H * R * d_v * e",
    ("LSE", "read"): "B * H * R * a",
    ("dQ", "read"): "B * H * (R - R_1) * d * a",
    ("dQ", "write"): "B * H * (R - R_1) * d * a + B * H * N * d * e",
    ("dK", "write"): "B * H_kv * N_k * d * e",
    ("dV", "write"): "B * H_kv * N_k * d_v * e",
}
_V2_FORWARD: Forms = {
    ("Q", "read"): "B * H * N * d * e",
    ("K", "read"): "B * H * C * d * e",
    ("V", "read"): "B * H * C * d_v * e",
    ("O", "write"): "B * H * N * d_v * e_o",
    ("LSE", "write"): "B * H * N * a",
}
_V2_BACKWARD: Forms = {
    ("Q", "read"): "B * H * R * d * e",
    ("K", "read"): "B * H_kv * N_k * d * e",
    ("V", "read"): "B * H_kv * N_k * d_v * e",
    ("O", "read"): "B * H * N * d_v * e",
    ("dO", "read"): "B * H * (N + R) * d_v * e",
    ("LSE", "read"): "B * H * R * a",
    ("delta", "read"): "B * H * R * a",
    ("delta", "write"): "B * H * N * a",
    ("dQ", "read"): "B * H * N * d * a",
    ("dQ", "write"): "B * H * (N + R) * d * a + B * H * N * d * e",
    ("dK", "write"): "B * H_kv * N_k * d * e",
    ("dV", "write"): "B * H_kv * N_k * d_v * e",
}
CLOSED_FORMS: dict[tuple[str, str], Forms] = {
    ("v1_tiling", "forward"): _V1_FORWARD,
    ("v1_tiling", "backward"): _V1_BACKWARD,
    ("v2_parallel", "forward"): _V2_FORWARD,
    ("v2_parallel", "backward"): _V2_BACKWARD,
    ("v3_hopper", "forward"): _V2_FORWARD,
    ("v3_hopper", "backward"): _V2_BACKWARD,
}


def hbm_bytes(version: str, direction: str, shape: Shape, spec: Spec,
              tile: Tile) -> dict[tuple[str, str], int]:  # fmt: skip
    """Bytes of each tensor by the closed form; forms that come to 0 are left out."""
    letters = shape.letters(spec, tile)
    forms = CLOSED_FORMS[version, direction]
    counted = {key: evaluate(form, letters) for key, form in forms.items()}
    return {key: nbytes for key, nbytes in counted.items() if nbytes}


def evaluate(form: str, letters: dict[str, int]) -> int:
    """A closed form with its letters filled in."""
    return int(eval(compile(form, "closed form", "eval"), {"__builtins__": {}}, letters))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that `run` made and held at a time, measured operation by operation."""
    from flash.live_bytes import LiveBytes

    with LiveBytes() as live:
        run()
    return live.peak
