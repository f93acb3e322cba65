"""Plain calls that were checked before: what they read is the key, what was settled the value."""

from __future__ import annotations

from typing import Any

import torch

Key = tuple[Any, ...]
MAX_KEPT = 4096
kept: dict[Key, Any] = {}


def key_of(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> Key | None:
    """Everything that the checks of a plain call read; None if these are no such tensors.

    Numbers that are equal differ by type: True is a flag, 1 is not.
    """
    causal, window, scale, softcap, deterministic = options[:5]
    try:
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype,
            v.dtype, q.device, k.device, v.device, type(q), type(k), type(v),
            (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            q.is_cuda and (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
            options, type(causal), type(scale), type(softcap), type(deterministic),
            window is not None and tuple(map(type, window)),
        )  # fmt: skip
    except (AttributeError, TypeError, RuntimeError):  # nested tensors have no shape
        return None


def recall(key: Key) -> Any:
    try:
        return kept.get(key)
    except TypeError:  # an option that has no hash: the checks will say whether it is one
        return None


def keep(key: Key, ready: Any) -> None:
    if len(kept) >= MAX_KEPT:
        kept.clear()
    try:
        kept[key] = ready
    except TypeError:  # a window that is a list is checked each time
        return
