"""The mathematics of one attention call, once every argument was checked: shared by all engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Row r of a sequence sees key c when r + shift - left <= c <= r + shift + right.

    `shift` is 0 when `top_left`, else seqlen_k - seqlen_q; a side that is None has no limit.
    Causal is right = 0.
    """

    scale: float
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    top_left: bool = False
    deterministic: bool = False

    def band(self, seqlen_q: int, seqlen_k: int) -> tuple[int | None, int | None]:
        """(first, last): row r sees keys r + first .. r + last, None where unlimited."""
        shift = 0 if self.top_left else seqlen_k - seqlen_q
        first = None if self.left is None else shift - self.left
        last = None if self.right is None else shift + self.right
        return first, last


class Descale(NamedTuple):
    """FP8 scales, value = stored * scale; each is (batch, blocks, heads) float32 or None for 1."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    block_q: int = 0  # rows that share one scale; 0: all rows of the sequence
    block_kv: int = 0


class Varlen(NamedTuple):
    """Packed sequences: cumulative lengths on the device, longest lengths on the host."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Result(NamedTuple):
    """out has q's dtype (bf16 for FP8); lse is float32, natural log, -inf for rows without keys."""

    out: Tensor  # (batch, seqlen_q, heads_q, head_dim_v), or packed (total_q, heads_q, head_dim_v)
    lse: Tensor  # (batch, heads_q, seqlen_q), or packed (heads_q, total_q)


class Grads(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor


LSE_DTYPE = torch.float32
