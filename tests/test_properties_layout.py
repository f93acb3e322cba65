"""The same numbers in another place: packed sequences, layouts, strides, other versions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grid import DEVICE, EPS, Answer, Case, Inputs, attend, differentiate, draw, versions
from hypothesis import given
from hypothesis import strategies as st
from test_properties import cases, each_version
from torch import Tensor

import flash

LENGTHS = st.lists(
    st.tuples(st.sampled_from([0, 1, 63, 65, 130]), st.sampled_from([0, 1, 64, 129])),
    min_size=1, max_size=4,
)  # fmt: skip


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def assert_same(found: Answer, wanted: Answer) -> None:
    for a, b in zip((*found[:2], *found.grads), (*wanted[:2], *wanted.grads), strict=True):
        assert torch.equal(a, b)


@each_version
@given(cases(), LENGTHS)
def test_packed_equals_a_loop(version: str, case: Case, lengths: list[tuple[int, int]]) -> None:
    rows, keys = [n for n, _ in lengths], [m for _, m in lengths]
    given_ = draw(replace(case, seqlen_q=sum(rows), seqlen_k=sum(keys)))
    q, k, v = (x[0].detach().requires_grad_() for x in given_[:3])
    dout, dlse = given_.dout[0], given_.dlse[0]
    out, lse = flash.attention_varlen(
        q, k, v, cumulative(rows), cumulative(keys), max(rows), max(keys), backend=version,
        return_lse=True, deterministic=True, **case.options,
    )  # fmt: skip
    grads = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])
    row = key = 0
    for n, m in lengths:
        at, to = slice(row, row + n), slice(key, key + m)
        one = Inputs(q[None, at], k[None, to], v[None, to], dout[None, at], dlse[None, :, at])
        part = replace(case, seqlen_q=n, seqlen_k=m)
        found = (grads[0][None, at], grads[1][None, to], grads[2][None, to])
        wanted = differentiate(version, one, part, deterministic=True)
        assert_same(Answer(out[None, at], lse[None, :, at], found), wanted)
        row, key = row + n, key + m


@each_version
@given(cases())
def test_layouts_give_the_same_bits(version: str, case: Case) -> None:
    inputs = draw(case)
    out, lse = attend(version, inputs, case)
    turned = inputs._replace(**{n: getattr(inputs, n).transpose(1, 2) for n in "qkv"})
    found, same_lse = attend(version, turned, case, layout="bhsd")
    assert torch.equal(found.transpose(1, 2), out)
    assert torch.equal(same_lse, lse)


def restride(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides; the last dim stays contiguous."""
    batch, rows, heads, dim = x.shape
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "rows first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    more = {"padded dim": (0, 0, 16), "padded heads": (0, 3, 0), "padded rows": (5, 0, 0)}[kind]
    room = (batch, *(n + m for n, m in zip((rows, heads, dim), more, strict=True)))
    wide = torch.full(room, float("nan"), dtype=x.dtype, device=x.device)
    view = wide[:, :rows, :heads, :dim]
    view.copy_(x)
    return view


KINDS = st.sampled_from(["heads first", "rows first", "padded dim", "padded heads", "padded rows"])


@each_version
@given(cases(), st.tuples(KINDS, KINDS, KINDS, KINDS))
def test_strides_give_the_same_bits(version: str, case: Case, kinds: tuple[str, ...]) -> None:
    case = replace(case, batch=2)
    inputs = draw(case)
    wanted = differentiate(version, inputs, case, deterministic=True)
    moved = [restride(x, kind) for x, kind in zip(inputs[:4], kinds, strict=True)]
    assert_same(
        differentiate(version, Inputs(*moved, inputs.dlse), case, deterministic=True), wanted
    )


@each_version
@given(cases())
def test_broadcast_batch_and_packed_qkv(version: str, case: Case) -> None:
    """Stride 0 over the batch, and q, k, v as views of one tensor."""
    inputs = draw(case)
    one = attend(version, inputs, case)
    shared = inputs._replace(**{n: getattr(inputs, n).expand(3, -1, -1, -1) for n in "kv"})
    shared = shared._replace(q=inputs.q.repeat(3, 1, 1, 1))
    for a, b in zip(attend(version, shared, case), one, strict=True):
        assert torch.equal(a, b.expand_as(a))
    case = replace(case, seqlen_k=case.seqlen_q, heads_kv=case.heads_q)
    inputs = draw(case)
    q, k, v = torch.stack(inputs[:3], 2).unbind(2)
    packed = attend(version, inputs._replace(q=q, k=k, v=v), case)
    for a, b in zip(packed, attend(version, inputs, case), strict=True):
        assert torch.equal(a, b)


@each_version
@given(cases())
def test_a_sequence_does_not_depend_on_its_neighbours(version: str, case: Case) -> None:
    case = replace(case, batch=3)
    inputs = draw(case)
    out, lse = attend(version, inputs, case)
    alone, lse_alone = attend(version, Inputs(*(x[1:2] for x in inputs)), replace(case, batch=1))
    assert torch.equal(out[1:2], alone)
    assert torch.equal(lse[1:2], lse_alone)


@given(cases())
def test_versions_agree(case: Case) -> None:
    """v1 = v2 = v3 within the rounding of P and of the result."""
    inputs = draw(case)
    answers = [differentiate(version, inputs, case) for version in versions()]
    eps = 6 * EPS[case.dtype]
    for other in answers[1:]:
        torch.testing.assert_close(other.lse, answers[0].lse, rtol=2e-6, atol=2e-5)
        for a, b in zip(
            (other.out, *other.grads), (answers[0].out, *answers[0].grads), strict=True
        ):
            size = b.float().square().mean().sqrt().item()
            torch.testing.assert_close(a.float(), b.float(), rtol=eps, atol=eps * size + 1e-6)


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_short_names_are_the_same_backend(name: str) -> None:
    full = {"v1": "v1_tiling", "v2": "v2_parallel", "v3": "v3_hopper"}[name]
    if full in versions():
        case = Case(70, 70, causal=True)
        short, long = (attend(n, draw(case), case) for n in (name, full))
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
