"""transformers: one call registers our attention and its mask function under a name of ours.

The name must not hold "flash", which transformers takes for a package of its own to import, and a
mask function must stand under the same name, or transformers drops the padding without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from flash.attention import attention, attention_varlen
from flash.compat import _ragged, _visible
from flash.errors import unsupported, wrong_value
from flash.options import backend_name

NAME = "generations"
Window = tuple[int, int]
HINT = 'use attn_implementation="eager" or "sdpa"'
INERT = frozenset((
    "position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "hidden_states",
    "logits_to_keep", "layer_idx",
))  # fmt: skip


def register(name: str = NAME, *, backend: str = "auto", inert: Iterable[str] = ()) -> str:
    """From now on, `attn_implementation=name` is our attention; returns the name.

    Args:
        name: without "flash" in it.
        backend: as in flash.attention; "auto", or one that never falls back.
        inert: keyword arguments of your models that do not change attention. Others that are not
            known here raise rather than being ignored.
    """
    if not name or "flash" in name.lower() or "/" in name:
        hint = f"leave it out for {NAME!r}"
        raise wrong_value("name", name, 'a name without "flash", which transformers reserves', hint)
    AttentionInterface.register(name, _attention(backend_name(backend), INERT | set(inert)))
    AttentionMaskInterface.register(name, mask)
    return name


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = "cpu",
    **unused: Any,
) -> Tensor | None:
    """The mask function: padding and packing per key, which `attend` below understands."""
    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    run = _described if plain or not torch.compiler.is_compiling() else _outside
    return run(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip, device,
    )  # fmt: skip


def _described(*given: Any) -> Tensor | None:
    batch, rows, keys, q_offset, kv_offset, function, attention_mask, may_skip, device = given
    if torch.compiler.is_compiling():
        pattern = _visible.Pattern(right=0 if function is causal_mask_function else None)
    else:
        pattern = _visible.pattern_of(function)
    return _visible.describe(
        batch, rows, keys, q_offset, kv_offset, pattern, attention_mask, may_skip, device
    )


_outside = torch.compiler.disable(
    _described, reason="whether sequences are packed is read from position_ids: give attention_mask"
)


def _attention(backend: str, inert: frozenset[str]) -> Callable[..., Any]:
    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        deterministic: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Any = None,
        max_length_k: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(batch, heads, seq, dim) in, (batch, seq, heads, dim) out."""
        _refuse(dropout, others, inert)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        options: dict[str, Any] = {
            "scale": scaling, "softcap": softcap or 0.0, "deterministic": bool(deterministic),
            "backend": backend,
        }  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if cu_seq_lens_q is not None:
            if attention_mask is not None:
                raise _visible.refused("a mask beside cu_seq_lens_q")
            plan = _ragged.given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
            window = _window(sliding_window, causal)
            return _varlen(q, k, v, plan, causal=causal, window=window, **options), None
        told = _visible.Told(None, 1, None, 0 if causal else None)
        if attention_mask is not None:
            told = _visible.read(attention_mask, k.shape[1])
            causal = told.right == 0
        window = _narrower(_window(sliding_window, causal), told)
        if told.values is None:
            return attention(q, k, v, causal=causal, window=window, **options), None
        if window is not None and not causal and q.shape[1] != k.shape[1]:
            raise _visible.refused("a window over another sequence's keys")
        plan = _plan(attention_mask, told, q.shape[1], causal or window is not None)
        return _varlen(q, k, v, plan, causal=causal, window=window, **options), None

    return attend


def _refuse(dropout: float, others: dict[str, Any], inert: frozenset[str]) -> None:
    if dropout:
        raise unsupported("dropout", dropout, "0.0", "set the model's attention dropout to 0")
    for name, given in others.items():
        if name not in inert and given is not None and given is not False:
            shown = "a tensor" if isinstance(given, Tensor) else given
            hint = f"{HINT}, or name it in register(inert=..) if it does not change attention"
            raise unsupported(name, shown, "None", hint)


def _window(size: int | None, causal: bool) -> Window | None:
    """transformers counts the row itself."""
    return None if size is None else (size - 1, 0 if causal else size - 1)


def _narrower(window: Window | None, told: _visible.Told) -> Window | None:
    """Of the layer's own window and the mask's."""
    if told.left is None or (window is not None and window[0] <= told.left):
        return window
    return told.left, told.left if told.right is None else told.right


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: _ragged.Ragged, **options: Any) -> Tensor:
    """Attention of a batch as the sequences that the plan makes of it."""
    out = attention_varlen(
        _ragged.flatten(q, plan.rows), _ragged.flatten(k, plan.keys), _ragged.flatten(v, plan.keys),
        plan.cu_seqlens_q, plan.cu_seqlens_k, plan.longest_q, plan.longest_k, **options,
    )  # fmt: skip
    return _ragged.unflatten(out, plan.rows, len(q))


def _plan(mask: Any, told: _visible.Told, rows: int, aligned: bool) -> _ragged.Ragged:
    """Made once for all layers that are given the same mask."""
    if torch.compiler.is_compiling():
        return _ragged.ragged(told, rows, aligned)
    plans: dict[Any, _ragged.Ragged] = mask.__dict__.setdefault("_generations", {})
    if (rows, aligned) not in plans:
        plans[rows, aligned] = _ragged.ragged(told, rows, aligned)
    return plans[rows, aligned]
