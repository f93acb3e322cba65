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
SPILL = re.compile(r"(\d+) bytes spill stores")
# Spills that were looked at and left, in bytes per thread; more of them, or elsewhere, is an error.
KNOWN_SPILLS = {
    "v1_tiling/forward_fp32_128": 56,  # sm_80, softcap or rows that are not aligned
    "v1_tiling/backward_fp32_128": 8,  # sm_80
    "v1_tiling/backward_fp16_64": 4,  # sm_75
    "v1_tiling/backward_fp16_128": 28,  # sm_75
}


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
        return int(strict == "--strict=ON" and not known(command[-1], findings))
    return 0


def known(target: str, findings: list[str]) -> bool:
    """Is this nothing but the spill that KNOWN_SPILLS allows this kernel?"""
    allowed = next((n for name, n in KNOWN_SPILLS.items() if f"/{name}.cu" in target), 0)
    sizes = [match for line in findings for match in SPILL.findall(line)]
    serialized = any("C75" in line for line in findings)
    return not serialized and max(map(int, sizes), default=0) <= allowed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
