"""The flash-attn door: names, order, defaults, values, and errors for what is not served."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from door_pages import on_device, run_example
from grid import BF16, ON_GPU
from torch import Tensor

import flash
from flash.compat import bert_padding
from flash.compat import flash_attn as door

__all__ = ["on_device"]
pytestmark = pytest.mark.usefixtures("on_device")
DTYPE = BF16 if ON_GPU else torch.float64
BAR = {"atol": 2e-2, "rtol": 2e-2} if ON_GPU else {"atol": 1e-7, "rtol": 1e-7}
OPTIONS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
LEADING = {
    "flash_attn_func": ["q", "k", "v"],
    "flash_attn_kvpacked_func": ["q", "kv"],
    "flash_attn_qkvpacked_func": ["qkv"],
    "flash_attn_varlen_func": [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    ],
    "flash_attn_varlen_kvpacked_func": [
        "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    ],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen"],
}  # fmt: skip
MASKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (3, 2)}, {"window": (3, 2)}),
    ({"window_size": (-1, 2)}, {"window": (None, 2)}),
    ({"window_size": (3, 3), "causal": True}, {"window": (3, 0), "causal": True}),
    ({"window_size": (3, -1), "causal": True}, {"window": (3, None), "causal": True}),
    ({"softmax_scale": 0.3, "softcap": 5.0}, {"scale": 0.3, "softcap": 5.0}),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, requires_grad=True)


def same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, **BAR)
    cotangent = torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, cotangent)
    theirs = torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **BAR)


@pytest.mark.parametrize("name", LEADING)
def test_names_order_and_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(door, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    leading = LEADING[name]
    extra = ["block_table"] if name == "flash_attn_varlen_func" else []
    assert [p.name for p in positional] == [*leading, *OPTIONS, *extra]
    assert all(p.default is p.empty for p in positional[: len(leading)])
    assert {p.name: p.default for p in positional[len(leading) :]} == {
        **OPTIONS, **dict.fromkeys(extra),
    }  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), MASKS, ids=lambda x: "-".join(x) or "plain")
@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
def test_dense(theirs: dict[str, Any], ours: dict[str, Any], packing: str) -> None:
    heads = 4 if packing == "qkv" else 2
    rows, keys = (7, 7) if packing == "qkv" else (5, 7)
    q, k, v = draw(2, rows, 4, 16), draw(2, keys, heads, 16), draw(2, keys, heads, 16)
    expected = flash.attention(q, k, v, **ours)
    if packing == "":
        found = door.flash_attn_func(q, k, v, **theirs)
    elif packing == "kv":
        found = door.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **theirs)
    else:
        found = door.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **theirs)
    same_gradients(found, expected, [q, k, v])


@pytest.mark.parametrize(("theirs", "ours"), MASKS, ids=lambda x: "-".join(x) or "plain")
@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
def test_varlen(theirs: dict[str, Any], ours: dict[str, Any], packing: str) -> None:
    cu_q = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    cu_k = cu_q if packing == "qkv" else torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    total = int(cu_k[-1])
    heads = 4 if packing == "qkv" else 2
    q, k, v = draw(9, 4, 16), draw(total, heads, 16), draw(total, heads, 16)
    expected = flash.attention_varlen(q, k, v, cu_q, cu_k, 6, 6, **ours)
    lengths = (cu_q, cu_k, torch.tensor(6), 6)
    if packing == "":
        found = door.flash_attn_varlen_func(q, k, v, *lengths, **theirs)
    elif packing == "kv":
        kv = torch.stack([k, v], 1)
        found = door.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **theirs)
    else:
        qkv = torch.stack([q, k, v], 1)
        found = door.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 6, **theirs)
    same_gradients(found, expected, [q, k, v])


def test_returned_values() -> None:
    q, k, v = draw(2, 5, 4, 16), draw(2, 3, 2, 16), draw(2, 3, 2, 16)
    out, lse, mask = door.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected = flash.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), expected)
    assert mask is None
    assert lse.shape == (2, 4, 5)
    assert (lse[..., :2] == -torch.inf).all()
    assert not out[:, :2].any()
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = draw(6, 3, 4, 16)
    found = door.flash_attn_varlen_qkvpacked_func(packed, cu, 4, return_attn_probs=True)
    assert [None if x is None else tuple(x.shape) for x in found] == [(6, 4, 16), (4, 6), None]


@pytest.mark.parametrize("backend", ["v1", "v2", "v3", "reference", "torch"])
def test_backends(backend: str) -> None:
    q, k, v = (torch.randn(1, 9, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    found = door.flash_attn_func(q, k, v, causal=True, backend=backend)
    assert torch.equal(found, flash.attention(q, k, v, causal=True, backend=backend))
    last = flash.last_dispatch()
    assert last is not None
    assert str(last.backend).startswith(backend)


def test_head_dims_off_the_step_are_padded() -> None:
    q, k, v = draw(2, 5, 2, 20), draw(2, 6, 2, 20), draw(2, 6, 2, 20)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)
    same_gradients(door.flash_attn_func(q, k, v), expected, [q, k, v])
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    flat = [x.detach().flatten(0, 1) for x in (q, k[:, :5], v[:, :5])]
    found, lse, _ = door.flash_attn_varlen_func(*flat, cu, cu, 5, 5, return_attn_probs=True)
    dense = door.flash_attn_func(q, k[:, :5], v[:, :5])
    torch.testing.assert_close(found.unflatten(0, (2, 5)), dense)
    assert lse.shape == (2, 10)


def test_padding_does_not_make_head_dims_equal() -> None:
    q, k, ends = draw(1, 3, 2, 12), draw(1, 3, 2, 14), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="k head dim must be that of q, 12"):
        door.flash_attn_func(q, k, k)
    with pytest.raises(ValueError, match="k head dim must be that of q, 12"):
        door.flash_attn_varlen_func(q[0], k[0], k[0], ends, ends, 3, 3)
    wrong: Any = [1.0]
    with pytest.raises(TypeError, match="k must be"):
        door.flash_attn_func(q, wrong, k)


def test_third_generation_by_keyword() -> None:
    qkv = torch.randn(2, 6, 8, 16)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    extra = {"num_splits": 1, "pack_gqa": True, "sm_margin": 0, "qv": None, "attention_chunk": 0}
    expected = flash.attention(q, k, v)
    assert torch.equal(door.flash_attn_func(q, k, v, **extra), expected)
    assert torch.equal(door.flash_attn_qkvpacked_func(qkv, num_heads_q=4), expected)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    scales = {f"{name}_descale": torch.rand(2, 2) + 0.5 for name in "qkv"}
    expected = flash.attention(q, k, v, **{n: x.unsqueeze(1) for n, x in scales.items()})
    assert torch.equal(door.flash_attn_func(q, k, v, **scales), expected)


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("dropout_p", 0.1, flash.UnsupportedError),
        ("dropout_p", 2.0, ValueError),
        ("dropout_p", "x", TypeError),
        ("alibi_slopes", torch.ones(4), flash.UnsupportedError),
        ("block_table", torch.ones(2, 2), flash.UnsupportedError),
        ("num_splits", 4, flash.UnsupportedError),
        ("sm_margin", 8, flash.UnsupportedError),
        ("qv", torch.ones(4), flash.UnsupportedError),
        ("learnable_sink", torch.ones(4), flash.UnsupportedError),
        ("window_size", (1,), ValueError),
        ("window_size", 3, TypeError),
        ("window_size", (-2, 0), ValueError),
        ("max_seqlen_q", 6.0, TypeError),
        ("scale", 1.0, TypeError),
    ],
)
def test_what_is_not_served_raises(name: str, given: Any, kind: type[Exception]) -> None:
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    q = torch.randn(9, 4, 16)
    plain: dict[str, Any] = {
        "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6,
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        door.flash_attn_varlen_func(q, q, q, **{**plain, name: given})
    assert isinstance(caught.value, flash.FlashError)
    assert name.removeprefix("max_") in str(caught.value) or name == "window_size"


def test_cache_and_packing_errors() -> None:
    with pytest.raises(flash.UnsupportedError, match="flash_attn_func"):
        door.flash_attn_with_kvcache(torch.ones(1), cache_seqlens=3)
    with pytest.raises(ValueError, match=r"qkv\.shape"):
        door.flash_attn_qkvpacked_func(torch.ones(2, 5, 2, 4, 16))
    with pytest.raises(ValueError, match=r"qkv\.shape"):
        door.flash_attn_qkvpacked_func(torch.ones(2, 5, 9, 16), num_heads_q=4)
    with pytest.raises(ValueError, match=r"qkv\.shape"):
        door.flash_attn_qkvpacked_func(torch.ones(2, 5, 8, 16), num_heads_q=-2)
    with pytest.raises(TypeError, match="it takes softmax_scale"):
        door.flash_attn_func(*(torch.ones(2, 5, 2, 16),) * 3, factor=1.0)
    wrong: Any = [1.0]
    with pytest.raises(TypeError, match="kv must be"):
        door.flash_attn_kvpacked_func(torch.ones(2, 5, 2, 16), wrong)


@pytest.mark.parametrize("side", ["left", "right"])
def test_unpad_and_pad(side: str) -> None:
    lengths = torch.tensor([4, 0, 6])
    places = torch.arange(6)
    mask = places < lengths[:, None] if side == "right" else places >= 6 - lengths[:, None]
    x = draw(3, 6, 2, 8)
    tokens, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask])
    assert cu.tolist() == [0, 4, 4, 10]
    assert cu.dtype == used.dtype == torch.int32
    assert (longest, used.tolist()) == (6, [4, 0, 6])
    back = bert_padding.pad_input(tokens, indices, 3, 6)
    assert torch.equal(back, torch.where(mask[..., None, None], x, 0.0))
    cotangent = torch.randn_like(back)
    (grad,) = torch.autograd.grad(back, x, cotangent)
    assert torch.equal(grad, torch.where(mask[..., None, None], cotangent, 0.0))


def test_unused_tokens_and_double_backward() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    x = draw(2, 4, 3)
    tokens, _, cu, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert torch.equal(tokens, x[(mask + unused) > 0])
    assert (cu.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 1])
    indices = torch.tensor([3, 0])
    for run in (
        lambda x: bert_padding.index_first_axis(x, indices),
        lambda x: bert_padding.index_put_first_axis(x[:2], indices, 4),
    ):
        each: Callable[[Tensor], Tensor] = run
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradgradcheck(each, (x,))


def test_page() -> None:
    run_example("flash_attn")
