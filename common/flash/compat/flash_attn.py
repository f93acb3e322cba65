"""flash-attn's functions: its names, argument order, defaults and return values, our backends.

Positions and defaults are those of flash-attn 2.8; what only its third generation has is taken by
keyword. Two conventions differ on purpose: the LSE of a row without keys is -inf, and a gradient
that arrives through the LSE is used. `backend` is as in flash.attention.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash.attention import attention_varlen
from flash.calls import run_dense
from flash.checks import check_kind
from flash.compat._served import Window, count, refuse, served, window_of
from flash.errors import wrong_type, wrong_value

_NO_SCALES = (None, None, None)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """Attention of (batch, seq, heads, dim) tensors, causal by the last row and the last key.

    Returns out, or (out, softmax_lse, None) when `return_attn_probs`: there is no dropout, so
    there is no mask of it.
    """
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = None
    if later or dropout_p or alibi_slopes is not None:
        scales = served("flash_attn_func", dropout_p, alibi_slopes, later)
    return _dense(q, k, v, options, return_attn_probs, scales)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """flash_attn_func with kv of shape (batch, seq, 2, heads_kv, dim); nothing is copied."""
    k, v = _parts("kv", kv, 2, 5)
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = served("flash_attn_kvpacked_func", dropout_p, alibi_slopes, later)
    return _dense(q, k, v, options, return_attn_probs, scales)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """flash_attn_func with qkv of shape (batch, seq, 3, heads, dim).

    With `num_heads_q`, qkv is (batch, seq, heads_q + 2 heads_kv, dim), as the third generation
    has it for grouped heads.
    """
    if num_heads_q is None:
        q, k, v = _parts("qkv", qkv, 3, 5)
    else:
        q, k, v = _grouped(qkv, count("num_heads_q", num_heads_q))
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = served("flash_attn_qkvpacked_func", dropout_p, alibi_slopes, later)
    return _dense(q, k, v, options, return_attn_probs, scales)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """Attention within packed sequences, (total, heads, dim); the LSE is (heads, total)."""
    if block_table is not None:
        later["block_table"] = block_table
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = served("flash_attn_varlen_func", dropout_p, alibi_slopes, later)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, lengths, options, return_attn_probs, scales)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """flash_attn_varlen_func with kv of shape (total_k, 2, heads_kv, dim)."""
    k, v = _parts("kv", kv, 2, 4)
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = served("flash_attn_varlen_kvpacked_func", dropout_p, alibi_slopes, later)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, lengths, options, return_attn_probs, scales)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **later: Any,
) -> Any:
    """flash_attn_varlen_func with qkv of shape (total, 3, heads, dim)."""
    q, k, v = _parts("qkv", qkv, 3, 4)
    options = (softmax_scale, causal, window_size, softcap, deterministic, backend)
    scales = served("flash_attn_varlen_qkvpacked_func", dropout_p, alibi_slopes, later)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _packed(q, k, v, lengths, options, return_attn_probs, scales)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> NoReturn:
    """Not served: there is no K/V cache here yet."""
    hint = "append to K and V yourself and call flash_attn_func"
    refuse("flash_attn_with_kvcache", "a call", "attention without a K/V cache", hint)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], probabilities: bool,
    scales: Any,
) -> Any:  # fmt: skip
    scale, causal, window_size, softcap, deterministic, backend = options
    if isinstance(q, Tensor) and q.shape[-1:] and q.shape[-1] % 8:
        q, k, v, scale, dim = _padded(q, k, v, scale)
        options = (scale, *options[1:])
        found = _dense(q, k, v, options, probabilities, scales)
        return _narrow(found, dim, probabilities)
    window = None if window_size == (-1, -1) else window_of(window_size, causal)
    dense = (causal, window, scale, softcap, deterministic, None, "bshd", backend)
    found = run_dense(q, k, v, dense, scales or _NO_SCALES, probabilities, None)
    return (*found, None) if probabilities else found


def _packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], options: tuple[Any, ...],
    probabilities: bool, scales: tuple[Any, ...] | None,
) -> Any:  # fmt: skip
    scale, causal, window_size, softcap, deterministic, backend = options
    if isinstance(q, Tensor) and q.shape[-1:] and q.shape[-1] % 8:
        q, k, v, scale, dim = _padded(q, k, v, scale)
        options = (scale, *options[1:])
        found = _packed(q, k, v, lengths, options, probabilities, scales)
        return _narrow(found, dim, probabilities)
    dq, dk, dv = scales or _NO_SCALES
    found = attention_varlen(
        q, k, v, lengths[0], lengths[1], count("max_seqlen_q", lengths[2]),
        count("max_seqlen_k", lengths[3]), causal=causal, window=window_of(window_size, causal),
        scale=scale, softcap=softcap, q_descale=dq, k_descale=dk, v_descale=dv,
        return_lse=probabilities, deterministic=deterministic, backend=backend,
    )  # fmt: skip
    return (*found, None) if probabilities else found


def _padded(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Any, ...]:
    """Head dims that are no multiple of 8 are filled up with zeros, by a copy as in flash-attn."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_kind(name, x)
    dim, dim_v = q.shape[-1], v.shape[-1]
    if k.shape[-1:] != (dim,):  # after the zeros they might be equal
        raise wrong_value("k head dim", tuple(k.shape[-1:]), f"that of q, {dim}")
    factor = dim**-0.5 if scale is None else scale
    q, k, v = (pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    return q, k, v, factor, dim_v


def _narrow(found: Any, dim: int, probabilities: bool) -> Any:
    return (found[0][..., :dim], *found[1:]) if probabilities else found[..., :dim]


def _parts(name: str, packed: Any, parts: int, ndim: int) -> tuple[Tensor, ...]:
    """Views of the tensors that were packed along the third dim from the last."""
    if not isinstance(packed, torch.Tensor):
        raise wrong_type(name, packed, "a torch.Tensor")
    if packed.ndim != ndim or packed.shape[-3] != parts:
        lead = "batch, seq" if ndim == 5 else "total"
        raise wrong_value(f"{name}.shape", tuple(packed.shape), f"({lead}, {parts}, heads, dim)")
    return packed.unbind(-3)


def _grouped(qkv: Any, heads: int) -> tuple[Tensor, ...]:
    if not isinstance(qkv, torch.Tensor):
        raise wrong_type("qkv", qkv, "a torch.Tensor")
    rest = qkv.shape[-2] - heads if qkv.ndim == 4 and heads > 0 else -1
    if rest <= 0 or rest % 2:
        expected = f"(batch, seq, {heads} + 2 heads_kv, dim)"
        raise wrong_value("qkv.shape", tuple(qkv.shape), expected)
    return qkv.split((heads, rest // 2, rest // 2), dim=-2)
