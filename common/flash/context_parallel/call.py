"""The calls: heads are exchanged within one group, K and V go around another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash.attention import attention as local_attention
from flash.attention import attention_varlen as local_attention_varlen
from flash.checks import check_inputs
from flash.context_parallel.packed import packed
from flash.context_parallel.ring import Even, RingAttention, Shards
from flash.context_parallel.shards import Group, ends_of, packed_rows_of, place, places
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
    flag("causal", causal)
    (_, rings), (_, parts) = places(ring, ulysses)
    both = isinstance(q, Tensor) and isinstance(k, Tensor)
    if rings == parts == 1 and both and q.shape[1:2] == k.shape[1:2]:
        return local_attention(
            q, k, v, causal=causal, window=window, scale=scale, softcap=softcap,
            deterministic=deterministic, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    check_inputs(q, k, v, "bshd")
    options = _checked(q, k, ring, 1, (causal, window, scale, softcap, deterministic, backend))
    flag("return_lse", return_lse)
    if rings > 1 and q.shape[1] * parts % 2:
        hint = "pad the sequence and use flash.context_parallel.shard"
        raise wrong_value("rows", q.shape[1], "even, two chunks of the ring", hint)
    q, k, v = _to_heads(q, k, v, ulysses)
    if rings > 1:
        out, lse = _around(q, k, v, ring, causal, Even(q.shape[1]), options)
    else:
        out, lse = local_attention(
            q, k, v, causal=causal, window=window, return_lse=True, **options
        )  # fmt: skip
    return _to_rows(out, lse, ulysses, return_lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Any,
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
    """The same within each of many packed sequences, of any lengths.

    Args:
        q: (rows held here, heads_q, head_dim), as `shard(x, dim=0, cu_seqlens=..)` gives them.
        cu_seqlens: of the whole packed tensor: 0, then the end of every sequence. A list or a
            tensor on the CPU spares a wait for the GPU.

    Returns:
        out, or (out, lse) with lse (heads_q, rows held here); both differentiable.
    """
    flag("causal", causal)
    check_inputs(q, k, v, "packed")
    where = places(ring, ulysses)
    options = _checked(q, k, ring, 0, (causal, window, scale, softcap, deterministic, backend))
    flag("return_lse", return_lse)
    ends, rings = ends_of(cu_seqlens), where[0][1]
    held = len(packed_rows_of(ends, *where))
    if q.shape[0] != held:
        hint = "use flash.context_parallel.shard(x, dim=0, cu_seqlens=..)"
        raise wrong_value("rows", q.shape[0], f"{held}, this process's share", hint)
    q, k, v = (x.squeeze(0) for x in _to_heads(q[None], k[None], v[None], ulysses))
    shards = packed(ends, rings, q.device)
    if rings > 1:
        out, lse = _around(q, k, v, ring, causal, shards, options)
    else:
        lengths = shards.step(0, 0, causal).lengths
        assert lengths is not None
        out, lse = local_attention_varlen(
            q, k, v, *lengths, causal=causal, window=window, return_lse=True, **options
        )  # fmt: skip
    found = _to_rows(out[None], lse[None], ulysses, return_lse)
    return (found[0][0], found[1][0]) if return_lse else found[0]


def _checked(q: Tensor, k: Tensor, ring: Group, dim: int, given: tuple[Any, ...]) -> dict[str, Any]:
    """The options that every step is given."""
    causal, window, scale, softcap, deterministic, backend = given
    make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    if q.shape[dim] != k.shape[dim]:
        raise wrong_value("rows of k", k.shape[dim], f"those of q, {q.shape[dim]}")
    if place(ring)[1] > 1 and window is not None:
        raise unsupported("window", window, "None in a ring", "use ulysses alone")
    return {
        "scale": scale, "softcap": softcap, "deterministic": deterministic,
        "backend": backend_name(backend),
    }  # fmt: skip


def _to_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, ...]:
    if place(group)[1] == 1:
        return q, k, v
    k, v = enough_heads(q, k, v, group)
    return tuple(to_heads(x, group) for x in (q, k, v))


def _around(
    q: Tensor, k: Tensor, v: Tensor, group: Group, causal: bool, shards: Shards, options: Any
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = RingAttention.apply(q, k, v, group, causal, shards, options)
    return found


def _to_rows(out: Tensor, lse: Tensor, group: Group, return_lse: bool) -> Any:
    if place(group)[1] > 1:
        out = to_rows(out, group)
        if return_lse:
            lse = to_rows(lse.transpose(1, 2).unsqueeze(-1), group).squeeze(-1).transpose(1, 2)
    return (out, lse) if return_lse else out
