"""The tables of a GPU's page beyond speed: ceilings, bytes, memory, training, ideas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import host, plots
from flash.study import accuracy, timeline
from flash.study.facts import apart, by_case, picojoules, regular
from flash.study.ratios import geomean, winners
from flash.study.sources import Source

Row = dict[str, Any]
OURS = ("v1", "v2", "v3")
IDEAS = {
    "v1": "K/V blocks stay on chip, Q streams past; O, m, l go through memory once a K/V block",
    "v2": "Q blocks stay, K/V stream past; O stays in registers; CTAs along Q, warps along rows",
    "v3": "TMA and producer warps feed WGMMA; softmax of one warpgroup under the other's products",
}
OFFICIAL = {"v1": ("fa1",), "v2": ("sdpa-flash", "fa2"), "v3": ("fa3", "sdpa-cudnn", "fa4")}
LABELS = {"sdpa-flash": "SDPA flash (FA2)", "sdpa-cudnn": "cuDNN", "fa3": "FA3", "fa4": "FA4"}
DIMS = (64, 128, 256)
CLOSE = 0.15  # what a closed form may be away from a count
TITLES = {
    "speed": "TFLOP/s against length", "error": "error against length",
    "roofline": "roofline under the measured ceilings", "traffic": "bytes moved",
    "memory": "memory against length", "joules": "energy", "losses": "loss curves",
    "training": "a training step against length", "ablations": "what each idea brings",
    "timeline": "one CTA of v3's forward kernel",
}  # fmt: skip


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def picture(name: str, folder: str) -> str:
    """Light or dark as the reader's page is."""
    text = f"{name.split('_')[0]}: {TITLES[name.split('_')[0]]}"
    return (f'<picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{folder}/{name}-dark.svg"><img alt="{text}" '
            f'src="{folder}/{name}-light.svg"></picture>')  # fmt: skip


def pictures(folder: Path, link: str, wanted: Sequence[str] = ()) -> list[str]:
    """Markdown of the plots that were drawn, all or those whose names begin so."""
    names = [name for name in plots.pictures(folder / "plots")
             if not wanted or name.startswith(tuple(wanted))]  # fmt: skip
    return [picture(name, link) for name in names]


def generations(source: Source) -> str:
    """What changed from version to version, and what it brought, in this GPU's figures."""
    rows = []
    for name in OURS:
        cells = [f"`{name}`", IDEAS[name]]
        for way in ("forward", "backward"):
            row = at(source.rows, way, name)
            share = source.share(row) if row else None
            cells.append(f"{row['tflops']:.0f}" if row else "–")
            cells.append(f"{share:.0%}" if share else "–")
        counted = next((r for r in source.parts.get("traffic", []) if r["competitor"] == name
                        and (r["direction"], r["head_dim"], r["mask"]) == (
                            "forward", 128, "full")), None)  # fmt: skip
        total = counted["dram_read"] + counted["dram_write"] if counted else 0
        cells.append(f"{total / 1e9:.2f}" if counted else "–")
        load = at(source.sustained, "forward", name)
        cells.append(f"{picojoules(load):.2f}" if load and "joules" in load else "–")
        rows.append(cells)
    columns = ("", "idea", "forward", "of ceiling", "backward", "of ceiling", "DRAM GB", "pJ/FLOP")
    return markdown(columns, rows)


def officials(source: Source) -> str:
    """Each version against the official kernel of its generation, in the same races."""
    rows = []
    for name, peers in OFFICIAL.items():
        for way in ("forward", "backward"):
            ratios = dict(against(source, name, peers, way))
            if not ratios:
                continue
            used = [p for p in peers if any(r["competitor"] == p for r in source.rows)]
            cells = [geometric(v for k, v in ratios.items() if k[0] == d) for d in DIMS]
            worst = min(ratios, key=lambda k: ratios[k])
            least = f"{ratios[worst]:.2f} (d {worst[0]}, {worst[1]}, {worst[2]})"
            beside = ", ".join(LABELS.get(p, p) for p in used)
            rows.append((f"`{name}`", way, beside, *cells, geometric(ratios.values()), least))
    columns = ("", "direction", "best of", *(f"d = {d}" for d in DIMS), "all", "least")
    return markdown(columns, rows) if rows else ""


def against(
    source: Source, name: str, peers: Sequence[str], way: str
) -> Iterable[tuple[tuple[int, str, int], float]]:
    """(d, mask, S) and speed over that of the fastest peer there, 16-bit."""
    rows = [r for r in regular(source.rows) if (r["direction"], r["dtype"]) == (way, "bfloat16")]
    for key, found in by_case(rows).items():
        best = max((found[p] for p in peers if p in found), default=0.0)
        if name in found and best:
            yield key, found[name] / best


def geometric(values: Iterable[float]) -> str:
    found = list(values)
    return f"{geomean(found):.2f}" if found else "–"


def at(rows: Iterable[Row], way: str, name: str) -> Row | None:
    """The row at d = 128, full, S = 8192."""
    wanted = (way, name, 128, "full", 8192, "bfloat16")
    fields = ("direction", "competitor", "head_dim", "mask", "seqlen", "dtype")
    return next((r for r in rows if tuple(r[f] for f in fields) == wanted), None)


def ceilings(source: Source) -> str:
    rows = [(r["name"], f"{r['rate']:.4g} {r['unit']}", f"{r['per_clock_and_processor']:.4g}",
             r["clock_mhz"]) if "clock_mhz" in r else
            (r["name"], f"{r['rate']:.4g} {r['unit']}", "–", "–")
            for r in source.parts["limits"]]  # fmt: skip
    return markdown(("unit", "rate", "per clock and SM", "SM MHz"), rows)


def traffic(source: Source) -> str:
    """Closed form against what was counted, and why they differ."""
    rows = []
    for r in source.parts["traffic"]:
        l2, dram, form = at_l2(r), r["dram_read"] + r["dram_write"], r.get("closed_form") or 0
        rows.append((r["direction"], r["head_dim"], r["mask"], r["competitor"],
                     f"{form / 1e9:.2f}", f"{dram / 1e9:.2f}", f"{l2 / 1e9:.2f}",
                     f"{l2 / form:.2f}" if form else "–", f"{r['least'] / 1e9:.2f}",
                     agrees(r)))  # fmt: skip
    columns = ("direction", "d", "mask", "backend", "closed form GB", "DRAM GB", "asked of L2 GB",
               "ratio", "each tensor once GB", "closed form is")  # fmt: skip
    return markdown(columns, rows) + (
        "\n\nThe closed form counts what a kernel asks for. O, m and l of v1's forward pass go on "
        "to DRAM, so there it is DRAM's count within 15 %. Repeated reads of Q, K and V and the "
        "additions to dQ end in L2: in those rows it is L2's count within 15 %, and DRAM's is "
        "nearer to each tensor once. v1's backward schedule reads O and dQ at every visit; its "
        "kernel has delta from a first pass and adds to dQ without reading, half of and once the "
        "bytes that L2 counts as additions. Where L2 counts less than v3 asked for, SMs read a "
        "tile at the same time and shared one trip."
    )


def at_l2(row: Row) -> int:
    return int(row["l2_read"] + row["l2_write"] + row["l2_reduce"])


def agrees(row: Row) -> str:
    """Whose count the closed form is within 15 %; empty where neither and for no known reason."""
    form, l2 = row.get("closed_form") or 0, at_l2(row)

    def near(counted: float, said: float = form) -> bool:
        return abs(said / counted - 1) <= CLOSE if counted else False

    if near(row["dram_read"] + row["dram_write"]):
        return "DRAM's"
    if near(l2):
        return "L2's"
    if (row["competitor"], row["direction"]) == ("v1", "backward"):
        return "L2's, O and dQ not read" if near(l2, form - 1.5 * row["l2_reduce"]) else ""
    if row["competitor"] == "v3" and row["least"] <= l2 < form:
        return "above L2's, shared trips"
    return ""


def memory(source: Source) -> str:
    rows = source.parts["memory"]
    names = list(dict.fromkeys(r["competitor"] for r in rows))
    lines = []
    for n in sorted({r["seqlen"] for r in rows}):
        own = {r["competitor"]: r for r in rows if r["seqlen"] == n}
        lines.append((n, *(mebibytes(own[name]) for name in names)))
    return markdown(("S", *names), lines)


def mebibytes(row: Row) -> str:
    return f"{row['memory_bytes'] / 2**20:.0f}" if "memory_bytes" in row else str(row["why"])


def training(source: Source) -> str:
    rows = source.parts["steps"]
    names = list(dict.fromkeys(r["competitor"] for r in rows))
    lines = []
    for model, n in dict.fromkeys((r["model"], r["seqlen"]) for r in rows):
        own = {r["competitor"]: r for r in rows if (r["model"], r["seqlen"]) == (model, n)}
        lines.append((model, n, *(step(own.get(name)) for name in names)))
    curves = source.parts.get("curves", [])
    notes = []
    for model in dict.fromkeys(r["model"] for r in curves):
        own_curves = [r for r in curves if r["model"] == model and r.get("losses")]
        if len(own_curves) > 1:
            losses = own_curves[0]["losses"]
            notes.append(f"{model}: loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} "
                         f"steps, curves at most {apart(own_curves):.2%} apart.")  # fmt: skip
    return markdown(("model", "S", *names), lines) + "\n\n" + " ".join(notes)


def step(row: Row | None) -> str:
    if row is None:
        return "–"
    if "ms" not in row:
        return str(row["why"])
    return f"{row['ms']:.1f} ms, {row['memory_bytes'] / 2**30:.1f} GiB"


def ablations(source: Source) -> str:
    rows = [(f"`{r['version']}`", r["without"], r["case"], f"{r['tflops']:.0f}",
             f"{r['baseline']:.0f}", f"{r['tflops'] / r['baseline']:.0%}")
            for r in source.parts["ablations"]]  # fmt: skip
    return markdown(("", "without", "case", "TFLOP/s", "with", "share"), rows)


def quantization(source: Source) -> str:
    rows = [(r["without"], f"{r['rmse']:.2e}", f"{r['baseline']:.2e}",
             f"{r['rmse'] / r['baseline']:.2f}") for r in source.parts["fp8"]]  # fmt: skip
    return markdown(("without", "RMSE", "with both", "ratio"), rows) + (
        "\n\nN(0, 1) with one value in a thousand ten times as large, d = 128, in exact arithmetic "
        "after rounding to e4m3."
    )


def fp8_errors(source: Source) -> str:
    """RMSE by who shares a scale, all lengths."""
    return markdown(accuracy.COLUMNS, accuracy.lines(source.parts["accuracy"])) + (
        "\n\nRMSE of O, and its share of O, against fp64 of the inputs in bf16 before they are "
        "quantized, full mask. outliers: N(0,1) + N(0,100) x Bernoulli(0.001). turned: random "
        "signs and a Hadamard matrix on Q and K. head: one scale per head, as FlashAttention-3's "
        "kernel takes."
    )


def quantizer(source: Source) -> str:
    rows = source.parts["quantizer"]
    lines = []
    for dim, dtype in dict.fromkeys((r["head_dim"], r["dtype"]) for r in rows):
        own = {r["tensor"]: r["tb_per_s"] for r in rows
               if (r["head_dim"], r["dtype"]) == (dim, dtype)}  # fmt: skip
        cells = [f"{own[name]:.2f} ({own[name] / own['copy']:.0%})" if name in own else "–"
                 for name in ("V", "V by keys", "Q, K")]  # fmt: skip
        lines.append((dim, dtype, *cells, f"{own['copy']:.2f}"))
    return markdown(("d", "dtype", "V TB/s", "V by keys", "Q, K", "copy"), lines)


def roles(source: Source) -> str:
    """The timeline in words."""
    text = timeline.summary(source.parts["timeline"])
    return "\n".join(f"- {line}" for line in text.splitlines())


def host_time(source: Source) -> str:
    """Microseconds of the host, and of PyTorch's flash backend; the GPU is not waited for."""
    return markdown(("", "layout", *host.WAYS), host.lines(source.parts["host"]))


def spread(source: Source) -> str:
    """Forward and backward of context parallel attention; linear is the share computed alone."""
    columns = ("GPUs", "tokens", "way", "ms", "of linear scaling", "TFLOP/s per GPU", "peak GiB")
    return markdown(columns, [
        (
            row["gpus"], row["tokens"], row["name"], f"{row['ms']:.0f}",
            f"{row['linear']:.1%}" if row.get("linear") else "–", f"{row['tflops']:.0f}",
            row.get("gib", "–"),
        )
        for row in source.parts["spread"] if "ms" in row
    ])  # fmt: skip


def sections(source: Source) -> list[tuple[str, str]]:
    """(heading, table) of everything that was measured."""
    found = []
    won = winners(source.device, source.rows)
    if won:
        table = markdown(("cases", "fastest", "ahead by"), [line[1:] for line in won])
        found.append(("Which generation wins where", table))
    makers = (
        ("limits", "Ceilings of this GPU, `python -m bench.limits`", ceilings),
        ("traffic", "Bytes moved, `python -m bench.dram`", traffic),
        ("memory", "MiB of a forward and backward pass, `python -m bench.memory`", memory),
        ("steps", "A training step of four layers, `python -m bench.end_to_end`", training),
        ("ablations", "Without one idea, `python -m bench.ablations`", ablations),
        ("fp8", "FP8 without one idea, error against fp64", quantization),
        ("accuracy", "FP8: error against fp64, `python -m bench.fp8`", fp8_errors),
        ("quantizer", "FP8: reading and writing Q, K and V once, of copying", quantizer),
        ("host", "Host µs of a call at B = 1, S = 64 (of SDPA's)", host_time),
        ("timeline", "Roles of one CTA of v3's forward kernel, `python -m bench.trace`", roles),
        ("spread", "One sequence over several GPUs, `torchrun -m bench.context_parallel`", spread),
    )
    for part, heading, make in makers:
        if source.parts.get(part):
            found.append((heading, make(source)))
    return found
