"""scaled_dot_product_attention: PyTorch's names and semantics over this project's backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash.attention import attention
from flash.checks import check_kind
from flash.errors import ArgumentValueError, unsupported, wrong_type, wrong_value
from flash.options import backend_name, flag, real, refuse_unknown

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
          "backend")  # fmt: skip


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor:
    """As torch.nn.functional.scaled_dot_product_attention: (.., heads, seq, dim), top-left causal.

    `attn_mask` and `dropout_p` have no backend here and raise; `backend` is as in `attention`.
    """
    refuse_unknown("sdpa", unknown, _NAMES)
    name = backend_name(backend)
    tensors = (("query", query), ("key", key), ("value", value))
    for argument, x in tensors:
        check_kind(argument, x)
        if x.ndim < 3:
            raise wrong_value(f"{argument}.ndim", x.ndim, "at least 3: (.., heads, seq, dim)")
    flag("is_causal", is_causal)
    flag("enable_gqa", enable_gqa)
    _refuse(attn_mask, dropout_p)
    if not enable_gqa and query.shape[-3] != key.shape[-3]:
        text = f"query has {query.shape[-3]} heads, key {key.shape[-3]}; pass enable_gqa=True"
        given, expected = key.shape[-3], query.shape[-3]
        raise ArgumentValueError(text, argument="key", given=given, expected=expected)
    batch = query.shape[:-3]
    for argument, x in tensors[1:]:
        if x.shape[:-3] != batch:
            hint = "broadcast with .expand()"
            raise wrong_value(f"{argument} batch", tuple(x.shape[:-3]), str(tuple(batch)), hint)
    q, k, v = (_as_batch(x) for _, x in tensors)
    causal = "top-left" if is_causal else False
    out: Tensor = attention(q, k, v, causal=causal, scale=scale, layout="bhsd", backend=name)
    return out if query.ndim == 4 else out.reshape(*batch, *out.shape[1:])


def _as_batch(x: Tensor) -> Tensor:
    """(.., heads, seq, dim) -> (batch, heads, seq, dim)."""
    if x.ndim == 4:
        return x
    return x.unsqueeze(0) if x.ndim == 3 else x.flatten(0, -4)


def _refuse(attn_mask: Any, dropout_p: Any) -> None:
    """What no backend serves: never ignored."""
    if attn_mask is not None:
        if not isinstance(attn_mask, torch.Tensor):
            raise wrong_type("attn_mask", attn_mask, "None")
        hint = "use causal, window or attention_varlen of this package, or PyTorch's function"
        raise unsupported("attn_mask", "a tensor", "None", hint)
    probability = real("dropout_p", dropout_p)
    if not 0.0 <= probability <= 1.0:
        raise wrong_value("dropout_p", dropout_p, "between 0 and 1")
    if probability:
        raise unsupported("dropout_p", dropout_p, "0", "use PyTorch's function for dropout")
