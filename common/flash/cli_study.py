"""flash bench, compare, report and trace: figures measured, held together, and drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flash import cli_tables as tables
from flash.cli_common import (
    AsJson,
    Dtype,
    chosen_device,
    fail,
    load,
    load_rows,
    numbers,
    progress,
    say,
    say_json,
    sides,
)
from flash.errors import FlashError
from flash.study import files
from flash.study.cases import DIRECTIONS, PRESETS, Case, expand

INTERRUPTED = 130
Row = dict[str, Any]


def shapes(
    given: list[str], causal: bool, window: str | None, softcap: float, seqlens: str | None,
    rare: dict[str, int | None],
) -> list[Case]:  # fmt: skip
    """The cases of --shape and of the options that describe it."""
    if not given and (causal or window or softcap or seqlens or any(rare.values())):
        raise fail("no --shape for the options that describe one; a --preset has its own")
    found = []
    for text in given:
        batch, seqlen, heads, dim = numbers("--shape", text, 4)
        for length in [seqlen] if seqlens is None else numbers_of("--seqlen", seqlens):
            if min(batch, length, heads, dim) < 1:
                raise fail(f"--shape and --seqlen want sizes of at least 1, got {text!r}, {length}")
            case = Case("forward", "bfloat16", batch, length, heads, dim, causal, softcap=softcap,
                        window=None if window is None else (sides(window)[0], sides(window)[1]),
                        **rare)  # fmt: skip
            try:
                case.check()
            except FlashError as error:
                raise fail(error) from error
            found.append(case)
    return found


def numbers_of(name: str, text: str) -> list[int]:
    return numbers(name, text, text.count(",") + 1)


def chosen_backends(asked: str, device: str) -> list[str]:
    from flash.study.competitors import NAMES, present
    from flash.study.measure import choose

    found = choose(asked, device)
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise fail(f"--backend: no {unknown[0]!r}; all, ours, or of {', '.join(NAMES)}")
    absent = [name for name in found if not present(name)]
    if absent:
        raise fail(f"--backend: {absent[0]} is not installed here; see flash doctor")
    return found


def listing() -> Any:
    from flash.study.competitors import NAMES, TITLES, present

    presets = [(name, text, len(cases)) for name, (text, cases) in PRESETS.items()]
    backends = [(name, TITLES[name], "" if present(name) else "not installed") for name in NAMES]
    return Group(tables.table("Presets", ("preset", "what", "Cases"), presets),
                 tables.table("Backends", ("backend", "what", "here"), backends))  # fmt: skip


def bench(
    preset: Annotated[list[str] | None, typer.Option(help="a name from --list; repeatable")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="batch,seqlen,heads,head_dim")] = None,
    seqlen: Annotated[str | None, typer.Option(help="lengths in place of the shape's")] = None,
    seqlen_k: Annotated[int | None, typer.Option(min=1, help="keys of the shape")] = None,
    heads_kv: Annotated[int | None, typer.Option(min=1, help="heads of K and V")] = None,
    head_dim_v: Annotated[int | None, typer.Option(min=1)] = None,
    causal: bool = False,
    window: Annotated[str | None, typer.Option(help="left,right; none: no limit")] = None,
    softcap: float = 0.0,
    backend: Annotated[str, typer.Option(help="all, ours, or names: v1,v3,sdpa-flash")] = "all",
    direction: Annotated[str, typer.Option(help="forward, backward or both")] = "forward",
    dtype: Annotated[Dtype | None, typer.Option(help="in place of the preset's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    budget_ms: Annotated[float, typer.Option(min=1, help="timed ms a row")] = 60.0,
    sustained: Annotated[float, typer.Option(min=0, help="seconds of load a row, too")] = 0.0,
    columns: Annotated[str, typer.Option(help="of the table; --columns all")] = "",
    limits: Annotated[Path | None, typer.Option(help="file of python -m bench.limits")] = None,
    out: Annotated[Path | None, typer.Option(help="write JSON here, row by row")] = None,
    csv: Annotated[Path | None, typer.Option(help="write CSV here")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="presets and backends")] = False,
    as_json: AsJson = False,
) -> None:
    """Time backends side by side, with each one's error. Ctrl-C keeps what was measured."""
    if list_names:
        say(listing())
        return
    where = chosen_device(device)
    unknown = [name for name in preset or [] if name not in PRESETS]
    if unknown:
        raise fail(f"--preset: no {unknown[0]!r}; one of {', '.join(PRESETS)}")
    if direction not in (*DIRECTIONS, "both"):
        raise fail(f"--direction must be forward, backward or both, got {direction!r}")
    rare = {"seqlen_k": seqlen_k, "heads_kv": heads_kv, "head_dim_v": head_dim_v}
    cases = [case for name in preset or [] for case in PRESETS[name][1]]
    cases += shapes(shape or [], causal, window, softcap, seqlen, rare)
    cases = cases or PRESETS["small" if where == "cpu" else "papers"][1]
    ways = DIRECTIONS if direction == "both" else (direction,)
    wanted = expand(cases, ways, None if dtype is None else str(dtype.torch).split(".")[1])
    shown = tables.bench_columns(columns)
    if isinstance(shown, str):
        raise fail(shown)
    hint = "python -m bench.limits in a clone on a GPU writes one"
    peaks = [] if limits is None else load(limits, "limits", hint)["limits"]
    content, whole = race(wanted, chosen_backends(backend, where), where, budget_ms, sustained, out)
    if peaks:
        add_shares(content, peaks)
        if out is not None:
            files.write(out, content)
    if csv is not None:
        csv.write_text(files.to_csv(content["rows"]))
    if as_json:
        print(files.text_of(content), end="")
    else:
        say(tables.bench(content, shown))
    raise typer.Exit(0 if whole else INTERRUPTED)


def add_shares(content: Row, limits: list[Row]) -> None:
    """Each rate as a share of what its instructions give at most here."""
    from flash.study.sources import Source

    source = Source("here", parts={"limits": limits})
    for row in content["rows"]:
        share = source.share(row) if row["ran"] != "schedule" else None
        if share is not None:
            row["share"] = float(f"{share:.3g}")


def race(
    cases: list[Case], names: list[str], device: str, total_ms: float, sustained: float,
    out: Path | None,
) -> tuple[Row, bool]:  # fmt: skip
    """Everything measured, and whether nobody interrupted."""
    from flash.study import measure

    how = measure.Settings(device, total_ms, sustained)
    rows: list[Row] = []
    skipped: list[Row] = []
    content = measure.content(rows, skipped, how, "flash " + " ".join(sys.argv[1:]))
    bar = Progress(SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn(),
                   TextColumn("{task.completed}/{task.total}"), console=progress(),
                   transient=True)  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(cases))
        try:
            for found in measure.run(
                cases, names, how, lambda n, text: bar.update(task, completed=n, description=text)
            ):
                rows += found.rows
                skipped += [{**found.case.key(), "competitor": name, "why": why}
                            for name, why in found.skipped.items()]  # fmt: skip
                if out is not None:
                    files.write(out, content)
        except KeyboardInterrupt:
            bar.console.print(f"interrupted: {len(rows)} rows of {len(cases)} cases are kept")
            return content, False
    return content, True


def compare(
    before: Annotated[Path | None, typer.Argument(help="a result file")] = None,
    after: Annotated[Path | None, typer.Argument(help="the file to hold against it")] = None,
    model: Annotated[str | None, typer.Option(help="or a GPU's datasheet: A100, H100, ...")] = None,
    threshold: Annotated[float, typer.Option(min=0, help="percent that counts as a change")] = 3.0,
    fail_on_regression: Annotated[bool, typer.Option(help="exit code 1")] = False,
    markdown: Annotated[bool, typer.Option(help="for a pull request")] = False,
    fp8: Annotated[bool, typer.Option(help="instead: FP8's errors, measured here")] = False,
    head_dim: Annotated[int, typer.Option(min=1, help="of --fp8")] = 128,
    seqlens: Annotated[str, typer.Option("--seqlen", help="of --fp8")] = "512,2048",
    as_json: AsJson = False,
) -> None:
    """Two result files row by row: ratio with its interval, regressions first.

    With --fp8 no files: every way to quantize beside bf16, against fp64 of the same inputs.
    """
    from flash.study import modelled, ratios

    if fp8:
        if before is not None:
            raise fail("compare --fp8 measures; it takes no result files")
        say_accuracy(head_dim, numbers_of("--seqlen", seqlens), as_json)
        return
    if before is None or (after is None) == (model is None):
        raise fail("compare takes two result files, or one and --model GPU")
    first = load_rows(before)
    if after is not None:
        second = load_rows(after)
    else:
        try:
            second = modelled.content(first, str(model))
        except KeyError as error:
            raise fail(f"--model: no datasheet of {model!r}; one of {error.args[0]}") from error
    found = ratios.compare(first, second, threshold / 100)
    if as_json:
        say_json(found.as_dict())
    elif markdown:
        print(found.markdown())
    else:
        say(tables.comparison(found))
    raise typer.Exit(int(fail_on_regression and bool(found.regressions)))


def say_accuracy(head_dim: int, seqlens: list[int], as_json: bool) -> None:
    from flash.study import accuracy

    if min(seqlens) < 1:
        raise fail("--seqlen wants lengths of at least 1")
    device = chosen_device("auto")
    samples = accuracy.SAMPLES if device == "cuda" else accuracy.SAMPLES_CPU
    rows = []
    try:
        with progress().status("measuring errors") as status:
            for found in accuracy.study(accuracy.INPUTS, [head_dim], seqlens, device, samples):
                rows += found
                status.update(f"measured S = {found[0]['seqlen']}")
    except (FlashError, ValueError) as error:
        raise fail(error) from error
    if as_json:
        say_json({"device": device, "rows": rows})
    else:
        say(tables.accuracy(rows, device))


def report(
    results: Annotated[list[Path] | None, typer.Argument(help="result files or folders")] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("flash-report.html"),
    plots: Annotated[Path | None, typer.Option(help="folder for SVG and PNG as well")] = None,
) -> None:
    """One self-contained HTML page of plots and tables. Needs matplotlib, and no GPU."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise fail("report needs matplotlib: pip install 'flash-generations[bench]'")
    from flash.study import page

    given = results or [Path("bench/results")]
    for path in given:
        if not path.exists():
            raise fail(f"no results at {path}; flash bench --out FILE makes some")
    try:
        sources = page.collect(given)
    except (FlashError, ValueError) as error:
        raise fail(f"a file of {', '.join(map(str, given))} is no result file: {error}") from error
    if not sources:
        raise fail(f"no rows in {', '.join(map(str, given))}")
    written = page.write(sources, out, plots)
    for path in written:
        progress().print(f"wrote {path}", highlight=False, soft_wrap=True)


def trace(
    results: Annotated[Path, typer.Argument(help="timeline.json of python -m bench.trace")],
    perfetto: Annotated[Path | None, typer.Option(help="write a file for ui.perfetto.dev")] = None,
    picture: Annotated[Path | None, typer.Option(help="write .svg or .png")] = None,
    as_json: AsJson = False,
) -> None:
    """One CTA of v3's forward kernel: who did what when. Measured by `python -m bench.trace`."""
    from flash.study import timeline

    hint = "python -m bench.trace in a clone on a GPU writes one"
    rows = load(results, "timeline", hint)["timeline"]
    if perfetto is not None:
        timeline.write_perfetto(rows, perfetto)
    if picture is not None:
        from flash.study.page import render
        from flash.study.plots_ablations import timeline as draw
        from flash.study.sources import collect
        from flash.study.style import LIGHT

        figure = draw(collect([results])[0], LIGHT)
        assert figure is not None
        picture.write_bytes(render(figure, picture.suffix.removeprefix(".")))
    print(json.dumps(timeline.perfetto(rows)) if as_json else timeline.summary(rows))
