"""The report: drawn from data alone, self-contained, in light and dark, with labels apart."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import plots as evidence
from flash import cli_app
from flash.study import files, page, plots_more, style
from flash.study.cases import paper
from flash.study.measure import describe
from flash.study.sources import Source, collect

GPU = {"gpu": "NVIDIA Test", "torch": "2", "cuda": "13", "compute_capability": "9.0"}


def speeds() -> list[dict[str, Any]]:
    found = []
    for direction in ("forward", "backward"):
        for dim in (64, 128):
            for causal in (False, True):
                for n in (512, 2048, 8192):
                    case = paper(direction, "bfloat16", dim, causal, n)
                    for place, name in enumerate(("v1", "v2", "v3", "sdpa-flash")):
                        tflops = 200.0 + 50 * place
                        found.append({
                            **case.key(), "competitor": name, "ran": "kernel", "tflops": tflops,
                            "ms": case.flops / tflops / 1e9, "error": 2e-3, "date": "2026-01-01",
                        })  # fmt: skip
    return found


def other_parts() -> dict[str, list[dict[str, Any]]]:
    limits = [{"name": name, "unit": "x/s", "rate": rate, "clock_mhz": 1700,
               "per_clock_and_processor": 5.0} for name, rate in
              (("wgmma bf16", 8e14), ("mma.sync", 6e14), ("memory read", 4e12))]  # fmt: skip
    names, lengths = ("standard", "v1", "v2", "v3"), (1024, 2048, 4096)
    memory = [{"competitor": name, "seqlen": n, "heads": 2, "head_dim": 64, "memory_bytes": n * n}
              for name in names for n in lengths]  # fmt: skip
    memory[2] = {"competitor": "standard", "seqlen": 4096, "heads": 2, "head_dim": 64,
                 "why": "out of memory"}  # fmt: skip
    curves = [{"model": "M", "competitor": name, "losses": [3.0, 2.0, 1.0]} for name in names]
    steps = [{"model": "M", "competitor": name, "seqlen": n, "ms": 1.0 * n, "memory_bytes": n}
             for name in names for n in lengths]  # fmt: skip
    traffic = [{**paper("forward", "bfloat16", 64, False, 4096).key(), "competitor": name,
                "dram_read": 5, "dram_write": 5, "l2_read": 5, "l2_write": 5, "l2_reduce": 0,
                "closed_form": 12, "least": 9} for name in ("v1", "v2", "v3")]  # fmt: skip
    ablations = [{"version": "v3", "without": "ping-pong", "case": "c", "tflops": 9.0,
                  "baseline": 10.0}]  # fmt: skip
    timeline = [{"role": "producer", "what": "load", "begin": 0, "end": 9}]
    return {"limits": limits, "memory": memory, "curves": curves, "steps": steps,
            "traffic": traffic, "ablations": ablations, "timeline": timeline}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "nvidia-test"
    loaded = [{**row, "joules": 1.0} for row in speeds() if row["seqlen"] == 8192]
    files.write(folder / "forward_bfloat16.json", {"environment": GPU, "rows": speeds()})
    files.write(folder / "sustained.json", {"environment": GPU, "rows": loaded})
    for name, part in other_parts().items():
        files.write(folder / f"{name}.json", {"environment": GPU, name: part})
    return folder.parent


def test_the_page_is_self_contained(results: Path, tmp_path: Path) -> None:
    out, drawn = tmp_path / "report.html", tmp_path / "drawn"
    asked = ["report", str(results), "--out", str(out), "--plots", str(drawn)]
    assert CliRunner().invoke(cli_app.app, asked).exit_code == 0
    text = out.read_text()
    assert not re.findall(r'(?:src|href)=["\']?(?!data:)\w', text)
    for theme in ("light", "dark"):
        assert text.count(f"<img class={theme} ") == 12
        for kind in ("svg", "png"):
            assert len(list(drawn.rglob(f"*-{theme}.{kind}"))) == 12
    assert "Which generation wins where" in text
    assert "Ceilings of this GPU" in text
    assert describe(paper("backward", "bfloat16", 128, True, 512)) in text


def test_pictures_are_the_same_for_the_same_data(results: Path) -> None:
    source = collect([results])[0]
    for theme in style.THEMES:
        first, second = (page.render(plots_more.roofline(source, theme), "svg") for _ in "ab")
        assert first == second


def test_pictures_are_the_same_whatever_strings_hash_to(results: Path) -> None:
    """Sets come in another order in another process: none may reach a picture."""
    code = (
        "import pathlib, sys\n"
        "from flash.study import page, plots_more, sources, style\n"
        "(source,) = sources.collect([pathlib.Path(sys.argv[1])])\n"
        "sys.stdout.buffer.write(page.render(plots_more.roofline(source, style.LIGHT), 'svg'))"
    )
    found = [
        subprocess.run([sys.executable, "-c", code, str(results)], check=True, capture_output=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in "123"
    ]  # fmt: skip
    assert found[0].startswith(b"<?xml")
    assert found[0] == found[1] == found[2]


def test_a_part_that_was_not_measured_is_left_out() -> None:
    assert not list(page.drawings(Source("nothing")))
    only = Source("one", rows=[row for row in speeds() if row["seqlen"] == 512])
    assert not [name for name, *_ in page.drawings(only) if name.startswith("speed")]


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.0, 0.01, 0.02], [0.99, 1.0, 1.0], [0.2]])
def test_labels_keep_their_distance(places: list[float]) -> None:
    found = style.spread(places, 0.1, 0.0, 1.0)
    ordered = sorted(found)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= -1e-9
    assert ordered[-1] <= 1 + 1e-9
    assert sorted(range(len(places)), key=lambda i: places[i]) == sorted(
        range(len(places)), key=lambda i: found[i]
    )


def boxes(figure: Any) -> list[Any]:
    """Where the words are, tick labels included."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [t for ax in figure.axes for t in ax.texts if t.get_text()] + list(figure.texts)
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            shown = [tick for tick in axis.get_major_ticks()
                     if min(low, high) <= tick.get_loc() <= max(low, high)]  # fmt: skip
            texts += [tick.label1 for tick in shown if tick.label1.get_text()]
        texts += [t for t in (ax._left_title, ax.title) if t.get_text()]
    return [t.get_window_extent(renderer) for t in texts if t.get_visible()]


def test_no_words_overlap_and_none_leave_the_picture(results: Path) -> None:
    source = collect([results])[0]
    for name, draw in page.plans(source):
        figure = draw(source, style.LIGHT)
        assert figure is not None, name
        found = boxes(figure)
        for i, box in enumerate(found):
            assert box.x0 >= -1, name
            assert box.x1 <= figure.bbox.x1 + 1, name
            for other in found[i + 1 :]:
                across = min(box.x1, other.x1) - max(box.x0, other.x0)
                down = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(across, down) < 2.5, f"{name}: {box} touches {other}"
        style.plt.close(figure)


def test_committed_pictures_show_the_data() -> None:
    names = [folder.as_posix() for folder in evidence.stale()]
    assert not names, f"stale: {names}; run `python -m bench.plots`"
    for folder in evidence.folders():
        assert evidence.pictures(folder)


@pytest.mark.parametrize(
    "arguments",
    [["report", "{}"], ["trace", "{}"], ["trace", "missing.json"], ["compare", "{}", "{}"],
     ["bench", "--backend", "v1", "--limits", "{}"],
     ["bench", "--backend", "v1", "--limits", "missing.json"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("text", ["# a page", "[1]", '{"environment": 1'])
def test_what_is_no_result_file_is_bad_usage(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    found = CliRunner().invoke(cli_app.app, [word.format(path) for word in arguments])
    assert found.exit_code == 2
    assert "Traceback" not in found.output
    assert found.stdout == ""


def test_an_edited_picture_is_stale(tmp_path: Path) -> None:
    folder = tmp_path / "gpu" / "plots"
    files.write(tmp_path / "gpu" / "a.json", {"environment": GPU, "rows": speeds()})
    (source,) = collect([tmp_path / "gpu" / "a.json"])
    files.write(folder / evidence.FINGERPRINT, evidence.fingerprints(folder, source))
    assert not evidence.stale(tmp_path)
    (folder / "speed-light.svg").write_text("<svg/>")
    assert evidence.stale(tmp_path) == [folder]
