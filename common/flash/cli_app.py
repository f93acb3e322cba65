"""flash doctor, explain, demo and verify: tables for people, `--json` for machines."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from flash import cli_tables as tables
from flash.checks import check_head_dim
from flash.cli_common import (
    AsJson,
    Dtype,
    chosen_device,
    fail,
    numbers,
    progress,
    say,
    say_json,
    sides,
)
from flash.cli_study import bench, compare, report, trace
from flash.errors import FlashError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Three generations of exact attention behind one call.",
)
for command in (bench, compare, report, trace):
    app.command()(command)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What runs on this machine, and what stands in the way. Exit code 1: a problem to mend."""
    from flash import doctor as examination

    if as_json:
        facts = examination.facts()
        say_json(facts)
        raise typer.Exit(0 if facts["ok"] else 1)
    findings = examination.examine()
    say(tables.doctor(findings))
    raise typer.Exit(0 if examination.healthy(findings) else 1)


@app.command()
def demo(
    seqlen: Annotated[int, typer.Option(min=1, help="rows of Q and of K/V")] = 1024,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: Annotated[int, typer.Option(min=8, max=256)] = 64,
    dtype: Dtype = Dtype.fp16,
    causal: Annotated[bool, typer.Option(help="bottom-right causal mask")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """The three generations on the same inputs, held against exact attention."""
    from flash import demo as demonstration

    if dtype is Dtype.e4m3:
        raise fail("the demonstration draws 16- or 32-bit inputs; flash.quantize_fp8 makes FP8")
    try:
        check_head_dim("--head-dim", head_dim)
    except FlashError as error:
        raise fail(error) from error
    where = chosen_device(device)
    setting = demonstration.Setting(
        batch, seqlen, heads, head_dim, dtype.torch, causal, where, seed
    )
    with progress().status("drawing inputs") as status:
        lines = list(demonstration.lines(setting, lambda text: status.update(text)))
    exact = demonstration.exact_flops(setting)
    if as_json:
        say_json({"setting": setting.describe(), "exact_flops": exact,
                  "lines": [line.as_dict() for line in lines]})  # fmt: skip
        return
    say(tables.demo(setting, lines, exact))
    say(tables.pictures(setting))


@app.command()
def verify(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Dtype = Dtype.bf16,
    seconds: Annotated[float, typer.Option(min=1, help="stop after this long")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Self-test of this GPU or CPU in a minute. Exit code 1: a result was wrong."""
    from rich.progress import Progress

    from flash import verify as selftest

    if dtype is Dtype.e4m3:
        raise fail("the self-test compares with PyTorch, which has no FP8 attention")
    where = chosen_device(device)
    outcomes, planned = [], len(selftest.checks(where, dtype.torch))
    left_out = selftest.available(where, dtype.torch)[1]
    with Progress(console=progress(), transient=True) as bar:
        task = bar.add_task("checking", total=planned)
        for number, _, outcome in selftest.run(where, dtype.torch, seconds):
            bar.update(task, completed=number, description=f"{outcome.backend} {outcome.check}")
            outcomes.append(outcome)
    good = bool(outcomes) and all(outcome.passed for outcome in outcomes)
    if as_json:
        say_json({"device": where, "dtype": dtype.value, "ok": good, "planned": planned,
                  "left_out": left_out, "outcomes": [o.as_dict() for o in outcomes]})  # fmt: skip
    else:
        say(tables.verify(where, dtype.value, outcomes, planned, left_out))
    raise typer.Exit(0 if good else 1)


@app.command()
def explain(
    q: Annotated[str, typer.Option(help="batch,seqlen,heads,head_dim")] = "4,4096,32,128",
    kv_heads: Annotated[int | None, typer.Option(min=1, help="heads of K and V")] = None,
    seqlen_k: Annotated[int | None, typer.Option(min=0, help="rows of K and V")] = None,
    head_dim_v: Annotated[int | None, typer.Option(min=1)] = None,
    dtype: Dtype = Dtype.bf16,
    causal: bool = False,
    top_left: Annotated[bool, typer.Option(help="causal from the first row and key")] = False,
    window: Annotated[str | None, typer.Option(help="left,right; none: no limit")] = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: Annotated[str, typer.Option(help="auto, v1, v2, v3, torch or reference")] = "auto",
    arch: Annotated[str | None, typer.Option(help="sm_80, 9.0, cpu, ...; no GPU needed")] = None,
    picture: Annotated[bool, typer.Option(help="the mask by tiles")] = False,
    as_json: AsJson = False,
) -> None:
    """Which generation runs, why the others do not, and what it costs. Needs no GPU."""
    import flash

    batch, seqlen, heads, dim = numbers("--q", q, 4)
    if min(batch, seqlen, heads, dim) < 0:
        raise fail(f"--q takes sizes of at least 0, got {q!r}")
    rows = seqlen if seqlen_k is None else seqlen_k
    shapes = [(batch, seqlen, heads, dim), *((batch, rows, kv_heads or heads, d)
              for d in (dim, head_dim_v or dim))]  # fmt: skip
    inputs = [torch.empty(shape, dtype=dtype.torch, device="meta") for shape in shapes]
    options: dict[str, Any] = {
        "causal": "top-left" if top_left else causal,
        "window": None if window is None else sides(window),
        "softcap": softcap,
        "deterministic": deterministic,
        "backend": backend,
    }
    try:
        found = flash.explain(*inputs, **options, arch=arch)
    except FlashError as error:
        raise fail(error) from error
    if as_json:
        say_json(found.as_dict())
        return
    print(found)
    if picture:
        print(tables.mask_picture(inputs, options))
