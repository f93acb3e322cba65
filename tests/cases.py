"""The cases that test_forward, test_backward and tests/gpu run."""

from __future__ import annotations

from typing import Any

from grid import BF16, FP16, FP32, Case, vary

DIMS = [8, 24, 32, 64, 72, 96, 128, 160, 192, 256]
CAUSAL = [False, True]
EDGES = [(1, 1), (1, 64), (1, 129), (2, 257), (63, 65), (64, 64), (65, 63), (127, 128),
         (128, 127), (129, 257), (191, 192), (257, 64), (300, 17)]  # fmt: skip
MASKS = [
    {"causal": True}, {"causal": "top-left"}, {"window": (20, 5)}, {"window": (None, 3)},
    {"window": (70, None)}, {"causal": True, "window": (33, 0)}, {"window": (0, 0)},
    {"causal": "top-left", "window": (64, None)},
]  # fmt: skip


def masked(shapes: list[Case]) -> list[Case]:
    return [c for mask in MASKS for c in vary(shapes, **{k: [v] for k, v in mask.items()})]


def shaped(edges: list[tuple[int, int]], **rest: Any) -> list[Case]:
    return [Case(n, m, **rest) for n, m in edges]


HEADS = [{"heads_q": 4, "heads_kv": 1}, {"heads_q": 6, "heads_kv": 2}]
GROUPED = [c for h in HEADS for c in vary([Case(130, 129, **h)], causal=CAUSAL, dim=[64, 128])]
OTHER_DIM_V = [
    Case(130, 131, dim, dim_v, causal=causal)
    for dim, dim_v in ((64, 32), (32, 64), (192, 128), (128, 64), (40, 72), (256, 64))
    for causal in CAUSAL
]
SCORES = [
    Case(scale=0.0), Case(scale=-0.5), Case(scale=2.0), Case(softcap=1.0), Case(softcap=30.0),
    Case(softcap=5.0, causal=True, window=(50, 0)), Case(gain=5.0), Case(gain=5.0, causal=True),
    Case(gain=4.0, softcap=20.0, dim=128),
]  # fmt: skip
FORWARD = [
    *vary([Case(129, 130, batch=2)], dim=DIMS, causal=CAUSAL, dtype=[BF16, FP16]),
    *vary([Case(129, 130)], dim=[8, 32, 64, 128], causal=CAUSAL, dtype=[FP32]),
    *vary(shaped(EDGES), causal=CAUSAL),
    *vary(shaped(EDGES[3:10], dim=128, dtype=FP16), causal=CAUSAL),
    *masked(shaped([(130, 130), (65, 200), (200, 65)], heads_q=4)),
    *GROUPED, *OTHER_DIM_V, *SCORES,
]  # fmt: skip
BACKWARD = [
    *vary([Case(129, 130)], dim=DIMS, causal=CAUSAL, dtype=[BF16]),
    *vary([Case(70, 66)], dim=[64, 96, 128, 256], causal=CAUSAL, dtype=[FP16]),
    *vary([Case(65, 130)], dim=[32, 64, 128], causal=CAUSAL, dtype=[FP32]),
    *vary(shaped(EDGES[:-1]), causal=CAUSAL),
    *masked(shaped([(65, 130), (130, 65)])),
    *GROUPED[::2], *OTHER_DIM_V, *SCORES,
]  # fmt: skip
