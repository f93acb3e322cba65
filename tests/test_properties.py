"""What must hold of attention whatever the numbers: each version against itself, by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from grid import (
    BF16,
    DEVICE,
    FP16,
    INF,
    Case,
    Inputs,
    assert_gradients,
    assert_lse,
    assert_rows,
    attend,
    differentiate,
    draw,
    expected,
    serves,
    versions,
    visible,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import flash

EDGE = st.builds(
    lambda tile, off: max(1, tile + off), st.sampled_from([0, 64, 128, 192, 256]),
    st.sampled_from([-2, -1, 0, 1, 2, 17]),
)  # fmt: skip
MASK = st.one_of(
    st.just({}), st.just({"causal": True}), st.just({"causal": "top-left"}),
    st.builds(lambda a, b: {"window": (a, b)}, st.integers(0, 150), st.integers(0, 150)),
    st.builds(lambda a: {"causal": True, "window": (a, 0)}, st.integers(0, 150)),
)  # fmt: skip


@st.composite
def cases(draw_: st.DrawFn, mask: st.SearchStrategy[dict] = MASK) -> Case:
    """Sizes around tile edges."""
    heads_q, heads_kv = draw_(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    dim, dtype = draw_(st.sampled_from([32, 64, 128])), draw_(st.sampled_from([BF16, FP16]))
    size = {"heads_q": heads_q, "heads_kv": heads_kv, "dtype": dtype}
    case = Case(draw_(EDGE), draw_(EDGE), dim, **size, **draw_(mask))
    assume(all(serves(version, case) for version in versions()))  # a build may hold a part
    return case


FULL = cases(st.just({}))
each_version = pytest.mark.parametrize("version", versions())


@each_version
@given(cases(), st.integers(0, 9))
def test_output_and_lse_against_fp64(version: str, case: Case, seed: int) -> None:
    out, lse = attend(version, draw(case, seed), case)
    exact, same_dtype = expected(case, seed=seed)
    assert_rows(out, exact.out, same_dtype.out, "output")
    assert_lse(lse, exact.lse, case.dtype)


@each_version
@given(cases(), st.integers(0, 9))
def test_gradients_against_fp64(version: str, case: Case, seed: int) -> None:
    found = differentiate(version, draw(case, seed), case)
    assert_gradients(found, *expected(case, gradients=True, seed=seed))


@each_version
@given(cases(), st.sampled_from([-1e4, -1e3, -88.0, 88.0, 1e3, 1e4]))
def test_a_shift_of_all_logits_moves_only_the_lse(version: str, case: Case, shift: float) -> None:
    """One more dim, q = 1 there and k = c there: every logit of a row moves by the same amount."""
    case = replace(case, scale=0.125)
    q, k, v, *rest = draw(case)
    q[..., -1], k[..., -1] = 0.0, 0.0
    out, lse = attend(version, Inputs(q, k, v, *rest), case)
    column = 2.0 ** math.ceil(math.log2(abs(shift)) / 2)  # powers of two: the shift is exact
    moved = Inputs(q.clone(), k.clone(), v, *rest)
    moved.q[..., -1], moved.k[..., -1] = column, math.copysign(column, shift)
    offset = math.copysign(column * column, shift) * 0.125
    out_moved, lse_moved = attend(version, moved, case)
    blur = abs(offset) * 2.0**-22  # one logit in fp32 is known to this
    torch.testing.assert_close(out_moved.float(), out.float(), rtol=0.02, atol=8e-3 + 4 * blur)
    seen = lse != -INF
    assert torch.equal(lse_moved != -INF, seen)
    torch.testing.assert_close(lse_moved[seen] - offset, lse[seen], rtol=0, atol=1e-4 + 4 * blur)


@each_version
@given(FULL)
def test_order_of_keys_does_not_matter(version: str, case: Case) -> None:
    inputs = draw(case)
    order = torch.randperm(case.seqlen_k).to(DEVICE)
    _, lse = attend(version, inputs, case)
    mixed = inputs._replace(k=inputs.k[:, order], v=inputs.v[:, order])
    out_mixed, lse_mixed = attend(version, mixed, case)
    exact, same_dtype = expected(case)
    assert_rows(out_mixed, exact.out, same_dtype.out, "output of permuted keys")
    torch.testing.assert_close(lse_mixed, lse, rtol=0, atol=2e-5)


@each_version
@given(cases(), st.sampled_from([0.25, 0.5, 2.0, 4.0, -1.0]))
def test_output_is_linear_in_v(version: str, case: Case, factor: float) -> None:
    """By powers of two, so bit for bit."""
    inputs = draw(case)
    inputs = inputs._replace(v=inputs.v.clamp(-4, 4) + 8)  # no subnormals on the way
    out, lse = attend(version, inputs, case)
    scaled, same_lse = attend(version, inputs._replace(v=inputs.v * factor), case)
    assert torch.equal(scaled, out * factor)
    assert torch.equal(same_lse, lse)


@each_version
@given(FULL)
def test_every_key_twice_adds_log_2(version: str, case: Case) -> None:
    inputs = draw(case)
    _, lse = attend(version, inputs, case)
    twice = inputs._replace(k=torch.cat([inputs.k] * 2, 1), v=torch.cat([inputs.v] * 2, 1))
    out, more = attend(version, twice, case)
    exact, same_dtype = expected(case)
    assert_rows(out, exact.out, same_dtype.out, "output of doubled keys")
    torch.testing.assert_close(more - lse, torch.full_like(lse, math.log(2)), rtol=0, atol=2e-5)


@each_version
@given(cases())
def test_grouped_heads_equal_expanded_heads(version: str, case: Case) -> None:
    inputs, group = draw(case), case.heads_q // case.heads_kv
    assume(group > 1)
    wide = [x.repeat_interleave(group, 2) for x in inputs[1:3]]
    expanded = inputs._replace(k=wide[0], v=wide[1])
    grouped = differentiate(version, inputs, case, deterministic=True)
    plain = differentiate(version, expanded, replace(case, heads_kv=case.heads_q))
    assert torch.equal(grouped.out, plain.out)
    assert torch.equal(grouped.lse, plain.lse)
    exact, same_dtype = expected(case, gradients=True)
    summed = [plain.grads[0]] + [g.unflatten(2, (-1, group)).sum(3) for g in plain.grads[1:]]
    assert_gradients(grouped, exact, same_dtype)
    scale = [x.float().abs().max().item() for x in summed]
    for a, b, size in zip(grouped.grads, summed, scale, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * size + 1e-3)


@each_version
@given(cases(st.sampled_from([{}, {"causal": True}, {"causal": "top-left"}])))
def test_window_without_limit_equals_none(version: str, case: Case) -> None:
    inputs, far = draw(case), 1 << 20
    plain = attend(version, inputs, case)
    right = 0 if case.causal else far
    for window in ((None, None), (far, right), (None, right), (far, None)):
        same = attend(version, inputs, replace(case, window=window))
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


@each_version
@given(FULL)
def test_last_causal_row_equals_full(version: str, case: Case) -> None:
    inputs = draw(case)
    out, lse = attend(version, inputs, replace(case, causal=True))
    exact, same_dtype = expected(case)
    assert_rows(out[:, -1:], exact.out[:, -1:], same_dtype.out[:, -1:], "last row")
    torch.testing.assert_close(lse[..., -1].double(), exact.lse[..., -1], rtol=1e-5, atol=1e-5)


@each_version
@given(FULL, st.lists(st.integers(1, 300), min_size=1, max_size=3, unique=True))
def test_split_and_merge_equals_whole(version: str, case: Case, cuts: list[int]) -> None:
    inputs = draw(case)
    ends = [0, *sorted(c for c in cuts if c < case.seqlen_k), case.seqlen_k]
    parts = []
    for begin, end in pairwise(ends):
        part = inputs._replace(k=inputs.k[:, begin:end], v=inputs.v[:, begin:end])
        parts.append(attend(version, part, replace(case, seqlen_k=end - begin)))
    out, lse = flash.merge([p[0] for p in parts], [p[1] for p in parts])
    exact, same_dtype = expected(case)
    # each part was rounded once more than the whole
    assert_rows(out.to(case.dtype), exact.out, same_dtype.out, "merged output")
    assert_lse(lse, exact.lse, case.dtype)


@each_version
@given(cases(st.builds(lambda a, b: {"window": (a, b)}, st.integers(0, 40), st.integers(0, 9))),
       st.sampled_from([float("nan"), INF, -INF]))  # fmt: skip
def test_keys_out_of_sight_may_hold_anything(version: str, case: Case, poison: float) -> None:
    case = replace(case, seqlen_k=case.seqlen_q + case.seqlen_k)  # keys before the first window
    inputs, unseen = draw(case), ~visible(case).any(0)
    wanted = differentiate(version, inputs, case, deterministic=True)
    hide = unseen[None, :, None, None]
    k, v = inputs.k.masked_fill(hide, poison), inputs.v.masked_fill(hide, poison)
    found = differentiate(version, inputs._replace(k=k, v=v), case, deterministic=True)
    for a, b in zip((*found[:2], *found.grads), (*wanted[:2], *wanted.grads), strict=True):
        assert torch.equal(a, b)
