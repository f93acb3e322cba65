"""Where this repository keeps its evidence, and which versions have none yet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from bench import digest
from flash.study.files import Row, environment, merge, now, read, slug, write

__all__ = ["PENDING", "RESULTS", "commit", "environment", "head", "merge", "now", "pending",
           "read", "slug", "write"]  # fmt: skip

RESULTS = Path(__file__).resolve().parent / "results"
PENDING = "pending.json"  # versions whose present sources have no passing GPU run, and why


def commit() -> str:
    """The commit that was measured; outside a clone, the one that FLASH_COMMIT names."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return found or os.environ.get("FLASH_COMMIT", "")[:12]


def head(board: dict[str, Any]) -> Row:
    """What every file of evidence begins with: the machine, the commit, the kernels' sources."""
    digests = {version: digest.digest(version) for version in digest.VERSIONS}
    return {"environment": environment(board), "commit": commit(), "digests": digests}


def pending(results: Path = RESULTS) -> dict[str, Row]:
    """Version -> {digest, why}: the exceptions to the rule that what is listed has passed."""
    return read(results / PENDING)
