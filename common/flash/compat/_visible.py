"""What each row may see, as transformers describes it, in one small tensor that models hand on.

The tensor is never a dense mask. Its shape is (batch, sequences, 1, keys + extra): one value per
key, shared by all sequences: UNWRITTEN for a place of a static cache that no token has reached,
PADDING, or 1 + the number of the packed sequence that the token belongs to. `extra` is 0, or 2 +
the keys that are visible to the left in a sliding window. Where no key is hidden the third size is
0 instead of 1. int32 means that rows see nothing to their right; int8 that they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash.errors import unsupported

UNWRITTEN, PADDING = -1, 0
HOME = "transformers.masking_utils"
KEYS = "_generations_keys"  # of a described mask: else a wider one would read as one of a window


class Pattern(NamedTuple):
    """What a mask function of transformers says beyond padding; None is no limit."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None  # (batch, keys), the number of each token's sequence

    def __and__(self, other: Pattern) -> Pattern:
        parts = [x for x in (self.sequences, other.sequences) if x is not None]
        if len(parts) > 1:
            raise refused("two kinds of packed sequences at once")
        left, right = _least(self.left, other.left), _least(self.right, other.right)
        return Pattern(left, right, parts[0] if parts else None)


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)


def refused(given: str) -> Exception:
    expected = "causal or full attention, a sliding window, padding, packed sequences"
    return unsupported("the model's mask", given, expected, 'use attn_implementation="sdpa"')


def pattern_of(function: Callable[..., Any]) -> Pattern:
    """The pattern of a function that transformers composed; any other is refused."""
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    if getattr(function, "__module__", None) != HOME:
        raise refused(f"a function of its own, {name}")
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    given = dict(zip(function.__code__.co_freevars, cells, strict=True))
    match name:
        case "causal_mask_function":
            return Pattern(right=0)
        case "bidirectional_mask_function":
            return Pattern()
        case "sliding_window_overlay":
            return Pattern(left=given["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Pattern(given["sliding_window"], given["sliding_window"])
        case "packed_sequence_mask_function":
            return Pattern(sequences=given["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # distances within a sequence stay
            return pattern_of(given["mask_function"])
        case "and_masks":
            found = Pattern()
            for part in given["mask_functions"]:
                found = found & pattern_of(part)
            return found
    raise refused(name)


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    pattern: Pattern,
    attention_mask: Tensor | None,
    may_skip: bool,
    device: Any,
) -> Tensor | None:
    """The tensor that the head of this file speaks of; None for causal attention to all keys."""
    left, right, sequences = pattern
    if right not in (None, 0, left):
        raise refused("a window that differs on both sides")
    values, hidden = _values(
        batch_size, q_length, kv_length, q_offset, kv_offset, right == 0, attention_mask, device
    )
    count = 1
    if sequences is not None:
        count = int(sequences.max()) + 1 if sequences.numel() else 1
        values, hidden = (sequences + 1, True) if count > 1 else (values, hidden)
    if hidden and left is not None and _holes(values):
        raise refused("padding between tokens under a sliding window")
    if not hidden and may_skip and right == 0 and left is None:
        return None
    extra = 0 if left is None else left + 2
    told = pad(values, (0, extra))[:, None, None].to(torch.int32 if right == 0 else torch.int8)
    told = told.expand(-1, count, -1, -1) if hidden else told[:, :, :0]
    if not torch.compiler.is_compiling():
        told.__dict__[KEYS] = kv_length
    return told


def _values(
    batch: int, rows: int, keys: int, q_offset: int | Tensor, kv_offset: int, causal: bool,
    attention_mask: Tensor | None, device: Any,
) -> tuple[Tensor, bool]:  # fmt: skip
    """(batch, keys) values, and whether any key may be hidden by them."""
    values = torch.ones(batch, keys, dtype=torch.int32, device=device)
    hidden = False
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise refused(f"a mask of shape {tuple(attention_mask.shape)}")
        missing = max(kv_offset + keys - attention_mask.shape[-1], 0)
        seen = pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + keys] != 0
        values = seen.to(torch.int32).expand(batch, -1)
        hidden = torch.compiler.is_compiling() or not bool(seen.all())
    written = q_offset + rows - kv_offset
    if causal and (isinstance(written, Tensor) or written != keys):
        if isinstance(written, int) and written > keys:
            raise refused("fewer keys than tokens")
        values = torch.where(torch.arange(keys, device=device) < written, values, UNWRITTEN)
        hidden = True
    return values, hidden


def _holes(values: Tensor) -> bool:
    """Distances of visible keys are those of the mask only if no hidden one lies between."""
    seen = values > PADDING
    begins = seen & ~pad(seen[:, :-1], (1, 0))
    return not torch.compiler.is_compiling() and bool((begins.sum(-1) > 1).any())


class Told(NamedTuple):
    """A described mask, read for one call; `values` is None where nothing is hidden."""

    values: Tensor | None
    sequences: int
    left: int | None
    right: int | None


def read(mask: Any, keys: int) -> Told:
    """What `describe` told; a dense mask is refused."""
    ours = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] < 2
    if not ours or mask.dtype not in (torch.int32, torch.int8) or mask.shape[3] < keys:
        shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise refused(f"a dense mask, {shown}")
    if not torch.compiler.is_compiling() and mask.__dict__.get(KEYS, keys) != keys:
        raise refused(f"a mask over {mask.__dict__[KEYS]} keys where there are {keys}")
    extra = mask.shape[3] - keys
    left = extra - 2 if extra else None
    right = 0 if mask.dtype == torch.int32 else left
    values = mask[:, 0, 0, :keys] if mask.shape[2] else None
    return Told(values, mask.shape[1], left, right)
