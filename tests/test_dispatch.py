"""The dispatcher's decisions for every GPU, without one: a table of rules against the code."""

from __future__ import annotations

import itertools
import re
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flash
from flash.capability import BACKENDS, VERSIONS, arch_name, capability, parse_arch
from flash.dispatch import Built, Decision, Request, decide, no_backend, resolve
from flash.engines import kernels

ARCHS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), "cpu")
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FP64, FP8 = torch.float64, torch.float8_e4m3fn
DTYPES = (FP16, BF16, FP32, FP64, FP8)
DIMS = ((16, 16), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
DIRECTIONS = ("forward", "backward")
REQUESTS = [
    Request(dtype, d, dv, way)
    for dtype, (d, dv), way in itertools.product(DTYPES, DIMS, DIRECTIONS)
    if not (dtype is FP8 and way == "backward")
]


def holds(dims: tuple[tuple[int, int], ...], request: Request) -> bool:
    return any(request.head_dim <= d and request.head_dim_v <= dv for d, dv in dims)


def serves(version: str, arch: tuple[int, int], request: Request) -> bool:
    """The rules as the design states them, with the head dims of the table's rows."""
    tables = {row.dtypes: row.dims(request.direction) for row in capability(version).rows}
    name = str(request.dtype).removeprefix("torch.")
    dims = tuple(pair for dtypes, pairs in tables.items() if name in dtypes for pair in pairs)
    if version == "v1_tiling":
        runs = arch >= (8, 0) and request.dtype in (FP16, BF16, FP32)
        runs = runs or (arch == (7, 5) and request.dtype is FP16)
        return runs and max(request[1:3]) <= 128
    if version == "v2_parallel":
        return arch >= (8, 0) and request.dtype in (FP16, BF16) and holds(dims, request)
    if arch != (9, 0):
        return False
    if request.dtype is FP8:
        return request.direction == "forward" and request[1:3] in dims
    return request.dtype in (FP16, BF16) and holds(dims, request)


def expected(arch: tuple[int, int] | str, request: Request) -> str:
    if isinstance(arch, str):
        return "torch"
    return next((v for v in VERSIONS if serves(v, arch, request)), "torch")


@pytest.mark.parametrize("arch", ARCHS, ids=arch_name)
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}-{r[3]}"[6:])
def test_auto(arch: tuple[int, int] | str, request_: Request) -> None:
    decision = decide(arch, request_, {})
    assert decision.backend == expected(arch, request_)
    assert set(decision.reasons) == set(BACKENDS) - {decision.backend}
    assert all(why and all(why) for why in decision.reasons.values())


@pytest.mark.parametrize("arch", ARCHS, ids=arch_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_named(arch: tuple[int, int] | str, backend: str) -> None:
    """A name is served or refused; nothing else ever runs instead."""
    for request in REQUESTS:
        decision = decide(arch, request._replace(backend=backend), {})
        assert decision.backend in (backend, None)
        if backend in VERSIONS and not isinstance(arch, str):
            assert (decision.backend == backend) == serves(backend, arch, request)
        elif backend not in VERSIONS:
            assert decision.backend == backend


def test_hopper_code_runs_on_hopper_alone() -> None:
    request = Request(BF16, 128, 128)
    for arch in ARCHS:
        newest = decide(arch, request, {}).backend
        assert (newest == "v3_hopper") == (arch == (9, 0))


@pytest.mark.parametrize(
    "missing", [some for n in range(4) for some in itertools.combinations(VERSIONS, n)]
)
def test_falls_back_to_an_older_one(missing: tuple[str, ...]) -> None:
    built = {v: Built("its kernels are not built here") for v in missing}
    decision = decide((9, 0), Request(BF16, 64, 64), built)
    assert decision.backend == next((v for v in VERSIONS if v not in missing), "torch")
    for version in missing:
        assert decision.reasons[version] == ("its kernels are not built here",)


@pytest.mark.parametrize("version", VERSIONS)
def test_instances_of_the_build_count(version: str) -> None:
    small = frozenset({("forward", "bfloat16", 64, 64)})
    built = {v: Built("absent") for v in VERSIONS if v != version}
    built[version] = Built("", small)
    assert decide((9, 0), Request(BF16, 64, 64), built).backend == version
    for other in (
        Request(BF16, 128, 128),
        Request(FP16, 64, 64),
        Request(BF16, 64, 64, "backward"),
    ):
        decision = decide((9, 0), other, built)
        assert decision.backend == "torch"
        assert "build here" in decision.reasons[version][0]


def test_too_little_shared_memory_is_a_reason() -> None:
    rows = [frozenset({("backward", "bfloat16", d, d)}) for d in (64, 256)]
    built = {"v2_parallel": Built("", *rows)}
    assert decide((8, 0), Request(BF16, 64, 64, "backward"), built).backend == "v2_parallel"
    decision = decide((8, 0), Request(BF16, 256, 256, "backward"), built)
    assert decision.backend == "torch"
    assert "too little shared memory" in decision.reasons["v2_parallel"][0]
    named = decide((8, 0), Request(BF16, 256, 256, "backward", "v2_parallel"), built)
    assert isinstance(no_backend(named), flash.BackendUnavailableError)


def test_kernels_without_room_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frozenset({(0, 1, 64, 64), (1, 1, 64, 64), (1, 1, 256, 256)})
    module = SimpleNamespace(
        Problem=SimpleNamespace,
        plan=lambda direction, p: {"shared_bytes": (direction + 1) * p.head_dim * 400},
    )
    room = SimpleNamespace(shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(kernels, "load", lambda version: kernels.Module(module, ""))
    monkeypatch.setattr(kernels, "instances", lambda version: rows)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert kernels.too_large.__wrapped__("v2_parallel", 0) == {(1, 1, 256, 256)}


@pytest.mark.parametrize("direction", [0, 1])
def test_a_module_is_asked_by_its_forward_kernels(
    direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(probe=lambda: 98, error_string=lambda code: f"error {code}")
    monkeypatch.setattr(kernels, "load", lambda version: kernels.Module(module, ""))
    monkeypatch.setattr(kernels, "instances", lambda version: frozenset({(direction, 1, 64, 64)}))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert kernels.probe.__wrapped__("v3_hopper", 0) == ("" if direction else "error 98")


def test_probe_failure_is_a_reason() -> None:
    why = "its module cannot run on this device: no kernel image is available"
    decision = decide((9, 0), Request(BF16, 64, 64), {"v3_hopper": Built(why)})
    assert decision.backend == "v2_parallel"
    assert decision.reasons["v3_hopper"] == (why,)


def test_alignment_is_a_reason_for_tma() -> None:
    decision = decide((9, 0), Request(BF16, 64, 64, alignment=8), {})
    assert decision.backend == "v2_parallel"
    assert "16 bytes" in decision.reasons["v3_hopper"][0]


@pytest.mark.parametrize("feature", ["paged", "sinks"])
def test_a_feature_nobody_has(feature: str) -> None:
    decision = decide((9, 0), Request(BF16, 64, 64, features=(feature,)), {})
    assert decision.backend is None
    assert isinstance(no_backend(decision), flash.UnsupportedError)
    assert all(feature in " ".join(why) for why in decision.reasons.values())


@pytest.mark.parametrize("arch", ["sm_80", "sm_75", "sm_120", "sm_100"])
def test_wrong_gpu_is_unavailable(arch: str) -> None:
    decision = decide(parse_arch(arch), Request(BF16, 64, 64, backend="v3_hopper"), {})
    error = no_backend(decision)
    assert isinstance(error, flash.BackendUnavailableError)
    assert "9.0" in str(error)
    assert set(error.reasons) == set(BACKENDS)


def test_not_built_says_how_to_build() -> None:
    built = {"v2_parallel": Built(f"its kernels are not built here; {kernels.how_to_build('v2')}")}
    error = no_backend(decide((8, 0), Request(BF16, 64, 64, backend="v2_parallel"), built))
    assert isinstance(error, flash.BackendUnavailableError)
    assert "pip install" in str(error)


@pytest.mark.parametrize("text", ["sm_90", "sm_90a", "90", "9.0", "SM_90", "sm90"])
def test_arch_names(text: str) -> None:
    assert parse_arch(text) == (9, 0)


def test_arch_with_three_digits() -> None:
    assert parse_arch("sm_103") == (10, 3)
    assert arch_name((10, 3)) == "sm_103"


@pytest.mark.parametrize("backend", ["auto", "v1", "v2", "v3", "torch", "reference"])
def test_last_dispatch_tells(backend: str) -> None:
    q = torch.randn(1, 4, 2, 16).half()
    flash.attention(q, q, q, backend=backend)
    last = flash.last_dispatch()
    assert isinstance(last, Decision)
    aliases = {"auto": "torch", "v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper"}
    assert last.backend == aliases.get(backend, backend)
    assert set(last.reasons) == set(BACKENDS) - {last.backend}
    assert last.engine == {"v": "schedule", "t": "sdpa", "r": "reference"}[last.backend[0]]
    assert str(last.backend) in str(last)
    assert last.as_dict()["backend"] == last.backend


def test_last_dispatch_names_the_backward() -> None:
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    flash.attention(q, q, q)
    last = flash.last_dispatch()
    assert last is not None
    assert last.backward is not None
    assert last.backward.backend == "torch"
    assert last.backward.request.direction == "backward"


def test_last_dispatch_belongs_to_its_thread() -> None:
    q = torch.randn(1, 4, 2, 16)
    flash.attention(q, q, q, backend="reference")
    seen: list[object] = []
    other = threading.Thread(target=lambda: seen.append(flash.last_dispatch()))
    other.start()
    other.join()
    assert seen == [None]
    last = flash.last_dispatch()
    assert last is not None
    assert last.backend == "reference"


def listed_instances() -> list[tuple[str, str, str, int, int]]:
    """(version, direction, dtype, head dim, of V) of every kernel that the build makes."""
    text = (Path(__file__).parents[1] / "CMakeLists.txt").read_text()
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "e4m3": "float8_e4m3fn"}
    found = []
    for version, body in re.findall(r"flash_add_version\((\w+)(.*?)\)", text, re.DOTALL):
        for way, rows in re.findall(r"(FORWARD|BACKWARD)([^A-Z]*)", body):
            for dtype, *dims in (item.split(":") for item in rows.split()):
                found.append((version, way.lower(), names[dtype], int(dims[0]), int(dims[-1])))
    return found


@pytest.mark.parametrize("instance", listed_instances(), ids=lambda i: "-".join(map(str, i)))
def test_what_is_built_is_in_the_table(instance: tuple[str, str, str, int, int]) -> None:
    version, direction, dtype, dim, dim_v = instance
    rows = [row for row in capability(version).rows if dtype in row.dtypes]
    assert any((dim, dim_v) in row.dims(direction) for row in rows)


def test_the_table_is_data() -> None:
    table = flash.capabilities()
    assert list(table) == list(BACKENDS)
    for name, row in table.items():
        assert row.name == name
        assert row.as_dict()["rows"]
        assert row.idea


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again after the current device has changed, the answer changes with it."""
    archs, current = [(9, 0), (8, 0)], [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr("flash.dispatch.arch_of", lambda device: archs[device.index])
    monkeypatch.setattr("flash.dispatch.built_here", lambda index: {})
    request = Request(BF16, 72, 72, alignment=1)  # one that no call here has: answers are kept
    try:
        found = []
        for current[0] in (0, 1, 0):
            found.append(resolve(request, torch.device("cuda"), request).arch)
        assert found == [(9, 0), (8, 0), (9, 0)]
    finally:
        flash.dispatch._resolve.cache_clear()
