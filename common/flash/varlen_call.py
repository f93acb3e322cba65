"""The checks and the launch of attention_varlen; plain calls are remembered, as dense ones are."""

from __future__ import annotations

from typing import Any

from flash import calls, memory
from flash.calls import Ready
from flash.checks import check_inputs
from flash.checks_more import check_descale, check_varlen, validates
from flash.options import backend_name, check_precision, flag, make_spec
from flash.spec import Varlen


def run(
    q: Any, k: Any, v: Any, lengths: tuple[Any, Any, Any, Any], options: tuple[Any, ...],
    scales: tuple[Any, Any, Any], return_lse: bool, out: Any,
) -> Any:  # fmt: skip
    if calls.any_autocast():
        q, k, v = calls.under_autocast(q, k, v)
    ready = _prepare(q, k, v, lengths, options, scales)
    flag("return_lse", return_lse)
    target = None if out is None else calls.check_out(out, q, k, v, ready)
    found, lse = calls.launch(ready, q, k, v, target)
    found = found if out is None else out
    return (found, lse) if return_lse else found


def _prepare(
    q: Any, k: Any, v: Any, lengths: tuple[Any, Any, Any, Any], options: tuple[Any, ...],
    scales: tuple[Any, Any, Any],
) -> Ready:  # fmt: skip
    """The checked call. What is remembered holds no tensor: the lengths of this call are put in."""
    direct = calls.eager()
    key = memory.key_of(q, k, v, options) if direct and scales == (None, None, None) else None
    if key is not None and (known := _lengths_key(lengths)) is not None:
        key = (*key, *known)
        found = memory.recall(key)
        if found is not None:
            cu_q, cu_k, max_q, max_k = lengths
            if not (cu_q.is_cuda and max_q is not None and max_k is not None) or validates(cu_q):
                return found._replace(varlen=check_varlen(q, k, *lengths))
            return found._replace(varlen=Varlen(cu_q, cu_k, max_q, max_k))
    else:
        key = None
    ready = _check(q, k, v, lengths, options, scales, direct)
    if key is not None and ready.job is not None:
        memory.keep(key, ready._replace(varlen=None))
    return ready


def _lengths_key(lengths: tuple[Any, Any, Any, Any]) -> tuple[Any, ...] | None:
    """All that the checks of the lengths read, but for the values."""
    cu_q, cu_k, max_q, max_k = lengths
    try:
        return (
            cu_q.shape, cu_k.shape, cu_q.stride(), cu_k.stride(), cu_q.dtype, cu_k.dtype,
            cu_q.device, cu_k.device, type(cu_q), type(cu_k), max_q, max_k, type(max_q),
            type(max_k),
        )  # fmt: skip
    except (AttributeError, TypeError):
        return None


def _check(
    q: Any, k: Any, v: Any, lengths: tuple[Any, Any, Any, Any], options: tuple[Any, ...],
    scales: tuple[Any, Any, Any], direct: bool,
) -> Ready:  # fmt: skip
    causal, window, scale, softcap, deterministic, precision, backend = options
    name = backend_name(backend)
    check_inputs(q, k, v, "packed")
    spec = make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    fp8 = check_precision(precision, q.dtype, calls.HALF)
    varlen = check_varlen(q, k, *lengths)
    descale = check_descale(q, k, scales, varlen)
    return calls.finish_checks(q, k, v, (spec, name, False, fp8, scale, descale, varlen), direct)
