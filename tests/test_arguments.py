"""No argument is ignored: changing any one changes the result, the dispatch, or raises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from negative import FP8, Kwargs
from torch import Tensor

import flash
from flash.quantize import keys_contiguous

HEADS, ROWS, KEYS, DIM = 2, 6, 9, 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


def dense(dim: int = DIM) -> Kwargs:
    return {"q": draw(2, ROWS, HEADS, dim), "k": draw(2, KEYS, HEADS, dim, seed=1),
            "v": draw(2, KEYS, HEADS, dim, seed=2)}  # fmt: skip


def fp8() -> Kwargs:
    given = {name: x.to(FP8) for name, x in dense(64).items()}
    return {**given, **{f"{n}_descale": torch.ones(2, 1, HEADS) for n in "qkv"}}


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed() -> Kwargs:
    given = {name: x.flatten(0, 1) for name, x in dense().items()}
    return {**given, "cu_seqlens_q": ends(0, 6, 12), "cu_seqlens_k": ends(0, 9, 18)}


def packed_fp8() -> Kwargs:
    given = {name: x.to(FP8) if name in "qkv" else x for name, x in packed().items()}
    return {**given, **{f"{n}_descale": torch.ones(2, 1, HEADS) for n in "qkv"}}


def backward() -> Kwargs:
    out, lse = flash.attention(**dense(), return_lse=True)
    return {**dense(), "dout": draw(*out.shape, seed=3), "out": out, "lse": lse}


def packed_backward() -> Kwargs:
    out, lse = flash.attention_varlen(**packed(), return_lse=True)
    return {**packed(), "dout": draw(*out.shape, seed=3), "out": out, "lse": lse}


def sdpa_call() -> Kwargs:
    return {n: x.transpose(1, 2) for n, x in zip(("query", "key", "value"), dense().values(),
                                                 strict=True)}  # fmt: skip


def parts() -> Kwargs:
    return {"outs": [draw(2, 4, 4, 8).float(), draw(2, 4, 4, 8, seed=1).float()],
            "lses": [draw(2, 4, 4).float(), draw(2, 4, 4, seed=1).float()]}  # fmt: skip


def scaled(name: str) -> Callable[[Kwargs], Kwargs]:
    """A tensor doubled (bytes of FP8 values stay FP8)."""

    def change(given: Kwargs) -> Kwargs:
        x = given[name]
        return {name: (x.float() * 2).to(x.dtype)}

    return change


def value(**change: Any) -> Callable[[Kwargs], Kwargs]:
    return lambda given: change


def fresh(name: str, like: str) -> Callable[[Kwargs], Kwargs]:
    return lambda given: {name: torch.empty_like(given[like])}


Effects = dict[str, tuple[Callable[[], Kwargs], Callable[[Kwargs], Kwargs]]]
SCORES: Effects = {
    "causal": (dense, value(causal=True)),
    "window": (dense, value(window=(1, 1))),
    "scale": (dense, value(scale=0.7)),
    "softcap": (dense, value(softcap=0.5)),
    "deterministic": (dense, value(deterministic=True)),
    "backend": (dense, value(backend="v2")),
}
ATTENTION: Effects = {
    **{name: (dense, scaled(name)) for name in "qkv"}, **SCORES,
    **{f"{n}_descale": (fp8, scaled(f"{n}_descale")) for n in "qkv"},
    "precision": (dense, value(precision="fp8")),
    "return_lse": (dense, value(return_lse=True)),
    "layout": (dense, value(layout="bhsd")),
    "out": (dense, fresh("out", "q")),
}  # fmt: skip
VARLEN: Effects = {
    **{name: (packed, change) for name, (call, change) in ATTENTION.items() if call is dense
       and name != "layout"},
    **{f"{n}_descale": (packed_fp8, scaled(f"{n}_descale")) for n in "qkv"},
    "cu_seqlens_q": (packed, value(cu_seqlens_q=ends(0, 5, 12))),
    "cu_seqlens_k": (packed, value(cu_seqlens_k=ends(0, 8, 18))),
    "max_seqlen_q": (packed, value(max_seqlen_q=1)),
    "max_seqlen_k": (packed, value(max_seqlen_k=1)),
}  # fmt: skip
BACKWARD: Effects = {
    **{name: (backward, change) for name, (_, change) in SCORES.items()},
    **{name: (backward, scaled(name)) for name in ("q", "k", "v", "dout", "out", "lse")},
    "dlse": (backward, lambda given: {"dlse": torch.ones_like(given["lse"])}),
    "dq": (backward, fresh("dq", "q")), "dk": (backward, fresh("dk", "k")),
    "dv": (backward, fresh("dv", "v")), "layout": (backward, value(layout="bhsd")),
    "cu_seqlens_q": (packed_backward, value(cu_seqlens_q=ends(0, 5, 12))),
    "cu_seqlens_k": (packed_backward, value(cu_seqlens_k=ends(0, 8, 18))),
    "max_seqlen_q": (packed_backward, value(max_seqlen_q=1)),
    "max_seqlen_k": (packed_backward, value(max_seqlen_k=1)),
}  # fmt: skip
SDPA: Effects = {
    **{name: (sdpa_call, scaled(name)) for name in ("query", "key", "value")},
    "attn_mask": (sdpa_call, value(attn_mask=torch.ones(ROWS, KEYS, dtype=torch.bool))),
    "dropout_p": (sdpa_call, value(dropout_p=0.5)),
    "is_causal": (sdpa_call, value(is_causal=True)),
    "scale": (sdpa_call, value(scale=0.7)),
    "enable_gqa": (lambda: {**sdpa_call(), "key": sdpa_call()["key"][:, :1],
                            "value": sdpa_call()["value"][:, :1]}, value(enable_gqa=True)),
    "backend": (sdpa_call, value(backend="v2")),
}  # fmt: skip
MERGE: Effects = {
    "outs": (parts, lambda given: {"outs": [2 * x for x in given["outs"]]}),
    "lses": (parts, lambda given: {"lses": [given["lses"][0] + 1, given["lses"][1]]}),
    "layout": (parts, value(layout="bhsd")),
}
EXPLAIN: Effects = {
    **{name: (dense, value(**{name: draw(2, 2 * ROWS, 2 * HEADS, DIM)})) for name in "q"},
    **{name: (dense, value(**{name: draw(2, KEYS, HEADS, 2 * DIM)})) for name in "kv"},
    **SCORES, "precision": (dense, value(precision="fp8")),
    "layout": (dense, value(layout="bhsd")), "arch": (dense, value(arch="sm_80")),
    "direction": (dense, value(direction="backward")),
    "scale": (dense, value(scale=float("nan"))),
}  # fmt: skip
COMPARE: Effects = {
    **{name: (dense, scaled(name)) for name in "qkv"},
    "backends": (dense, value(backends=["torch"])),
    "repeats": (dense, value(repeats=0)),
}
QUANTIZE: Effects = {
    **{name: (dense, scaled(name)) for name in "qkv"},
    "granularity": (lambda: {**dense(), "k": draw(2, 300, HEADS, DIM), "v": draw(2, 300, 2, DIM)},
                    value(granularity="tensor")),
    "hadamard": (dense, value(hadamard=False)),
    "block_q": (dense, value(block_q=2)), "block_kv": (dense, value(block_kv=2)),
}  # fmt: skip
TABLE: dict[Callable[..., Any], Effects] = {
    flash.attention: ATTENTION,
    flash.attention_varlen: VARLEN,
    flash.attention_backward: BACKWARD,
    flash.sdpa: SDPA,
    flash.merge: MERGE,
    flash.explain: EXPLAIN,
    flash.compare: COMPARE,
    flash.quantize_fp8: QUANTIZE,
}
CASES = [(function, name) for function, effects in TABLE.items() for name in effects]


def outcome(function: Callable[..., Any], given: Kwargs) -> Any:
    """Everything that a caller can see of a call."""
    try:
        found = function(**given)
    except (flash.FlashError, ValueError) as error:
        return type(error)
    seen = [] if function in (flash.explain, flash.compare) else [flash.last_dispatch()]
    if function is flash.explain:
        return str(found.as_dict())
    if function is flash.compare:
        return [(r.backend, r.max_error, r.relative_error, r.moved_bytes) for r in found.rows]
    tensors = found if isinstance(found, tuple) else (found,)
    same = [any(x is y for y in given.values()) for x in tensors]
    return [*((x.shape, x.dtype, x.float().tolist()) for x in tensors), same, *map(str, seen)]


@pytest.mark.parametrize(
    ("function", "name"), CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES]
)
def test_argument_has_an_effect(function: Callable[..., Any], name: str) -> None:
    make, change = TABLE[function][name]
    given = make()
    assert outcome(function, {**given, **change(given)}) != outcome(function, given)


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f.__name__)
def test_every_argument_is_covered(function: Callable[..., Any]) -> None:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds}
    assert known == set(TABLE[function])


@pytest.mark.parametrize("name", sorted(set(ATTENTION) - {"q", "k", "v", "out", "return_lse"}))
def test_options_of_compare(name: str) -> None:
    """compare hands its options on to attention."""
    make, change = ATTENTION[name]
    given = {**make(), "repeats": 1}
    if name == "backend":
        with pytest.raises(ValueError, match="backend"):
            flash.compare(**given, backend="v1")
        return
    if name == "deterministic":
        with pytest.raises(TypeError, match="deterministic"):
            flash.compare(**given, deterministic=1)
        return
    assert outcome(flash.compare, {**given, **change(given)}) != outcome(flash.compare, given)


@pytest.mark.parametrize("function", [f for f in TABLE if f is not flash.quantize_fp8],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_options_are_keyword_only(function: Callable[..., Any]) -> None:
    if function is flash.sdpa:
        return  # PyTorch's own order
    required = [
        p for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]  # fmt: skip
    assert [p.name for p in required if p.name in SCORES] == []


def test_second_call_does_not_see_the_first_ones_constants() -> None:
    """Calls of one shape, remembered by shape: every constant must be part of the memory."""
    given = dense()
    for options in ({"scale": 0.5}, {"softcap": 2.0}, {"causal": True}, {"window": (1, 0)}):
        plain = flash.attention(**given)
        changed = flash.attention(**given, **options)
        assert torch.equal(plain, flash.attention(**given))
        assert torch.equal(changed, flash.attention(**given, **options))
        assert not torch.equal(plain, changed)


def test_torchs_global_switch_counts() -> None:
    given = dense()
    flash.attention(**given)
    torch.use_deterministic_algorithms(True)
    try:
        flash.attention(**given)
        last = flash.last_dispatch()
    finally:
        torch.use_deterministic_algorithms(False)
    assert last is not None
    assert "deterministic" in last.request.features


def test_fp8_v_may_have_contiguous_keys() -> None:
    scales = {f"{n}_descale": torch.ones(2, 1, HEADS) for n in "qkv"}
    q, k, v = (draw(2, 32, HEADS, 64, seed=i).to(FP8) for i in range(3))
    plain = flash.attention(q, k, v, **scales)
    assert torch.equal(plain, flash.attention(q, k, keys_contiguous(v), **scales))
    swapped = (x.transpose(1, 2) for x in (q, k, keys_contiguous(v)))
    found = flash.attention(*swapped, layout="bhsd", **scales)
    assert torch.equal(plain, found.transpose(1, 2))


@pytest.mark.parametrize("part", [(slice(None), slice(0, 24)), (..., slice(0, 32))])
def test_contiguous_keys_that_kernels_cannot_read(part: tuple[Any, ...]) -> None:
    scales = {f"{n}_descale": torch.ones(2, 1, HEADS) for n in "qkv"}
    v = keys_contiguous(draw(2, 32, HEADS, 64).to(FP8))[part]
    q, k = (draw(2, v.shape[1], HEADS, 64, seed=i).to(FP8) for i in range(2))
    with pytest.raises(flash.ArgumentValueError, match=r"v\.contiguous\(\)"):
        flash.attention(q, k, v, **scales)
    assert torch.isfinite(flash.attention(q, k, v.contiguous(), **scales)).all()
