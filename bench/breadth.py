"""Off the papers' sweep: odd head dims (in FP8 too), grouped heads, packed, windows, softcap, fp16.

`python -m bench.breadth` times v3 beside every peer that offers the case, with errors against fp64,
and writes bench/results/<gpu>/breadth.json: the forward pass takes about a minute, the backward
pass 40 s (`--direction`). A run replaces the rows it measures and keeps the others.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flash
from bench import record, script
from bench.digest import digest
from bench.study_tables import markdown
from flash.flops import backward_flops, forward_flops
from flash.spec import Spec
from flash.study import files
from flash.study.cases import DIRECTIONS, TOKENS, WIDTH, Case, paper
from flash.study.competitors import OURS, fa3_ops, present
from flash.study.measure import Settings, measure, rate
from flash.study.timing import Board, Stopwatch

Row = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...]]
sources = functools.cache(digest)
VERSION, PEERS = "v3", ("fa3", "sdpa-cudnn")
FP8 = "float8_e4m3fn"
LENGTHS = {"forward": (512, 2048, 8192, 16384), "backward": (512, 2048, 8192)}
WINDOWS = {"forward": ((16384, 4095), (8192, 1023), (16384, 511)),
           "backward": ((8192, 4095), (8192, 1023), (8192, 255))}  # fmt: skip
FEW = {"float16": {"forward": LENGTHS["forward"], "backward": (2048,)},
       "softcap": {"forward": (2048, 8192), "backward": (2048,)}}  # fmt: skip
TOTAL_MS = {"forward": 30.0, "backward": 12.0}
UNEVEN = {
    "mean 508": tuple(37 + 63 * i for i in range(16)) * 2,
    "mean 2048": (145, 700, 1333, 2048, 2511, 3100, 4000, 2547),
    "17 to 8192": (8192, 17, 300, 4097, 64, 1024, 129, 2500),
}


def sweep(way: str, dim: int, lengths: Iterable[int] = (), **more: Any) -> Iterator[Case]:
    """Full and causal over these lengths, or all, with these fields changed."""
    for causal in (False, True):
        for seqlen in lengths or LENGTHS[way]:
            case = paper(way, more.get("dtype", "bfloat16"), dim, causal, seqlen)
            yield replace(case, **more)


def windows(way: str, dim: int) -> Iterator[Case]:
    for seqlen, left in WINDOWS[way]:
        yield replace(paper(way, "bfloat16", dim, True, seqlen), window=(left, 0))


def groups(way: str) -> dict[str, Iterable[Case]]:
    """What is asked -> its cases."""
    found: dict[str, Iterable[Case]] = {f"d = {dim}": sweep(way, dim) for dim in (96, 192)}
    found["d = 192, V 128"] = sweep(way, 192, head_dim_v=128)
    if way == "forward":
        found |= {f"FP8, d = {dim}": sweep(way, dim, dtype=FP8) for dim in (96, 192)}
        found["FP8, d = 192, V 128"] = sweep(way, 192, head_dim_v=128, dtype=FP8)
    for dim in (64, 128):
        found[f"GQA 8:1, d = {dim}"] = sweep(way, dim, heads_kv=WIDTH // dim // 8)
    found |= {f"window, d = {dim}": windows(way, dim) for dim in (64, 128, 256)}
    few = (64, 128, 256) if way == "forward" else (64, 128)
    for dim in few:
        found[f"fp16, d = {dim}"] = sweep(way, dim, FEW["float16"][way], dtype="float16")
    for dim in few:
        found[f"softcap 30, d = {dim}"] = sweep(way, dim, FEW["softcap"][way], softcap=30.0)
    return found


def dense(what: str, cases: Iterable[Case], watch: Stopwatch) -> Iterator[Row]:
    names = [VERSION, *(name for name in PEERS if present(name))]
    for case in cases:
        how = Settings(total_ms=TOTAL_MS[case.direction], memory=False)
        measured = measure(case, names, watch, how)
        length = str(case.seqlen) + (f"/{case.window[0]}" if case.window else "")
        mask = "causal" if case.causal else "full"
        for row in measured.rows:
            yield {"what": what, "length": length, **row, "mask": mask}
        for name, why in measured.skipped.items():
            yield {"what": what, "length": length, "direction": case.direction, "mask": mask,
                   "competitor": name, "why": why}  # fmt: skip


def packed(way: str, dim: int, causal: bool, name: str, watch: Stopwatch) -> Iterator[Row]:
    """Sequences of uneven lengths, one behind the other."""
    lengths, heads = UNEVEN[name], WIDTH // dim
    tensors = tuple(torch.randn(sum(lengths), heads, dim, device="cuda", dtype=torch.bfloat16)
                    for _ in range(4))  # fmt: skip
    cu, longest = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32), max(lengths)
    ends = {"cu_seqlens_q": cu, "cu_seqlens_k": cu,
            "max_seqlen_q": longest, "max_seqlen_k": longest}  # fmt: skip
    calls = packed_calls(way, tensors, ends, causal)
    spec = Spec(dim**-0.5, 0.0, None, 0 if causal else None)
    flops = sum(forward_flops(spec, 1, heads, n, n, dim, dim) for n in lengths)
    case = Case(way, "bfloat16", len(lengths), longest, heads, dim, causal)
    flops = flops if way == "forward" else backward_flops(flops)
    row = {"what": f"packed, d = {dim}", "length": name, **case.key(), "lengths": list(lengths)}
    exact = last_head(tensors, lengths[-1], causal, way)
    off = {key: error(call(), exact) for key, call in calls.items()}
    for key, timing in watch.race(calls, TOTAL_MS[way]).items():
        yield {**row, "competitor": key, **timing.as_dict(), "error": off[key],
               "tflops": rate(case, timing.median * case.flops / flops)}  # fmt: skip


def packed_calls(
    way: str, tensors: tuple[Tensor, ...], ends: dict[str, Any], causal: bool
) -> dict[str, Call]:
    """Ours and, where it is at hand, FA3."""
    q, k, v, dout = tensors
    ours: dict[str, Any] = {**ends, "causal": causal, "backend": OURS[VERSION]}
    theirs = {**ends, "softmax_scale": q.shape[-1] ** -0.5, "is_causal": causal}
    calls: dict[str, Call] = {}
    if way == "forward":
        calls[VERSION] = lambda: (flash.attention_varlen(q, k, v, **ours),)
        if present("fa3"):
            calls["fa3"] = lambda: (fa3_ops().fwd(q, k, v, **theirs)[0],)
        return calls
    saved = flash.attention_varlen(q, k, v, return_lse=True, **{**ours, "backend": "torch"})
    calls[VERSION] = lambda: tuple(flash.attention_backward(dout, q, k, v, *saved, **ours))
    if present("fa3"):
        out, lse = fa3_ops().fwd(q, k, v, **theirs)[:2]

        def fa3() -> tuple[Tensor, ...]:
            grads = tuple(torch.empty_like(t) for t in (q, k, v))
            fa3_ops().bwd(dout, q, k, v, out, lse, *grads, **theirs)
            return grads

        calls["fa3"] = fa3
    return calls


def last_head(tensors: tuple[Tensor, ...], rows: int, causal: bool, way: str) -> tuple[Tensor, ...]:
    """fp64 of the first head of the last sequence: out, or dq dk dv."""
    q, k, v, dout = (t[None, -rows:, :1].to(torch.float64) for t in tensors)
    exact: dict[str, Any] = {"causal": causal, "backend": "reference"}
    out, lse = flash.attention(q, k, v, return_lse=True, **exact)
    if way == "forward":
        return (out,)
    return tuple(flash.attention_backward(dout, q, k, v, out, lse, **exact))


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Relative L2 error, the worst of the results."""
    worst = 0.0
    for ours, x in zip(found, exact, strict=True):
        part = ours[None, -x.shape[1] :, :1].to(torch.float64)
        worst = max(worst, float((part - x).norm() / x.norm()))
    return float(f"{worst:.3g}")


def questions(way: str, watch: Stopwatch) -> Iterator[tuple[str, Iterator[Row]]]:
    """What is asked, and its rows, measured as they are drawn."""
    for dim in (64, 128, 256):
        asked = [packed(way, dim, causal, name, watch) for causal in (False, True)
                 for name in UNEVEN]  # fmt: skip
        yield f"packed, d = {dim}", itertools.chain(*asked)
    for what, cases in groups(way).items():
        yield what, dense(what, cases, watch)


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


def by_question(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(direction, what) -> rows, in the order of their first appearance."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        way = row.get("direction", "forward")
        found.setdefault((way, row["what"]), []).append({"direction": way, **row})
    return found


def signed(row: Row) -> Row:
    """With the date, and ours with the sources that they speak of."""
    own = {"digest": sources(OURS[row["competitor"]])} if row["competitor"] in OURS else {}
    shown = (row["direction"], row["what"], row["mask"], row["length"], row["competitor"])
    print(*shown, row.get("tflops", row.get("why")), flush=True)
    return {**row, **own, "date": files.now()}


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--direction", choices=[*DIRECTIONS, "both"], default="both")
    parser.add_argument("--only", action="append", help="what holds this, as 'd = 128' or 'GQA'")
    args = parser.parse_args()
    if script.lacks_gpu("breadth"):
        return 2
    found = by_question(record.read(script.path_of(args.out, "breadth")).get("breadth", []))
    watch = Stopwatch(Board())
    for way in DIRECTIONS if args.direction == "both" else (args.direction,):
        for what, rows in questions(way, watch):
            if any(word in what for word in args.only or [""]):
                found[way, what] = [signed(row) for row in rows]
                torch.cuda.empty_cache()
                kept = [row for part in found.values() for row in part]
                script.leave(args.out, "breadth", {"breadth": kept, "tokens": TOKENS})
    return 0


if __name__ == "__main__":
    sys.exit(main())
