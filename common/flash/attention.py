"""The public calls: attention, dense and packed, and its backward for ring parallelism."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash import backward_call, calls, varlen_call
from flash.options import refuse_unknown

_ATTENTION = (
    "q", "k", "v", "causal", "window", "scale", "softcap", "q_descale", "k_descale", "v_descale",
    "precision", "return_lse", "deterministic", "layout", "out", "backend",
)  # fmt: skip
_VARLEN = (
    *(name for name in _ATTENTION if name != "layout"),
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    layout: str = "bshd",
    out: Tensor | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Any:
    """softmax(scale * Q K^T) V, exactly, over the visible keys of every row.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim); float16, bfloat16, float32 or float8_e4m3fn.
        k, v: (batch, seqlen_k, heads_kv, ..); heads_q is a multiple of heads_kv. Any strides with a
            contiguous last dim; float8 v also as `quantize_fp8` gives it, seqlen_k contiguous.
        causal: True aligns the last row with the last key; "top-left" the first with the first.
        window: (left, right) keys visible on each side of the diagonal; None for no limit.
        scale: of the scores; 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        q_descale, k_descale, v_descale: float32 (batch, blocks, heads_kv) of float8 inputs.
        precision: "fp8" quantizes 16-bit inputs for the forward pass; backward stays 16-bit.
        return_lse: also return the row's log-sum-exp, (batch, heads_q, seqlen_q), differentiable.
        deterministic: backward gives the same bits every time; torch's global switch counts too.
        layout: "bshd", or "bhsd" for (batch, heads, seq, dim); neither copies.
        out: written and returned; not for tensors that want a gradient.
        backend: "auto", "v1", "v2", "v3", "torch" or "reference"; a name never falls back.

    Returns:
        out, or (out, lse). Rows without a visible key are 0 with an LSE of -inf.
    """
    if unknown:
        refuse_unknown("attention", unknown, _ATTENTION)
    scales = (q_descale, k_descale, v_descale)
    options = (causal, window, scale, softcap, deterministic, precision, layout, backend)
    return calls.run_dense(q, k, v, options, scales, return_lse, out)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Any:
    """Attention within each of many packed sequences.

    q is (total_q, heads_q, head_dim), k and v likewise; `cu_seqlens_q` and `cu_seqlens_k` are int32
    of shape (batch + 1,): 0, then the end of every sequence. `max_seqlen_q` and `max_seqlen_k` are
    the longest lengths; left out, they are worked out, which on a GPU waits for it. The LSE is
    (heads_q, total_q). Everything else is as in `attention`.
    """
    if unknown:
        refuse_unknown("attention_varlen", unknown, _VARLEN)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scales = (q_descale, k_descale, v_descale)
    options = (causal, window, scale, softcap, deterministic, precision, backend)
    return varlen_call.run(q, k, v, lengths, options, scales, return_lse, out)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    layout: str = "bshd",
    backend: str = "auto",
    **unknown: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of `out`, and of `lse` if `dlse` is given.

    `out` and `lse` may be those of a larger attention of which k and v are a part (a ring step):
    then the results are that part's share. `dq`, `dk` and `dv` are written when given. With
    `cu_seqlens_q` and `cu_seqlens_k` the tensors are packed as in `attention_varlen`.
    """
    if unknown:
        refuse_unknown("attention_backward", unknown, backward_call.ARGUMENTS)
    options = (causal, window, scale, softcap, deterministic, layout, backend)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return backward_call.run((dout, dlse, q, k, v, out, lse), (dq, dk, dv), lengths, options)
