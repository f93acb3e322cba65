"""The call: heads are exchanged within one group, K and V go around another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash.attention import attention as local_attention
from flash.checks import check_inputs
from flash.context_parallel.ring import RingAttention
from flash.context_parallel.shards import Group, place
from flash.context_parallel.ulysses import enough_heads, to_heads, to_rows
from flash.errors import unsupported, wrong_value
from flash.options import backend_name, flag, make_spec


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Group = None,
    ulysses: Group = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """flash.attention over a sequence of which each process holds the rows that `shard` gives it.

    Args:
        q: (batch, rows held here, heads_q, head_dim); k and v likewise, with heads_kv.
        ring: a process group; K and V go around it, overlapped with the attention to the last ones.
        ulysses: a process group; its processes exchange rows for heads before and after.
        causal: the last row of the whole sequence sees the last key; top-left is the same here.
        window: without a ring only.

    Returns:
        out, or (out, lse) with lse (batch, heads_q, rows held here); both differentiable.
    """
    check_inputs(q, k, v, "bshd")
    flag("causal", causal)
    flag("return_lse", return_lse)
    make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    rings, parts = place(ring)[1], place(ulysses)[1]
    if q.shape[1] != k.shape[1]:
        raise wrong_value("rows of k", k.shape[1], f"those of q, {q.shape[1]}")
    if rings > 1 and window is not None:
        raise unsupported("window", window, "None in a ring", "use ulysses alone")
    if rings > 1 and q.shape[1] * parts % 2:
        hint = "pad the sequence and use flash.context_parallel.shard"
        raise wrong_value("rows", q.shape[1], "even, two chunks of the ring", hint)
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "deterministic": deterministic,
        "backend": backend_name(backend),
    }  # fmt: skip
    if parts > 1:
        k, v = enough_heads(q, k, v, ulysses)
        q, k, v = (to_heads(x, ulysses) for x in (q, k, v))
    if rings > 1:
        out, lse = RingAttention.apply(q, k, v, ring, causal, options)
    else:
        out, lse = local_attention(
            q, k, v, causal=causal, window=window, return_lse=True, **options
        )  # fmt: skip
    if parts > 1:
        out = to_rows(out, ulysses)
        if return_lse:
            lse = to_rows(lse.transpose(1, 2).unsqueeze(-1), ulysses).squeeze(-1).transpose(1, 2)
    return (out, lse) if return_lse else out
