"""What a GPU showed must speak of the kernels as they are now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import digest, record, study_tables
from bench.proof_tables import listed

REFRESH = "run `python -m bench.gpu_check --tests` on a GPU and commit bench/results"
FILES = sorted(record.RESULTS.glob("*/*.json"))
WITH_KERNELS = [version for version in digest.VERSIONS if digest.has_kernels(version)]


def runs_of(version: str) -> list[dict[str, Any]]:
    """Every recorded GPU test run of a version."""
    records = (record.read(path) for path in record.RESULTS.glob("*/tests.json"))
    return [found["versions"][version] for found in records if version in found["versions"]]


def whole(run: dict[str, Any], version: str) -> bool:
    """All tests that speak of the version ran: a selection of them would prove less."""
    selected = run["command"].partition(" -k ")[2]
    short = version.partition("_")[0]
    return selected in ("", f"{short}_ or {short}-")


def passing(version: str) -> list[dict[str, Any]]:
    """The recorded runs of the present sources in which every test passed."""
    current = {"digest": digest.digest(version), "build": digest.build()}
    return [
        run for run in runs_of(version)
        if current.items() <= run.items() and run["passed"] and not run["failed"]
        and whole(run, version)
    ]  # fmt: skip


@pytest.mark.parametrize("version", WITH_KERNELS)
def test_gpu_tests_passed_on_these_sources(version: str) -> None:
    """Or bench/results/pending.json says, for exactly these sources, that and why they have not."""
    entry = record.pending().get(version)
    if entry is None:
        assert passing(version), f"no passing GPU run of {version} as it is: {REFRESH}"
    else:
        assert entry["digest"] == digest.digest(version), f"{version} has changed: {REFRESH}"
        assert len(entry["why"]) > 20, "why has to be told"
        assert entry["why"] in (digest.ROOT / "README.md").read_text(), "the README must tell it"
        assert not passing(version), f"{version} has passed: remove it from {record.PENDING}"


@pytest.mark.parametrize("version", WITH_KERNELS)
def test_gpu_tests_covered_every_kernel(version: str) -> None:
    runs = passing(version) if version not in record.pending() else runs_of(version)
    tested = {tuple(row) for run in runs for row in run["kernels"]}
    missing = listed(version) - tested
    assert not missing, f"{version}: kernels no GPU has tested: {sorted(missing)}; {REFRESH}"


def test_a_selection_of_the_tests_is_no_evidence() -> None:
    for run in runs_of("v3_hopper"):
        assert whole(run, "v3_hopper")
        assert whole({"command": "python -m pytest tests/gpu -q"}, "v3_hopper")
        assert not whole({"command": f"{run['command']} and causal"}, "v3_hopper")
        assert not whole(run, "v2_parallel")


def test_records_name_their_machine() -> None:
    for path in FILES:
        environment = record.read(path)["environment"]
        assert {"gpu", "torch", "cuda", "compute_capability"} <= environment.keys()
        assert path.parent.name == record.slug(environment["gpu"])


def rows() -> Iterator[dict[str, Any]]:
    for path in FILES:
        yield from record.read(path).get("rows", [])


def test_rows_are_whole() -> None:
    for row in rows():
        assert row["ms"] > 0
        assert row["tflops"] > 0
        assert row["date"]
        if row["competitor"] in ("v1", "v2", "v3"):
            assert row["digest"], "our own figures name the sources they speak of"


def test_figures_agree_with_each_other() -> None:
    """TFLOP/s follow from the time and the shape, with pairs counted exactly."""
    for row in rows():
        n = row["seqlen"]
        pairs = n * n if row["mask"] == "full" else n * (n + 1) // 2
        flops = 4 * row["batch"] * row["heads"] * row["head_dim"] * pairs
        flops *= 2.5 if row["direction"] == "backward" else 1
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9, rel=2e-3)


def test_bytes_are_those_of_the_closed_form_or_explained() -> None:
    counted = [row for path in FILES for row in record.read(path).get("traffic", [])]
    assert not [row for row in counted if not study_tables.agrees(row)]


def test_record_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "forward_bfloat16.json"
    row = {"head_dim": 64, "competitor": "v2", "ms": 2.0}
    rows = record.merge([{"head_dim": 64, "competitor": "v2", "ms": 1.0}], row,
                        ("head_dim", "competitor"))  # fmt: skip
    record.write(path, {"environment": {"gpu": "x"}, "rows": rows})
    assert record.read(path) == {"environment": {"gpu": "x"}, "rows": [row]}


def test_merge_keeps_other_rows() -> None:
    old = [{"head_dim": 128, "ms": 1.0}, {"head_dim": 64, "ms": 1.0}]
    assert record.merge(old, {"head_dim": 256, "ms": 3.0}, ("head_dim",)) == [
        {"head_dim": 64, "ms": 1.0}, {"head_dim": 128, "ms": 1.0}, {"head_dim": 256, "ms": 3.0}
    ]  # fmt: skip


def test_slug() -> None:
    assert record.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
