"""From checked arguments to results: straight to an engine in plain eager mode, else an operator.

The operator is what compile, export, dispatch modes and tensor subclasses see; in plain eager mode
it would only add time, so the engine is called at once, under the same autograd rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash import dispatch
from flash.capability import FP8
from flash.checks import check_inputs, check_output
from flash.checks_more import check_descale
from flash.engines.layout import out_dtype
from flash.execute import (
    ALIGNED,
    Job,
    alignment_of,
    fp8_has_no_gradient,
    run_backward,
    run_forward,
    settle,
)
from flash.ops_autograd import calls, forward_backward
from flash.options import LAYOUTS, backend_name, check_precision, choice, flag, make_spec
from flash.spec import Descale, Spec, Varlen

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
any_autocast = torch._C._is_any_autocast_enabled
_PLAIN = (Tensor, torch.nn.Parameter)
_MAX_READY = 4096
HALF = (torch.float16, torch.bfloat16)


class Ready(NamedTuple):
    """A call whose arguments are checked, and which engine serves it."""

    spec: Spec
    backend: str
    swap: bool  # layout bhsd: heads and rows change places
    fp8: bool
    job: Job | None  # None: an operator must run it
    scale: float | None  # as given
    descale: Descale | None = None
    varlen: Varlen | None = None


_ready: dict[tuple[Any, ...], Ready] = {}


def eager() -> bool:
    """Nothing watches the operators: no compiler, no dispatch mode, no function transform."""
    return (
        not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def wants_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def under_autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """float32 and 16-bit inputs in autocast's dtype, as PyTorch's own attention takes them."""
    if not isinstance(q, Tensor) or q.device.type == "meta":
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    cast = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in kinds else x for x in (q, k, v))
    q, k, v = cast
    return q, k, v


def run_dense(
    q: Any,
    k: Any,
    v: Any,
    options: tuple[Any, ...],
    scales: tuple[Any, Any, Any],
    return_lse: bool,
    out: Any,
) -> Any:
    """Checks, choice of the engine, the call, and its results in the caller's layout."""
    if any_autocast():
        q, k, v = under_autocast(q, k, v)
    ready = prepare_dense(q, k, v, options, scales)
    if return_lse is not True and return_lse is not False:
        flag("return_lse", return_lse)
    target = None if out is None else check_out(out, q, k, v, ready)
    if not ready.swap:
        found, lse = launch(ready, q, k, v, target)
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        found, lse = launch(ready, q, k, v, target)
        found = found.transpose(1, 2)
    found = found if out is None else out
    return (found, lse) if return_lse else found


def prepare_dense(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], scales: tuple[Any, Any, Any]
) -> Ready:
    """The checked call; plain calls are remembered by everything that their checks read."""
    direct = eager()
    plain = direct and scales[0] is scales[1] is scales[2] is None
    key = memory_key(q, k, v, options) if plain else None
    if key is not None and (found := remembered(key)) is not None:
        return found
    ready = check_dense(q, k, v, options, scales, direct)
    if key is not None and ready.job is not None:
        remember(key, ready)
    return ready


def memory_key(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Everything that the checks of a plain call read; None if these are no tensors."""
    try:
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype,
            v.dtype, q.device, k.device, v.device, type(q), type(k), type(v),
            (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            q.is_cuda and (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
            options, *map(type, options), *map(type, options[1] or ()),
        )  # fmt: skip
    except (AttributeError, TypeError):
        return None


def remembered(key: tuple[Any, ...]) -> Ready | None:
    try:
        return _ready.get(key)
    except TypeError:  # an option that has no hash: the checks will say what it must be
        return None


def remember(key: tuple[Any, ...], ready: Ready) -> None:
    if len(_ready) >= _MAX_READY:
        _ready.clear()
    _ready[key] = ready


def check_dense(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], scales: tuple[Any, Any, Any], direct: bool
) -> Ready:
    """Every check of a dense call, in the order in which a reader would make them."""
    causal, window, scale, softcap, deterministic, precision, layout, backend = options
    choice("layout", layout, LAYOUTS)
    name = backend_name(backend)
    check_inputs(q, k, v, layout)
    spec = make_spec(causal, window, scale, softcap, deterministic, q.shape[-1])
    fp8 = check_precision(precision, q.dtype, HALF)
    swap = layout == "bhsd"
    if swap:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    descale = check_descale(q, k, scales)
    return finish_checks(q, k, v, (spec, name, swap, fp8, scale, descale, None), direct)


def finish_checks(q: Tensor, k: Tensor, v: Tensor, parts: tuple[Any, ...], direct: bool) -> Ready:
    """Settle the engine now if the call goes straight to it."""
    spec, name, swap, fp8, scale, descale, varlen = parts
    plain = all(type(x) in _PLAIN for x in (q, k, v))
    factor = None if scale is None else spec.scale
    gradient = wants_gradient(q, k, v)
    if gradient and q.dtype == FP8:
        raise fp8_has_no_gradient()
    job = None
    if not torch.compiler.is_compiling():
        job = settle(q, k, v, spec, name, varlen=varlen is not None, fp8=fp8, gradient=gradient)
    if not (direct and plain) or q.device.type == "meta":
        job = None
    return Ready(spec, name, swap, fp8, job, factor, descale, varlen)


def check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, ready: Ready) -> Tensor:
    """`out` in the layout of the engines."""
    if wants_gradient(q, k, v):
        from flash.errors import wrong_value

        hint = "call it under torch.no_grad(), or without out"
        raise wrong_value("out", "a tensor", "None when a gradient is wanted", hint)
    shape = (*q.shape[:-1], v.shape[-1])
    if ready.swap:
        shape = (shape[0], shape[2], shape[1], shape[3])
    check_output("out", out, shape, q, out_dtype(q), (q, k, v))
    return out.transpose(1, 2) if ready.swap else out


def launch(
    ready: Ready, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k, v and out are (.., rows, heads, dim)."""
    job = ready.job
    if out is not None and job is not None and not _writable(out, job):
        found = launch(ready, q, k, v, None)
        return out.copy_(found[0]), found[1]
    if job is None:
        return _operate(ready, q, k, v, out)
    dispatch.record(job.decision)
    if job.decision.backward is not None:
        found = Direct.apply(q, k, v, ready)
        return found[0], found[1]
    if job.fp8 or ready.varlen is not None or ready.descale is not None or out is not None:
        return run_forward(
            job, q, k, v, descale=ready.descale, varlen=ready.varlen, out=out
        )  # fmt: skip
    result: tuple[Tensor, Tensor] = job.engine.forward(q, k, v, ready.spec)
    return result


def _writable(out: Tensor, job: Job) -> bool:
    return job.decision.engine != "kernels" or alignment_of(out) == ALIGNED


def arguments_of(ready: Ready, scales: bool) -> tuple[Any, ...]:
    """The operator's arguments after the tensors."""
    spec, varlen = ready.spec, ready.varlen or (None, None, 0, 0)
    scores = (ready.scale, spec.softcap, spec.left, spec.right, spec.top_left, spec.deterministic)
    middle = (*(ready.descale or (None, None, None))[:3], ready.fp8) if scales else ()
    return (*varlen, *middle, *scores, ready.backend)


def _operate(
    ready: Ready, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling() and _dispatch_modes():
        from flash.flops import count_flops

        count_flops()
    args = arguments_of(ready, scales=True)
    if out is None:
        watched = not torch.compiler.is_compiling() and (
            _transforms() is not None or forward_ad._current_level >= 0
        )
        if watched:
            from flash.transforms import Transformed

            found = Transformed.apply(q, k, v, ready)
        else:
            found = calls.forward(q, k, v, *args)
        return found[0], found[1]
    return out, calls.forward_out(q, k, v, *args, out=out)


class Direct(torch.autograd.Function):
    """The operator's autograd rules without the operator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ready: Ready) -> Any:
        job, varlen = ready.job, ready.varlen
        assert job is not None
        out, lse = run_forward(job, q, k, v, varlen=varlen)
        lengths = (None, None, 0, 0) if varlen is None else varlen
        ctx.save_for_backward(q, k, v, out, lse, lengths[0], lengths[1])
        ctx.lengths = lengths[2:]
        ctx.ready = ready
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        ready: Ready = ctx.ready
        watched = torch.is_grad_enabled() or not eager() or (dout is None and dlse is None)
        if watched or ready.job is None or ready.job.decision.backward is None:
            ctx.scores = arguments_of(ready, scales=False)[4:]
            return (*forward_backward(ctx, dout, dlse)[:3], None)
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        varlen = None if cu_q is None else Varlen(cu_q, cu_k, *ctx.lengths)
        saved = (dout, dlse, q, k, v, out, lse)
        decision = ready.job.decision.backward
        return (*run_backward(decision, ready.spec, saved, varlen=varlen), None)
