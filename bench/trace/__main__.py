"""`python -m bench.trace`: v3's forward kernel with clock reads put in, built, run and kept.

Writes timeline.json and plots/trace.perfetto.json into bench/results/<gpu>; `flash trace` draws
the first and makes the second again. The kernel in v3_hopper/ has no trace of this.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import script, variants
from bench.variants import Edit, Variant
from flash.study import timeline
from flash.study.cases import Case

ROLES = ("producer", "consumer 0", "consumer 1", "consumer 2")
DOING = ("pauses", "waits", "loads K", "loads V", "multiplies", "softmax", "drains O", "rescales")
CASE = Case("forward", "bfloat16", 1, 4096, 16, 128)
DIMS = "128"
HALF = 2**31
F, L, H = "v3_hopper/forward.cuh", "v3_hopper/load.cuh", "v3_hopper/launch.cuh"
C = "v3_hopper/consumer.cuh"


def after(file: str, old: str, new: str) -> Edit:
    return file, old, old + new


def loading(what: str, doing: str) -> tuple[Edit, ...]:
    """Marks around the wait for a free slot and the copy into it."""
    wait = f"    shared.{what}_empty[{what}.slot].wait({what}.parity ^ 1);\n"
    return (
        (L, wait, f"    mark(kWaits);\n{wait}    mark({doing});\n"),
        (L, f"    {what}.advance();\n", f"    {what}.advance();\n    mark(kPauses);\n"),
    )


TRACED = Variant("v3", "v3_hopper", "trace", (
    after(L, '#include "v3_hopper/store.cuh"\n', '#include "v3_hopper/trace.cuh"\n'),
    after(L, "  Ring<Traits::kStages> k, v;\n", "  Marker mark{0};\n"),
    *loading("k", "kLoadsK"),
    *loading("v", "kLoadsV"),
    after(C, '#include "v3_hopper/guard.cuh"\n', '#include "v3_hopper/trace.cuh"\n'),
    after(C, "  Softmax<Traits> softmax = {make_scale<Traits>(args.p)};\n",
          "  Marker mark{1 + consumer};\n"),
    (F, "  const auto* sK = pipe.wait_k();\n  pipe.take_turn();\n",
     "  mark(kWaits);\n  const auto* sK = pipe.wait_k();\n  pipe.take_turn();\n"
     "  mark(kMultiplies);\n"),
    after(F, "wgmma_wait<1>();  // S is there\n  pin(rS);\n", "  mark(kSoftmaxes);\n"),
    (F, "  if (!next.last()) pipe.wait_k();",
     "  mark(kDrains);\n  if (!next.last()) pipe.wait_k();"),
    after(F, "// O is there, P and V are free\n  pin(rO);\n", "  mark(kRescales);\n"),
    after(F, "  pack<Traits>(rP, rS);\n  if (kOpensTile) next.skip_v(pipe);\n",
          "  mark(kPauses);\n"),
    (H, "  return launch(forward_kernel_of<Traits>(), grid, Traits::kThreads,\n"
     "                int(sizeof(typename Traits::Shared)), p.stream, args);\n",
     "  const cudaError_t launched = launch(forward_kernel_of<Traits>(), grid, Traits::kThreads,\n"
     "      int(sizeof(typename Traits::Shared)), p.stream, args);\n"
     "  dump_trace(p.stream);\n  return launched;\n"),
), (("bench/trace/marks.cuh", "v3_hopper/trace.cuh"),))  # fmt: skip


def build(place: Path) -> Path:
    """The traced kernel, with the marks among its sources."""
    return variants.build(TRACED, place, DIMS)


def run_here() -> None:
    """A few calls of the build that this process imports; the last one's marks stay."""
    from flash.study.competitors import competitor
    from flash.study.inputs import draw

    run = competitor("v3", CASE, draw(CASE))
    for _ in range(4):
        run()
    torch.cuda.synchronize()


def spans(text: str) -> list[dict[str, Any]]:
    """What each role did from when to when, in clocks since the first mark."""
    marks: dict[int, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        role, clock, doing = map(int, line.split())
        near = next(iter(marks.values()))[0][0] if marks else clock  # the 32-bit clock may wrap
        clock = near + (clock - near + HALF) % (2 * HALF) - HALF
        marks.setdefault(role, []).append((clock, doing))
    start = min((own[0][0] for own in marks.values()), default=0)
    found = []
    for role, own in sorted(marks.items()):
        moments = [(clock - start, doing) for clock, doing in own]
        for (begin, doing), (end, _) in itertools.pairwise(moments):
            if DOING[doing] != "pauses" and end > begin:
                found.append(
                    {"role": ROLES[role], "what": DOING[doing], "begin": begin, "end": end}
                )
    return found


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--build", type=Path, help="only build, into this folder")
    parser.add_argument("--place", type=Path, help="where the build is, or goes")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_here()
        return 0
    if args.build:
        build(args.build)
        return 0
    if script.lacks_gpu("trace"):
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        marks = Path(scratch) / "marks"
        os.environ["FLASH_TRACE_FILE"] = str(marks)
        variants.python(build(args.place or Path(scratch)), "-m", "bench.trace", "--run")
        rows = spans(marks.read_text())
    path = script.leave(args.out, "timeline", {"case": CASE.key(), "timeline": rows}, "trace")
    timeline.write_perfetto(rows, path.parent / "plots" / "trace.perfetto.json")
    print(timeline.summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
