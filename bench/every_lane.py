"""v3's kernels as the sanitizer can follow them: every lane of a warp arrives at a barrier.

In the kernels one lane arrives for its warp, behind a __syncwarp, or for its warpgroup, behind a
named barrier. By the PTX memory model that orders whatever all of them have read and written
before; racecheck does not follow it, which race_probe.cu shows for a warp on a kernel of nothing
else. So racecheck sees copies of these kernels in which each lane arrives for itself; the meetings,
and everything else, are the same.

And two warpgroups meet at one named barrier from two branches. PTX wants the same instruction of
the threads of a warp only; synccheck calls it divergent, on the probe too. In the copies each of
the two branches arrives at the barrier that the other waits for.
"""

from __future__ import annotations

from bench.variants import Variant

_BACKWARD, _KEYS = "v3_hopper/backward.cuh", "v3_hopper/backward_keys.cuh"
_QUERIES, _LOAD = "v3_hopper/backward_queries.cuh", "v3_hopper/load_backward.cuh"
_NARROW = "v3_hopper/narrow_backward.cuh"
_CONSUMER, _ROWS = (f"v3_hopper/consumer_{name}.cuh" for name in ("backward", "queries"))
_PIPE, _PRODUCE, _GUARD = (f"v3_hopper/{name}.cuh" for name in ("pipe", "load", "guard"))
_ONE, _EVERY = "if (threadIdx.x % 32 == 0) barrier.arrive();", "barrier.arrive();"
_WARPS, _LANES = "kWarps = Traits::kConsumers * 4;", "kWarps = Traits::kConsumers * 128;"
_MEET = "named_sync(kKeysRead, KeyConsumer<Traits>::kThreads);\n"


def _crosswise(arrives: str, waits: str, then: str) -> tuple[str, str, str]:
    """One of two branches that met at one barrier."""
    threads = "KeyConsumer<Traits>::kThreads"
    meeting = f"named_arrive({arrives}, {threads});\n    named_sync({waits}, {threads});\n"
    return _KEYS, _MEET + then, meeting + then


EVERY_LANE = Variant("v3", "v3_hopper", "arrivals of one lane for its warp", (
    (_PIPE, "init(Traits::kWorkReaders);",
     "init(128 * Traits::kConsumers + 32 * (kGuardWarps + 1));"),
    (_PIPE, "if (leader()) shared.work_empty", "shared.work_empty"),
    (_PRODUCE, "if (threadIdx.x == 0) shared.work_empty", "shared.work_empty"),
    (_GUARD, "if (leader) shared.work_empty", "shared.work_empty"),
    (_CONSUMER, _ONE, _EVERY),
    (_ROWS, _ONE, _EVERY),
    (_BACKWARD, _WARPS, _LANES),
    (_QUERIES, _WARPS, _LANES),
    (_BACKWARD, "dq_full[i].init(4);", "dq_full[i].init(128);"),
    (_KEYS, "_full[i].init(4);", "_full[i].init(128);"),
    (_KEYS, "_free[i].init(4);", "_free[i].init(128);"),
    *((file, f"_full{index}.init(1);", f"_full{index}.init(32);")
      for file in (_BACKWARD, _QUERIES) for index in ("", "[i]")),
    (_NARROW, _ONE, _EVERY),
    (_NARROW, "kWarps = 4 * kConsumers;", "kWarps = 128 * kConsumers;"),
    (_NARROW, ".init(4);", ".init(128);"),
    *((_NARROW, f" {name}_full[i].init(1);", f" {name}_full[i].init(32);") for name in ("k", "v")),
    (_NARROW, "rows_full[i].init(2);", "rows_full[i].init(2 * 32);"),
    (_NARROW, "if (!step.valid() && self.leader) {", "if (!step.valid()) {"),
    (_LOAD, "    if (!leader) return;\n    const bool clean = is_clean(tile, first, needed);\n",
     "    const bool clean = is_clean(tile, first, needed);\n"
     "    if (!leader && clean) full.arrive();\n    if (!leader) return;\n"),
    (_LOAD, "    if (leader) full.arrive();\n", "    full.arrive();\n"),
    ("v3_hopper/traits_backward.cuh", "kKeysRead = 2,", "kKeysRead = 2, kValuesRead = 15,"),
    _crosswise("kKeysRead", "kValuesRead", "    self.stage(shared.v,"),
    _crosswise("kValuesRead", "kKeysRead", "    self.stage(shared.k,"),
    ("v3_hopper/fp8_load.cuh", "q_full[i][consumer].init(1);", "q_full[i][consumer].init(32);"),
    ("v3_hopper/fp8_load.cuh", "      if (elect_one()) {\n        Barrier& full = shared.q_full",
     "      const bool one = elect_one();\n"
     "      if (!one) shared.q_full[slot][group].arrive();\n"
     "      if (one) {\n        Barrier& full = shared.q_full"),
    ("v3_hopper/fp8_load.cuh", "shared.k_full[i].init(1);", "shared.k_full[i].init(32);"),
    ("v3_hopper/fp8_load.cuh", "      shared.k_full[slot].arrive();\n    }\n",
     "    }\n    shared.k_full[slot].arrive();\n"),
    ("v3_hopper/fp8_load.cuh", "work_empty[i].init(Traits", "work_empty[i].init(128 * Traits"),
    ("v3_hopper/fp8_pipe.cuh", "if (leader()) shared.work_empty", "shared.work_empty"),
    ("v3_hopper/fp8_load.cuh", "kConsumers * kGroupWarps", "kConsumers * kGroupThreads"),
    ("v3_hopper/fp8_pipe.cuh", "if (elect_one()) shared.k_empty", "shared.k_empty"),
    ("v3_hopper/fp8_load.cuh", ".init(kTransposers);", ".init(32 * kTransposers);"),
    ("v3_hopper/fp8_load.cuh", "init(kTransposers + Traits", "init(32 * kTransposers + Traits"),
    ("v3_hopper/fp8_load.cuh", "guarded ? 1 : kTransposers", "guarded ? 1 : 32 * kTransposers"),
    ("v3_hopper/fp8_guard.cuh",
     "    if (threadIdx.x % kWarp == 0) {\n      shared.v_full[slot].arrive();\n"
     "      shared.raw_empty[from].arrive();\n    }\n",
     "    shared.v_full[slot].arrive();\n    shared.raw_empty[from].arrive();\n"),
    ("v3_hopper/fp8_transpose.cuh",
     "      shared.v_full[tile.slot<Traits::kStages>()].arrive();\n"
     "      shared.raw_empty[from].arrive();\n    }\n",
     "    }\n    shared.v_full[tile.slot<Traits::kStages>()].arrive();\n"
     "    shared.raw_empty[from].arrive();\n"),
))  # fmt: skip
