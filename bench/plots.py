"""Draws bench/results/<gpu>/plots from the data there: `python -m bench.plots`.

Beside the pictures stands a fingerprint of the figures they show, and one of themselves, so that a
test without matplotlib can tell when they are stale or were edited.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from bench import record
from flash.study.sources import Source, collect

FINGERPRINT = "fingerprint.json"
VOLATILE = ("date", "command", "repro", "calls")  # no plot shows them


def fingerprint(source: Source) -> str:
    """Of everything that a plot could show."""
    rows = [{k: v for k, v in row.items() if k not in VOLATILE}
            for row in (*source.rows, *source.sustained)]  # fmt: skip
    text = json.dumps([source.device, rows, source.parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def drawn(folder: Path) -> str:
    """Of the pictures themselves."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.svg")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12]


def folders(results: Path = record.RESULTS) -> dict[Path, Source]:
    """Each device's folder of plots, and what is to be drawn there."""
    found = {}
    for folder in sorted(path for path in results.glob("*") if any(path.glob("*.json"))):
        for source in collect(sorted(folder.glob("*.json"))):
            found[folder / "plots"] = source
    return found


def fingerprints(folder: Path, source: Source) -> dict[str, str]:
    return {"data": fingerprint(source), "pictures": drawn(folder)}


def stale(results: Path = record.RESULTS) -> list[Path]:
    """Folders whose pictures show other figures than the data, or are not as they were drawn."""
    return [
        folder for folder, source in folders(results).items()
        if record.read(folder / FINGERPRINT) != fingerprints(folder, source)
    ]  # fmt: skip


def pictures(folder: Path) -> dict[str, tuple[str, str]]:
    """Plot -> its light and its dark file, of those that were drawn."""
    names = sorted(path.name.removesuffix("-light.svg") for path in folder.glob("*-light.svg"))
    return {name: (f"{name}-light.svg", f"{name}-dark.svg") for name in names}


def draw(folder: Path, source: Source) -> None:
    from flash.study.page import drawings

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, kind, content in drawings(source):
        (folder / f"{name}.{kind}").write_bytes(content)
    record.write(folder / FINGERPRINT, fingerprints(folder, source))


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(sys.argv[1:])
    return draw_all()


def draw_all() -> int:
    for folder, source in folders().items():
        draw(folder, source)
        print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
