"""Which figures are of the kernels as they are now is read from the records, not remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import ages, digest, proof_tables, record, tables
from bench.digest import VERSIONS

NOW = {version: digest.digest(version) for version in VERSIONS}


def row(name: str, sources: str, date: str = "2026-01-02T03:04:05Z") -> dict[str, Any]:
    return {"competitor": name, "digest": sources, "date": date}


def test_rows_say_of_which_sources_they_are(tmp_path: Path) -> None:
    rows = [row("v2", NOW["v2_parallel"]), row("v3", "old"), row("v3", NOW["v3_hopper"]),
            row("fa3", ""), row("v1", "old", "2025-12-31T00:00:00Z")]  # fmt: skip
    record.write(tmp_path / "forward_bfloat16.json", {"rows": rows, "digests": NOW})
    ((name, when, verdicts),) = ages.studies(tmp_path)
    assert (name, when) == ("forward_bfloat16", "2025-12-31 to 2026-01-02")
    assert list(verdicts.values()) == [ages.EARLIER, ages.PRESENT, ages.BOTH]
    assert f"forward speed ({when}: v1_tiling, v3_hopper)" in ages.sentence(tmp_path)
    assert f"| forward speed | {when} | earlier | present | some" in ages.table(tmp_path)


def test_a_file_says_it_for_all_its_rows(tmp_path: Path) -> None:
    content = {"dram": [{"gb": 1}], "digests": NOW, "date": "2026-01-02T03:04:05Z"}
    record.write(tmp_path / "dram.json", content)
    record.write(tmp_path / "timeline.json", {**content, "digests": {**NOW, "v1_tiling": "old"}})
    record.write(tmp_path / "limits.json", {"limits": [], "date": "2026-01-02T03:04:05Z"})
    assert ages.sentence(tmp_path) == "Every figure is of the kernels as they are now."
    record.write(tmp_path / "memory.json", {"memory": [], "date": "2026-01-02T03:04:05Z"})
    assert ages.sentence(tmp_path).endswith("Of earlier ones: memory (2026-01-02 03:04).")
    assert "| memory | 2026-01-02 03:04 | not recorded |" in ages.table(tmp_path)


def test_every_recorded_file_has_a_name() -> None:
    for folder in tables.folders(record.RESULTS):
        assert {path.stem for path in folder.glob("*.json")} <= ages.NAMES.keys()


def test_what_the_proofs_have_reached(tmp_path: Path) -> None:
    assert proof_tables.reached(tmp_path).count("none of") == 2 * len(VERSIONS)
    sanitizer = [
        {"version": v, "digest": NOW[v], "tool": "racecheck",
         "kernels": [list(k) for k in sorted(proof_tables.listed(v))][v == "v3_hopper":]}
        for v in VERSIONS
    ]  # fmt: skip
    record.write(tmp_path / "sanitizer.json", {"sanitizer": sanitizer})
    said = proof_tables.reached(tmp_path, ("racecheck",))
    count = len(proof_tables.listed("v3_hopper"))
    assert said.startswith("compute-sanitizer has seen every kernel of `v1_tiling` and `v2_par")
    assert f", {count - 1} of {count} of `v3_hopper` as they are now with all its 1" in said
    both = proof_tables.reached(tmp_path, ("racecheck", "memcheck"))
    assert "Of `v2_parallel`, all by racecheck." in both
    assert "Of `v3_hopper`" not in both
