"""Datasheet figures of one GPU for each compute capability, for predictions without that GPU."""

from __future__ import annotations

from typing import NamedTuple

from flash.capability import Arch


class Gpu(NamedTuple):
    """Dense rates with fp32 accumulation, memory bandwidth, multiprocessors, shared memory."""

    name: str
    half_flops: float  # fp16 and bf16, per second
    fp8_flops: float  # 0: no FP8 unit
    bandwidth: float  # bytes per second
    processors: int
    shared_bytes: int  # of one CTA, at most

    def flops(self, dtype: str) -> float:
        """float32 counts as three products of 16-bit parts."""
        if dtype == "float8_e4m3fn" and self.fp8_flops:
            return self.fp8_flops
        return self.half_flops / 3 if dtype == "float32" else self.half_flops

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte above which arithmetic is the bound."""
        return self.flops(dtype) / self.bandwidth


GPUS: dict[tuple[int, int], Gpu] = {
    (7, 5): Gpu("T4", 65e12, 0, 320e9, 40, 64 << 10),
    (8, 0): Gpu("A100", 312e12, 0, 2.0e12, 108, 163 << 10),
    (8, 6): Gpu("RTX 3090", 71e12, 0, 936e9, 82, 99 << 10),
    (8, 9): Gpu("RTX 4090", 165e12, 330e12, 1008e9, 128, 99 << 10),
    (9, 0): Gpu("H100", 990e12, 1979e12, 3.35e12, 132, 227 << 10),
    (10, 0): Gpu("B200", 2250e12, 4500e12, 8.0e12, 148, 227 << 10),
    (10, 3): Gpu("B300", 2250e12, 4500e12, 8.0e12, 148, 227 << 10),
    (12, 0): Gpu("RTX 5090", 209e12, 419e12, 1792e9, 170, 99 << 10),
}


def gpu(arch: Arch) -> Gpu | None:
    """The GPU that stands for this compute capability, or the nearest older one of its line."""
    if isinstance(arch, str):
        return None
    if arch in GPUS:
        return GPUS[arch]
    older = [known for known in GPUS if known <= arch]
    return GPUS[max(older)] if older else None
