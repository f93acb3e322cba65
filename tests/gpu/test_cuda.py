"""What only a GPU shows: graphs, streams, many runs, no synchronization, given outputs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from grid import BF16, DEVICE, Case, Inputs, attend, differentiate, draw, pairs, versions
from guards import cumulative
from torch import Tensor

import flash

pytestmark = pytest.mark.timeout(180)
RUNS = int(os.environ.get("FLASH_TEST_RUNS", "200"))
CASES = [
    Case(300, 300, heads_q=4), Case(257, 513, 128, causal=True, batch=2),
    Case(200, 200, 256, causal=True), Case(260, 300, heads_q=8, heads_kv=2, window=(100, 9)),
]  # fmt: skip
Tensors = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def errors_surface_here() -> Iterator[None]:
    """A sticky CUDA error fails the test that caused it, not the next one."""
    yield
    torch.cuda.synchronize()


def captured(
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def forward_and_backward(version: str, given: Inputs, case: Case) -> Tensors:
    """Called directly: no autograd, so that a graph sees only our kernels."""
    out, lse = attend(version, given, case)
    q, k, v, dout, dlse = given
    grads = flash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, backend=version,
                                     deterministic=True, **case.options)  # fmt: skip
    return out, lse, *grads


@pytest.mark.smoke
@pytest.mark.parametrize(("version", "case"), pairs(CASES, "backward"))
def test_graph_replays_with_new_values(version: str, case: Case) -> None:
    given = draw(case)
    graph, result = captured(lambda: forward_and_backward(version, given, case))
    for seed in (1, 2, 3):
        fresh = draw(case, seed)
        for x, new in zip(given, fresh, strict=True):
            x.copy_(new * seed)
        for x in result:
            x.fill_(float("nan"))
        graph.replay()
        wanted = forward_and_backward(version, given, case)
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.mark.parametrize("version", versions())
def test_graph_replays_with_new_lengths(version: str) -> None:
    case = Case(300, 300, causal=True)
    q, k, v = (x[0].contiguous() for x in draw(case)[:3])
    ends = cumulative([100, 100, 100])

    def run() -> Tensors:
        return flash.attention_varlen(q, k, v, ends, ends, 300, 300, causal=True, backend=version,
                                      return_lse=True)  # fmt: skip

    graph, result = captured(run)
    for lengths in ([300, 0, 0], [1, 1, 298], [64, 65, 171]):
        ends.copy_(cumulative(lengths))
        for x in result:
            x.fill_(float("nan"))
        graph.replay()
        wanted = run()
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("version", versions())
def test_two_streams(version: str) -> None:
    case = Case(1024, 1024, 128, heads_q=8, heads_kv=8, causal=True)
    inputs = [draw(case, seed) for seed in (1, 2)]
    wanted = [forward_and_backward(version, x, case) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[Tensors]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(forward_and_backward(version, inputs[i], case))
    torch.cuda.synchronize()
    for many, one in zip(found, wanted, strict=True):
        for result in many:
            assert all(torch.equal(a, b) for a, b in zip(result, one, strict=True))


@pytest.mark.parametrize(("version", "case"), pairs(CASES))
def test_forward_gives_the_same_bits(version: str, case: Case) -> None:
    """On memory that holds something else every time."""
    given = draw(case)
    first = attend(version, given, case)
    ballast = []
    for n in range(RUNS):
        ballast.append(torch.full((1 << 16,), float("nan"), device=DEVICE))
        again = attend(version, given, case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"run {n}"
        if len(ballast) > 8:
            ballast.pop(0)


@pytest.mark.parametrize(("version", "case"), pairs(CASES, "backward"))
def test_deterministic_backward_gives_the_same_bits(version: str, case: Case) -> None:
    given = draw(case)
    first = forward_and_backward(version, given, case)
    for n in range(RUNS // 2):
        again = forward_and_backward(version, given, case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"run {n}"


@pytest.mark.smoke
@pytest.mark.parametrize(("version", "case"), pairs(CASES[:2], "backward"))
def test_no_call_waits_for_the_gpu(version: str, case: Case) -> None:
    given = draw(case)
    differentiate(version, given, case)
    ends = cumulative([100, case.seqlen_q - 100])
    keys = cumulative([50, case.seqlen_k - 50])
    packed = [x[0].contiguous() for x in given[:3]]
    try:
        with warnings.catch_warnings():  # torch calls this mode a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        differentiate(version, given, case)
        flash.attention_varlen(*packed, ends, keys, case.seqlen_q, case.seqlen_k, backend=version)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("version", versions())
def test_work_queued_before_is_awaited(version: str) -> None:
    """Inputs still being written by the same stream when the call is made."""
    case = Case(512, 512, 128, causal=True)
    given, ready = draw(case), draw(case, 1)
    wanted = forward_and_backward(version, ready, case)
    long = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(5):
        for x, new in zip(given, ready, strict=True):
            x.fill_(float("nan"))
            long = torch.tanh(long @ long)
            x.copy_(new)
        found = forward_and_backward(version, given, case)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("version", versions())
def test_last_device_while_the_first_is_current(version: str) -> None:
    """On a machine with one GPU this is the same device, named in full."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    case = Case(200, 200, causal=True)
    here = draw(case)
    there = Inputs(*(x.to(device) for x in here))
    with torch.cuda.device(0):
        found = forward_and_backward(version, there, case)
    wanted = forward_and_backward(version, here, case)
    assert all(torch.equal(a.to(DEVICE), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("version", versions(Case(dtype=BF16)))
def test_a_call_leaves_no_error_behind(version: str) -> None:
    case = Case(64, 64)
    with pytest.raises(ValueError, match="scale"):
        attend(version, draw(case), Case(64, 64, scale=float("nan")))
    attend(version, draw(case), case)
    torch.cuda.synchronize()


FIRST_BACKWARD = """
import torch, flash
q, k, v = (torch.randn(1, 200, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
           for _ in range(3))
out = flash.attention(q, k, v, backend="{version}")
torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("version", versions())
def test_the_first_call_of_a_thread(version: str) -> None:
    """Nothing has run on autograd's thread of a new process when our backward comes."""
    program = FIRST_BACKWARD.format(version=version)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize("version", versions())
def test_output_in_the_layout_of_the_call(version: str) -> None:
    """Heads before rows, and more of them: an output with swapped strides would be overrun."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in draw(Case(60, 60, heads_q=70))[:3])
    out = torch.full_like(q, float("nan"))
    found = flash.attention(q, k, v, layout="bhsd", out=out, backend=version)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(out, flash.attention(q, k, v, layout="bhsd", backend=version))


@pytest.mark.parametrize("version", versions())
def test_function_transforms(version: str) -> None:
    """What they wrap has no address, which a call on a GPU asks for."""
    x = torch.stack([draw(Case(70, 70), seed)[0] for seed in range(3)])

    def loss(q: Tensor) -> Tensor:
        return flash.attention(q, q, q, causal=True, backend=version).float().sin().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(x)
    for one, found in zip(x, mapped, strict=True):
        leaf = one.clone().requires_grad_()
        loss(leaf).backward()
        assert leaf.grad is not None
        assert torch.allclose(found.float(), leaf.grad.float(), atol=1e-2, rtol=2e-2)
