"""The capability table: what each backend serves, on which GPU; checks and dispatch read it."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch

Arch = tuple[int, int] | str  # compute capability, or "cpu"

VERSIONS = ("v3_hopper", "v2_parallel", "v1_tiling")  # newest first: the order `auto` tries
BACKENDS = (*VERSIONS, "torch", "reference")
ALIASES = {"v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper"}
DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float8_e4m3fn: "float8_e4m3fn",
}
FP8 = torch.float8_e4m3fn
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


@dataclass(frozen=True)
class Tile:
    """The tile of one kernel: rows of Q, rows of K/V, K/V stages, threads of a CTA.

    `whole`: the K/V block stays on chip in its entirety, and its stages are the pieces of it.
    """

    block_q: int
    block_kv: int
    stages: int
    threads: int
    whole: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: these dtypes and head dims, on these compute capabilities.

    Head dims are those compiled, (Q and K, V); a request takes the smallest that holds it.
    """

    dtypes: tuple[str, ...]
    minimum: tuple[int, int]
    forward: tuple[tuple[int, int], ...]
    backward: tuple[tuple[int, int], ...] = ()
    maximum: tuple[int, int] = (99, 9)
    image: str = ""

    def covers(self, capability: tuple[int, int]) -> bool:
        return self.minimum <= capability <= self.maximum

    def dims(self, direction: str) -> tuple[tuple[int, int], ...]:
        return self.forward if direction == "forward" else self.backward

    def where(self) -> str:
        low, high = (f"{a}.{b}" for a, b in (self.minimum, self.maximum))
        if self.minimum == self.maximum:
            return f"exactly {low}"
        return f"{low} or newer" if self.maximum[0] == 99 else f"{low} to {high}"


@dataclass(frozen=True)
class Capability:
    """Everything one backend serves."""

    name: str
    idea: str
    rows: tuple[Row, ...]
    features: tuple[str, ...] = ()
    tiles: dict[tuple[str, int, int], Tile] = field(default_factory=dict)
    long_tiles: dict[tuple[str, int, int], Tile] = field(default_factory=dict)
    long_rows: int = 0  # sequences of so many query rows take the long tiles, where there are any,
    long_rows_full: int = 0  # the same where nothing is masked
    long_rows_of_all_heads: int = 0  # if all heads of the batch have so many together
    fp8_tiles: dict[tuple[str, int, int], Tile] = field(default_factory=dict)
    alignment: int = 1  # bytes that rows and pointers must be multiples of
    exact_head_dims: tuple[str, ...] = ()  # dtypes whose head dim must be one of those compiled

    def tile(self, direction: str, head_dim: int, head_dim_v: int, rows: int,
             of_all_heads: int, full: bool = False, fp8: bool = False) -> Tile | None:  # fmt: skip
        """The tile of the smallest compiled kernel that holds these head dims."""
        tiles = self.fp8_tiles if fp8 else self.tiles
        fits = [
            key for key in tiles
            if key[0] == direction and key[1] >= head_dim and key[2] >= head_dim_v
        ]  # fmt: skip
        if not fits:
            return None
        key = min(fits, key=lambda fit: fit[1])
        least = self.long_rows_full if full else self.long_rows
        long = rows >= least and of_all_heads >= self.long_rows_of_all_heads and not fp8
        return self.long_tiles.get(key, tiles[key]) if long else tiles[key]

    def as_dict(self) -> dict[str, Any]:
        table = asdict(self)
        for name in ("tiles", "long_tiles", "fp8_tiles"):
            table[name] = [
                {"direction": way, "head_dim": dim, "head_dim_v": dim_v, **asdict(tile)}
                for (way, dim, dim_v), tile in getattr(self, name).items()
            ]
        return table


_EVERYTHING = (
    "causal", "window", "softcap", "gqa", "varlen", "varlen fp8", "fp8", "lse", "lse gradient",
    "deterministic", "strides", "head_dim_v",
)  # fmt: skip
_ANY = Row(tuple(DTYPES.values()), (0, 0), ((256, 256),), ((256, 256),), image="PyTorch")
_PLAIN = {
    "torch": Capability("torch", "PyTorch's scaled_dot_product_attention", (_ANY,), _EVERYTHING),
    "reference": Capability("reference", "exact, fp64, block by block", (_ANY,), _EVERYTHING),
}


@cache
def capability(name: str) -> Capability:
    """The rows of one backend; a version keeps its own in its folder."""
    if name in _PLAIN:
        return _PLAIN[name]
    rows: Capability = importlib.import_module(f"flash.{name}").CAPABILITY
    return rows


def capabilities() -> dict[str, Capability]:
    """Backend name -> what it serves, newest generation first."""
    return {name: capability(name) for name in BACKENDS}


def parse_arch(arch: str) -> Arch:
    """ "sm_80", "sm_90a", "80" or "8.0" -> (8, 0); "cpu" stays."""
    text = arch.strip().lower().removeprefix("sm_").removeprefix("sm").rstrip("af")
    if text == "cpu":
        return "cpu"
    digits = text.replace(".", "")
    if not digits.isdigit() or len(digits) < 2:
        from flash.errors import wrong_value

        raise wrong_value("arch", arch, '"cpu" or a compute capability such as "sm_80" or "9.0"')
    return int(digits[:-1]), int(digits[-1])


def arch_name(arch: Arch) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch[0]}{arch[1]}"


@cache
def _device_arch(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def arch_of(device: torch.device) -> Arch:
    """Compute capability of a CUDA device, asked once; every other device counts as "cpu"."""
    if device.type != "cuda":
        return "cpu"
    return _device_arch(torch.cuda.current_device() if device.index is None else device.index)
