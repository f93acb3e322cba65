"""The doors under torch's scaled_dot_product_attention: same results, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from door_pages import on_device, run_example
from grid import BF16, FP32, ON_GPU
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import flash
from flash.engines import torch_sdpa

__all__ = ["on_device"]
pytestmark = pytest.mark.usefixtures("on_device")
HALF = BF16 if ON_GPU else FP32  # torch's flash attention takes no other on a GPU
Door = Callable[[str], AbstractContextManager[Any]]


@contextmanager
def activated(backend: str) -> Iterator[None]:
    flash.activate(backend)
    try:
        yield
    finally:
        flash.deactivate()


ANY = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DOORS = [flash.as_sdpa, activated]
both = pytest.mark.parametrize("door", DOORS, ids=["as_sdpa", "activate"])


def served_by() -> str | None:
    last = flash.last_dispatch()
    assert last is not None
    return last.backend


def draw(rows: int = 9, keys: int = 9, heads: int = 2, dtype: Any = HALF) -> list[Tensor]:
    shapes = ((2, 4, rows, 16), (2, heads, keys, 16), (2, heads, keys, 16))
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@both
@pytest.mark.parametrize("backend", ["v1", "v2", "v3", "reference"])
@pytest.mark.parametrize(("rows", "keys"), [(9, 9), (5, 12), (12, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_same_as_torch(door: Door, backend: str, rows: int, keys: int, causal: bool) -> None:
    half = backend in ("v2", "v3") or ON_GPU
    given = draw(rows, keys, dtype=BF16 if half else FP32)
    expected = sdpa(*given, is_causal=causal, scale=0.3, enable_gqa=True)
    cotangent = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, given, cotangent)
    with door(backend):
        found = sdpa(*given, is_causal=causal, scale=0.3, enable_gqa=True)
        if not (ON_GPU and causal and rows != keys):  # which torch keeps from its flash attention
            assert str(served_by()).startswith(backend)
        ours = torch.autograd.grad(found, given, cotangent)
    bar = {"atol": 4e-2, "rtol": 4e-2} if half else {"atol": 1e-5, "rtol": 1e-4}
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, **bar)


@both
@pytest.mark.parametrize("backend", ["v1", "auto"])
@pytest.mark.parametrize("case", ["mask", "dropout", "float64", "head dim"])
def test_what_is_not_served_goes_to_torch(door: Door, backend: str, case: str) -> None:
    q, k, v = draw(heads=4)
    options: dict[str, Any] = {}
    if case == "mask":
        options["attn_mask"] = torch.rand(9, 9) > 0.3
        options["attn_mask"][:, 0] = True
    elif case == "dropout":
        options["dropout_p"] = 0.5
    elif case == "float64":
        q, k, v = (x.double() for x in (q, k, v))
    else:
        q, k, v = (x[..., :12] for x in (q, k, v))
    # another kernel of torch's would draw another dropout
    same = SDPBackend.FLASH_ATTENTION if ON_GPU and case == "dropout" else list(ANY)
    torch.manual_seed(1)
    with sdpa_kernel(same):
        expected = sdpa(q, k, v, **options)
    flash.attention(*(torch.randn(1, 4, 1, 8) for _ in range(3)), backend="reference")
    torch.manual_seed(1)
    with door(backend), sdpa_kernel(same):
        found = sdpa(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    # torch itself keeps most of these from its flash attention, the operator that is replaced
    if door is flash.as_sdpa or not (ON_GPU or case == "dropout"):
        assert served_by() == "torch"
        assert "torch" in str(flash.last_dispatch())


@both
def test_auto_on_a_cpu_is_torchs_own(door: Door) -> None:
    given = [x.detach().cpu() for x in draw(heads=4)]
    expected = sdpa(*given, is_causal=True)
    with door("auto"):
        assert torch.equal(sdpa(*given, is_causal=True), expected)
    assert served_by() == "torch"


@both
def test_errors_are_torchs(door: Door) -> None:
    q, k, v = draw(heads=4)
    # not in cuDNN, which does not survive a second such call in a process
    with door("v1"), sdpa_kernel(list(ANY)), pytest.raises(RuntimeError):
        sdpa(q, k[..., :8], v)
    with door("v1"), pytest.raises(TypeError):
        sdpa(q, k, "v")
    with pytest.raises(ValueError, match="backend"):
        door("v9").__enter__()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs() -> None:
    given = torch.nested.nested_tensor([torch.randn(2, rows, 16) for rows in (3, 5)])
    expected = sdpa(given, given, given)
    with flash.as_sdpa("v1"):
        found = sdpa(given, given, given)
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)
    assert served_by() == "torch"
    assert "nested" in str(flash.last_dispatch())


def test_excluded_by_sdpa_kernel() -> None:
    given = draw(heads=4)
    with flash.as_sdpa("v1"), sdpa_kernel(SDPBackend.MATH):
        sdpa(*given)
    assert served_by() == "torch"
    assert "switched off" in str(flash.last_dispatch())


@both
def test_nothing_is_left_behind(door: Door) -> None:
    before, given = dict(torch_sdpa.OWN), draw(heads=4)
    order = torch._C._get_sdp_priority_order()
    for _ in range(2):
        with door("v1"):
            pass
    flash.deactivate()
    flash.attention(*(torch.randn(1, 4, 1, 8) for _ in range(3)), backend="reference")
    sdpa(*given)
    assert served_by() == "reference"
    assert before == torch_sdpa.OWN
    assert order == torch._C._get_sdp_priority_order()


def test_threads() -> None:
    given, seen = draw(heads=4), []

    def work() -> None:
        flash.attention(*(torch.randn(1, 4, 1, 8) for _ in range(3)), backend="reference")
        sdpa(*given)
        seen.append(served_by())

    for door in DOORS:
        with door("v1"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert seen == ["reference", "v1_tiling"]


def test_registered_and_restored() -> None:
    attention = torch.nn.attention
    if not hasattr(attention, "current_flash_attention_impl"):
        return
    with activated("v1"):
        assert attention.current_flash_attention_impl() == "flash-generations"
        flash.activate("v2")
        assert attention.current_flash_attention_impl() == "flash-generations"
    assert attention.current_flash_attention_impl() is None


def test_backend_torch_stays_torchs() -> None:
    q, k, v = (torch.randn(1, 9, 2, 16) for _ in range(3))
    expected = flash.attention(q, k, v, causal=True, backend="torch")
    with activated("reference"):
        assert torch.equal(flash.attention(q, k, v, causal=True, backend="torch"), expected)
    assert served_by() == "torch"


@both
def test_layer_with_checkpointing(door: Door) -> None:
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True, dtype=HALF)
    x = torch.randn(2, 9, 32, dtype=HALF, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=False)[0]

    expected = torch.autograd.grad(run(x).square().sum(), x)
    with door("v1"):
        found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).square().sum(), x)
        assert served_by() == "v1_tiling"
    bar = 5e-2 if ON_GPU else 1e-5
    torch.testing.assert_close(found, expected, atol=bar, rtol=bar)


def test_page() -> None:
    run_example("sdpa")
    assert served_by() == "v1_tiling"
