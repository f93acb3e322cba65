"""What this machine has, what will run on it, and what stands in the way."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flash.capability import VERSIONS, capability
from flash.engines import kernels

DISTRIBUTION = "flash-generations"
OLDEST_TORCH = (2, 6)
PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "flashinfer-python")
OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem makes the exit code 1."""

    subject: str
    state: str
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    return [machine(), torch_itself(), *clashes(), *devices(), *generations(), *peers()]


def machine() -> Finding:
    text = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return Finding("machine", OK, text)
    return Finding("machine", NOTE, text, "kernels are built for Linux on x86-64 only")


def torch_itself() -> Finding:
    text = f"torch {torch.__version__}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        return Finding("torch", PROBLEM, text, "pip install 'torch>=2.6'")
    return Finding("torch", OK, f"{text}, CUDA {torch.version.cuda or 'none (CPU build)'}")


def clashes() -> list[Finding]:
    """Other distributions that put a top-level `flash` on this Python's path."""
    here = Path(__file__).resolve().parent
    others = []
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or name.lower().replace("_", "-") == DISTRIBUTION:
            continue
        files = distribution.files or ()
        if any(file.parts[0] == "flash" and len(file.parts) > 1 for file in files):
            others.append(name)
    if not others:
        return [Finding("import flash", OK, f"is {DISTRIBUTION}, from {here}")]
    names = " ".join(sorted(set(others)))
    remedy = f"pip uninstall {names}, then pip install --force-reinstall {DISTRIBUTION}"
    text = f"also installed a package called flash: {names}"
    return [Finding("import flash", PROBLEM, text, remedy)]


def devices() -> list[Finding]:
    if not torch.cuda.is_available():
        text = "no CUDA device: v1, v2 and v3 run as schedules, slow and exact, to study them"
        return [Finding("GPU", NOTE, text)]
    found = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        text = (f"{props.name}, compute capability {props.major}.{props.minor}, "
                f"{props.multi_processor_count} multiprocessors, "
                f"{props.total_memory / 2**30:.0f} GiB")  # fmt: skip
        found.append(Finding(f"GPU {index}", OK, text))
    return found


def generations() -> list[Finding]:
    return [generation(version) for version in VERSIONS]


def generation(version: str) -> Finding:
    """Is it built, does it load, can this device run it."""
    table = capability(version)
    wants = "; ".join(sorted({row.where() for row in table.rows}))
    module = kernels.load(version)
    cuda = torch.cuda.is_available()
    if module.module is None:
        missing = importlib.util.find_spec(f"flash.{version}._kernels") is None
        state = NOTE if missing else PROBLEM
        served = cuda and any(row.covers(torch.cuda.get_device_capability()) for row in table.rows)
        remedy = kernels.how_to_build(version) if served else ""
        return Finding(version, state, f"{module.reason} (it needs {wants})", remedy)
    text = f"{len(kernels.instances(version))} kernels{build_facts(version)}"
    if not cuda:
        return Finding(version, NOTE, f"{text}; no device to run them (it needs {wants})")
    reason = kernels.probe(version, torch.cuda.current_device())
    if reason:
        return Finding(version, NOTE, f"{text}; not for this device: {reason} (it needs {wants})")
    return Finding(version, OK, f"{text}; runs on this device")


def build_facts(version: str) -> str:
    """What the build wrote beside the module."""
    spec = importlib.util.find_spec(f"flash.{version}")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_kernels.json"
        if path.is_file():
            facts = json.loads(path.read_text())
            return f" for {facts['architectures'].replace(';', ', ')} by {facts['compiler']}"
    return ""


def peers() -> list[Finding]:
    """Other attention packages, for comparisons; none is needed."""
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if cudnn:
        found.append(f"cuDNN {cudnn}")
    return [Finding("to compare with", NOTE, ", ".join(found) or "torch alone")]


def facts() -> dict[str, Any]:
    """The same for machines."""
    findings = examine()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "ok": healthy(findings),
        "findings": [finding.as_dict() for finding in findings],
    }


def healthy(findings: list[Finding]) -> bool:
    return all(finding.state != PROBLEM for finding in findings)
