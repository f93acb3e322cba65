"""Compiler launcher: keeps what ptxas says beside each object, and judges it.

A spilled register or a serialized WGMMA (C7510) is a broken kernel that still gives right results,
so nothing else would ever notice it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FINDING = re.compile(r"C75\d\d|[1-9]\d* bytes spill")


def main(arguments: list[str]) -> int:
    strict, *command = arguments
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    if "-o" in command:
        Path(command[command.index("-o") + 1]).with_suffix(".ptxas").write_text(said)
    if run.returncode != 0:
        sys.stderr.write(said)
        return run.returncode
    findings = [line for line in said.splitlines() if FINDING.search(line)]
    if findings:
        sys.stderr.write("\n".join([f"ptxas findings in {command[-1]}:", *findings, ""]))
        return 1 if strict == "--strict=ON" else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
