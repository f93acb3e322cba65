"""What is measured: the shape, mask and direction of one call, and presets named after models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from flash.flops import backward_flops, forward_flops
from flash.spec import Spec

Window = tuple[int | None, int | None]
DIRECTIONS = ("forward", "backward")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "e4m3": "float8_e4m3fn"}
SHORT = {name: short for short, name in DTYPES.items()}
TOKENS, WIDTH = 16384, 2048  # the papers' convention: tokens in all, heads times head dim


@dataclass(frozen=True)
class Case:
    """One call; what is None is as for plain self-attention."""

    direction: str
    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool = False
    seqlen_k: int | None = None
    heads_kv: int | None = None
    head_dim_v: int | None = None
    window: Window | None = None
    softcap: float = 0.0

    @property
    def keys(self) -> int:
        return self.seqlen if self.seqlen_k is None else self.seqlen_k

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def dim_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def mask(self) -> str:
        if self.window is not None:
            return f"window {window_text(self.window)}" + (" causal" if self.causal else "")
        return "causal" if self.causal else "full"

    @property
    def spec(self) -> Spec:
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        return Spec(self.head_dim**-0.5, self.softcap, left, right)

    @property
    def flops(self) -> float:
        """4 d for each visible pair of row and key; backward counts 2.5 times that."""
        forward = forward_flops(self.spec, self.batch, self.heads, self.seqlen, self.keys,
                                self.head_dim, self.dim_v)  # fmt: skip
        return forward if self.direction == "forward" else backward_flops(forward)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `flash.attention` beside the tensors."""
        given: dict[str, Any] = {"causal": self.causal}
        if self.window is not None:
            given["window"] = self.window
        if self.softcap:
            given["softcap"] = self.softcap
        return given

    def check(self) -> None:
        """Raises what `flash.attention` would raise for any backend."""
        import torch

        from flash.explain import explain

        rows, keys = (self.seqlen, self.heads), (self.keys, self.kv_heads)
        shapes = ((*rows, self.head_dim), (*keys, self.head_dim), (*keys, self.dim_v))
        inputs = (torch.empty(self.batch, *shape, device="meta") for shape in shapes)
        explain(*inputs, **self.options)

    def key(self) -> dict[str, Any]:
        """What makes a row of a result file this case; defaults of rare options are left out."""
        common = {"direction": self.direction, "dtype": self.dtype, "head_dim": self.head_dim,
                  "mask": self.mask, "seqlen": self.seqlen, "batch": self.batch,
                  "heads": self.heads}  # fmt: skip
        rare = {name: getattr(self, name) for name in RARE if getattr(self, name)}
        return {**common, **rare}

    def command(self, backend: str) -> str:
        """What measures this row again."""
        shape = f"{self.batch},{self.seqlen},{self.heads},{self.head_dim}"
        words = ["flash bench --shape", shape, "--dtype", SHORT[self.dtype],
                 "--direction", self.direction, "--backend", backend]  # fmt: skip
        words += ["--causal"] if self.causal else []
        words += ["--window", window_text(self.window)] if self.window else []
        rare = [f"--{name.replace('_', '-')} {getattr(self, name)}" for name in RARE
                if getattr(self, name)]  # fmt: skip
        return " ".join([*words, *rare])


RARE = ("seqlen_k", "heads_kv", "head_dim_v", "softcap")
KEY = ("direction", "dtype", "head_dim", "mask", "seqlen", "batch", "heads", *RARE, "competitor")


def window_text(window: Window) -> str:
    return ",".join("none" if side is None else str(side) for side in window)


def of_row(row: dict[str, Any]) -> Case:
    """The case that a row of a result file speaks of."""
    window: Window | None = None
    if row["mask"].startswith("window"):
        sides = row["mask"].split()[1].split(",")
        left, right = (None if side == "none" else int(side) for side in sides)
        window = left, right
    return Case(
        row["direction"], row["dtype"], row["batch"], row["seqlen"], row["heads"],
        row["head_dim"], row["mask"].endswith("causal"), window=window,
        **{name: row[name] for name in RARE if row.get(name)},
    )  # fmt: skip


def paper(direction: str, dtype: str, head_dim: int, causal: bool, seqlen: int) -> Case:
    """A case of the papers' sweep: 16384 tokens, 2048 / d heads."""
    batch, heads = max(1, TOKENS // seqlen), max(1, WIDTH // head_dim)
    return Case(direction, dtype, batch, seqlen, heads, head_dim, causal)


def _papers() -> Iterable[Case]:
    for dim in (64, 128, 256):
        for causal in (False, True):
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                yield paper("forward", "bfloat16", dim, causal, seqlen)


def _at(lengths: Iterable[int], tokens: int, base: Case) -> list[Case]:
    return [replace(base, seqlen=n, batch=max(1, tokens // n)) for n in lengths]


_LLAMA = Case("forward", "bfloat16", 1, 8192, 32, 128, causal=True, heads_kv=8)
_GEMMA = Case("forward", "bfloat16", 2, 8192, 16, 256, causal=True, heads_kv=8, softcap=50.0)
PRESETS: dict[str, tuple[str, list[Case]]] = {
    "papers": ("d 64, 128, 256, full and causal, 512 to 16384", list(_papers())),
    "llama3-8b": ("32 heads over 8, d 128, causal", _at((2048, 8192), TOKENS, _LLAMA)),
    "gpt2": ("12 heads, d 64, causal", _at((1024,), TOKENS, Case(
        "forward", "bfloat16", 1, 1024, 12, 64, causal=True))),
    "bert-large": ("16 heads, d 64, full", _at((128, 512), TOKENS, Case(
        "forward", "bfloat16", 1, 512, 16, 64))),
    "gemma": ("16 heads over 8, d 256, softcap, global and window of 4096", [
        _GEMMA, replace(_GEMMA, window=(4095, 0))]),
    "deepseek": ("128 heads, d 192 and 128 of V, causal prefill", _at((4096,), 4096, Case(
        "forward", "bfloat16", 1, 4096, 128, 192, causal=True, head_dim_v=128))),
    "long": ("llama3-8b from 16k to 128k", _at((16384, 32768, 65536, 131072), 1, _LLAMA)),
    "small": ("runs anywhere in seconds", [
        Case("forward", "bfloat16", 1, n, 2, 64, causal=True) for n in (128, 256, 512)]),
}  # fmt: skip


def expand(cases: Iterable[Case], directions: Iterable[str], dtype: str | None) -> list[Case]:
    """Each case in each direction, in this dtype where one is asked for; none twice."""
    found = [
        replace(case, direction=direction, dtype=dtype or case.dtype)
        for case in cases
        for direction in directions
    ]
    return list(dict.fromkeys(found))
