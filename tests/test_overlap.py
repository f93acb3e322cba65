"""Which outputs share memory with themselves or with inputs, against sets of their bytes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash
from flash.overlap import overlaps_itself, share

BUFFER = torch.zeros(4096, dtype=torch.uint8)
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def places(x: Tensor) -> list[int]:
    """The first byte of every element."""
    steps = [[i * s for i in range(n)] for n, s in zip(x.shape, x.stride(), strict=True)]
    return [x.data_ptr() + x.element_size() * sum(p) for p in itertools.product(*steps)]


def touched(x: Tensor) -> set[int]:
    return {place + i for place in places(x) for i in range(x.element_size())}


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Any strides at all: dense, padded, expanded, and such as no view has."""
    rank = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0 if rank == 1 else 1, 5), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(0, 30), min_size=rank, max_size=rank))
    kind = draw(st.sampled_from(KINDS))
    return BUFFER.view(kind).as_strided(sizes, strides, draw(st.integers(0, 40)))


@settings(max_examples=600)
@given(views(), views())
def test_against_sets_of_bytes(x: Tensor, other: Tensor) -> None:
    assert overlaps_itself(x) == (len(set(places(x))) < len(places(x)))
    assert share(x, other) == share(other, x) == bool(touched(x) & touched(other))


@settings(max_examples=600)
@given(views(), st.integers(0, 60))
def test_slices_of_one_buffer_against_sets_of_bytes(x: Tensor, offset: int) -> None:
    """The same strides at another place, where collisions are rare and hard to see."""
    other = x.as_strided(x.shape, x.stride(), offset)
    assert share(x, other) == bool(touched(x) & touched(other))


def test_elements_that_meet_far_apart() -> None:
    """Element (0, 0, 1) of one is element (0, 1, 0) of the other."""
    x = BUFFER.as_strided((4, 2, 2), (1, 20, 28))
    assert share(x, BUFFER.as_strided(x.shape, x.stride(), 8))
    assert not share(x, BUFFER.as_strided(x.shape, x.stride(), 4))
    assert not overlaps_itself(x)


def test_what_people_make_is_legal() -> None:
    dense = torch.zeros(2, 6, 8, 16)
    for order in itertools.permutations(range(3)):
        assert not overlaps_itself(dense.permute(*order, 3))
    assert not overlaps_itself(dense[:, ::2, 1::3, :8])
    assert not overlaps_itself(torch.zeros(2, 1, 8, 16).expand(2, 1, 8, 16))
    assert not overlaps_itself(dense.as_strided((2, 1, 8, 16), (768, 0, 16, 1)))
    assert overlaps_itself(torch.zeros(2, 1, 8, 16).expand(2, 6, 8, 16))
    assert overlaps_itself(dense.as_strided((2, 6, 8, 16), (8, 128, 16, 1)))
    assert share(dense, dense.permute(0, 2, 1, 3))
    assert not share(dense[..., :8], dense[..., 8:])
    assert not share(dense[:, :, ::2], dense[:, :, 1::2])


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gradients_of_grouped_heads_in_one_buffer(layout: str) -> None:
    """dq, dk and dv are slices of different shapes, as a fused projection has them."""
    fused = [torch.randn(2, 6, 8, 16), torch.full((2, 6, 8, 16), torch.nan)]
    if layout == "bhsd":
        fused = [x.transpose(1, 2).contiguous() for x in fused]
    dim = 2 if layout == "bshd" else 1
    (q, k, v), grads = (x.split((4, 2, 2), dim) for x in fused)
    options = {"layout": layout, "causal": True}
    out, lse = flash.attention(q, k, v, return_lse=True, **options)
    expected = flash.attention_backward(out, q, k, v, out, lse, **options)
    targets = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    flash.attention_backward(out, q, k, v, out, lse, **options, **targets)
    for found, wanted in zip(grads, expected, strict=True):
        assert torch.equal(found, wanted)


def test_memory_that_two_storages_share() -> None:
    numpy = pytest.importorskip("numpy")
    memory = numpy.zeros(256, dtype=numpy.float32)
    q, near, far = (torch.from_numpy(memory[i : i + 128]).view(1, 4, 2, 16) for i in (0, 16, 128))
    with pytest.raises(flash.ArgumentValueError, match="shares memory"):
        flash.attention(q, q, q, out=near)
    flash.attention(q, q, q, out=far)


def test_fake_tensors_share_nothing() -> None:
    with FakeTensorMode():
        q = torch.randn(1, 4, 2, 16)
        out = torch.empty_like(q)
        assert flash.attention(q, q, q, out=out) is out


def test_it_takes_no_time() -> None:
    """Worst are strides that nobody has: the search ends, and the answer is to refuse."""
    odd = torch.zeros(1 << 20, dtype=torch.uint8)
    x = odd.as_strided((40, 41, 43, 47), (331, 337, 347, 349))
    other = odd.as_strided((40, 41, 43, 47), (353, 359, 367, 373), 1)
    usual = torch.zeros(2, 6, 3, 4, 16).unbind(2)
    for a, b, limit in ((x, other, 0.05), (usual[0], usual[1], 1e-3)):
        quickest = float("inf")
        for _ in range(20):
            begin = time.thread_time()
            share(a, b)
            overlaps_itself(a)
            quickest = min(quickest, time.thread_time() - begin)
        assert quickest < limit
