"""Forward off the papers' sweep: odd head dims, grouped heads, packed, windows, softcap, fp16.

`python -m bench.breadth` times v3 beside every peer that offers the case, with errors against fp64,
and writes bench/results/<gpu>/breadth.json: about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flash
from bench import script
from bench.digest import digest
from bench.study_tables import markdown
from flash.flops import forward_flops
from flash.spec import Spec
from flash.study import files
from flash.study.cases import TOKENS, WIDTH, Case, paper
from flash.study.competitors import OURS, fa3_ops, present
from flash.study.measure import Settings, measure, rate
from flash.study.timing import Board, Stopwatch

Row = dict[str, Any]
VERSION, PEERS = "v3", ("fa3", "sdpa-cudnn")
LENGTHS = (512, 2048, 8192, 16384)
TOTAL_MS = 30.0
UNEVEN = {
    "mean 508": tuple(37 + 63 * i for i in range(16)) * 2,
    "mean 2048": (145, 700, 1333, 2048, 2511, 3100, 4000, 2547),
    "17 to 8192": (8192, 17, 300, 4097, 64, 1024, 129, 2500),
}


def sweep(dim: int, **more: Any) -> Iterator[Case]:
    """Full and causal over all lengths, with these fields changed."""
    for causal in (False, True):
        for seqlen in LENGTHS:
            case = paper("forward", more.get("dtype", "bfloat16"), dim, causal, seqlen)
            yield replace(case, **more)


def windows(dim: int) -> Iterator[Case]:
    for seqlen, left in ((16384, 4095), (8192, 1023), (16384, 511)):
        yield replace(paper("forward", "bfloat16", dim, True, seqlen), window=(left, 0))


def groups() -> dict[str, Iterable[Case]]:
    """What is asked -> its cases."""
    found: dict[str, Iterable[Case]] = {f"d = {dim}": sweep(dim) for dim in (96, 192)}
    found["d = 192, V 128"] = sweep(192, head_dim_v=128)
    for dim in (64, 128):
        found[f"GQA 8:1, d = {dim}"] = sweep(dim, heads_kv=WIDTH // dim // 8)
    found |= {f"fp16, d = {dim}": sweep(dim, dtype="float16") for dim in (64, 128, 256)}
    found |= {f"window, d = {dim}": windows(dim) for dim in (64, 128, 256)}
    found |= {
        f"softcap 30, d = {dim}": (c for c in sweep(dim, softcap=30.0) if c.seqlen in (2048, 8192))
        for dim in (64, 128, 256)
    }
    return found


def dense(what: str, cases: Iterable[Case], watch: Stopwatch) -> Iterator[Row]:
    names = [VERSION, *(name for name in PEERS if present(name))]
    for case in cases:
        measured = measure(case, names, watch, Settings(total_ms=TOTAL_MS, memory=False))
        length = str(case.seqlen) + (f"/{case.window[0]}" if case.window else "")
        mask = "causal" if case.causal else "full"
        for row in measured.rows:
            yield {"what": what, "length": length, **row, "mask": mask}
        for name, why in measured.skipped.items():
            yield {"what": what, "length": length, "mask": mask, "competitor": name, "why": why}


def packed(dim: int, causal: bool, name: str, watch: Stopwatch) -> Iterator[Row]:
    """Sequences of uneven lengths, one behind the other."""
    lengths, heads = UNEVEN[name], WIDTH // dim
    q, k, v = (torch.randn(sum(lengths), heads, dim, device="cuda", dtype=torch.bfloat16)
               for _ in range(3))  # fmt: skip
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    longest, scale = max(lengths), dim**-0.5
    calls = {
        VERSION: lambda: flash.attention_varlen(
            q, k, v, cu, cu, longest, longest, causal=causal, backend=OURS[VERSION]
        )
    }
    if present("fa3"):
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest,
                   "max_seqlen_k": longest, "softmax_scale": scale,
                   "is_causal": causal}  # fmt: skip
        calls["fa3"] = lambda: fa3_ops().fwd(q, k, v, **options)[0]
    spec = Spec(scale, 0.0, None, 0 if causal else None)
    flops = sum(forward_flops(spec, 1, heads, n, n, dim, dim) for n in lengths)
    case = Case("forward", "bfloat16", len(lengths), longest, heads, dim, causal)
    row = {"what": f"packed, d = {dim}", "length": name, **case.key(), "lengths": list(lengths)}
    off = {key: error(call(), (q, k, v), lengths[-1], causal) for key, call in calls.items()}
    for key, timing in watch.race(calls, TOTAL_MS).items():
        yield {**row, "competitor": key, **timing.as_dict(), "error": off[key],
               "tflops": rate(case, timing.median * case.flops / flops)}  # fmt: skip


def error(found: Tensor, inputs: tuple[Tensor, ...], rows: int, causal: bool) -> float:
    """Relative L2 error against fp64 of the first head of the last sequence."""
    q, k, v = (t[None, -rows:, :1].to(torch.float64) for t in inputs)
    exact = flash.attention(q, k, v, causal=causal, backend="reference")
    part = found[None, -rows:, :1].to(torch.float64)
    return float(f"{float((part - exact).norm() / exact.norm()):.3g}")


def every(watch: Stopwatch) -> Iterator[Row]:
    for what, cases in groups().items():
        yield from dense(what, cases, watch)
    for dim in (64, 128, 256):
        for causal in (False, True):
            for name in UNEVEN:
                yield from packed(dim, causal, name, watch)


def table(rows: Iterable[Row]) -> str:
    """One line for each question and mask: TFLOP/s from length to length, and the best peer."""
    lines: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        lengths = lines.setdefault((row["what"], row["mask"]), {})
        lengths.setdefault(row["length"], {})[row["competitor"]] = row
    columns = ("", "mask", "S", VERSION, "FA3", "cuDNN", "of the best peer", "largest error")
    shown = []
    for (what, mask), cases in lines.items():
        cells = [" ".join(rate_of(case.get(name)) for case in cases.values())
                 for name in (VERSION, *PEERS)]  # fmt: skip
        ratios = [ratio for case in cases.values() if (ratio := over_peers(case))]
        beside = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–"
        errors = [case[VERSION]["error"] for case in cases.values() if "error" in case[VERSION]]
        worst = f"{max(errors):.1e}" if errors else "–"
        shown.append((what, mask, ", ".join(cases), *cells, beside, worst))
    return markdown(columns, shown)


def rate_of(row: Row | None) -> str:
    return f"{row['tflops']:.0f}" if row and "tflops" in row else "–"


def over_peers(case: dict[str, Row]) -> float:
    """Speed over that of the fastest peer that offers the case; 0 where none does."""
    best = max((case[name].get("tflops", 0.0) for name in PEERS if name in case), default=0.0)
    return case[VERSION].get("tflops", 0.0) / best if best and VERSION in case else 0.0


def main() -> int:
    parser = script.parser(__doc__)
    args = parser.parse_args()
    if script.lacks_gpu("breadth"):
        return 2
    rows = []
    for row in every(Stopwatch(Board())):
        if row["competitor"] in OURS:
            row["digest"] = digest(OURS[row["competitor"]])
        rows.append({**row, "date": files.now()})
        shown = (row["what"], row["mask"], row["length"], row["competitor"])
        print(*shown, row.get("tflops", row.get("why")), flush=True)
        torch.cuda.empty_cache()
    script.leave(args.out, "breadth", {"breadth": rows, "tokens": TOKENS})
    return 0


if __name__ == "__main__":
    sys.exit(main())
