"""From checked arguments to results: straight to an engine in plain eager mode, else an operator.

The operator is what compile, export, dispatch modes and tensor subclasses see; in plain eager mode
it would only add time, so the engine is called at once, under the same autograd rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash import dispatch, memory
from flash.capability import FP8
from flash.checks import check_inputs, check_output
from flash.checks_more import check_descale
from flash.engines import prepared
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
from flash.ops_autograd import calls
from flash.options import LAYOUTS, backend_name, check_precision, choice, flag, make_spec
from flash.spec import Descale, Spec, Varlen

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize
any_autocast = torch._C._is_any_autocast_enabled
_PLAIN = (Tensor, torch.nn.Parameter)
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
    quick: prepared.Forward | None = None  # this call and its gradient from the caller's tensors
    quick_back: prepared.Backward | None = None


def eager() -> bool:
    """Nothing watches the operators: no compiler, no dispatch mode, no function transform."""
    return (
        not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def transformed() -> bool:
    """A function transform or forward mode looks on, to which operators do not tell enough."""
    if torch.compiler.is_compiling():
        return False
    top = _transforms()
    return forward_ad._current_level >= 0 if top is None else top.key() != _FUNCTIONALIZE


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
    if out is None:
        found = deliver(ready, q, k, v)
        return found if return_lse else found[0]
    target = check_out(out, q, k, v, ready)
    if ready.swap:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    lse = launch(ready, q, k, v, target)[1]
    return (out, lse) if return_lse else out


def prepare_dense(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], scales: tuple[Any, Any, Any]
) -> Ready:
    """The checked call; plain calls are remembered by everything that their checks read."""
    direct = eager()
    plain = direct and scales[0] is scales[1] is scales[2] is None
    key = memory.key_of(q, k, v, options) if plain else None
    if key is not None and (found := memory.recall(key)) is not None:
        return found
    ready = check_dense(q, k, v, options, scales, direct)
    if key is not None and ready.job is not None:
        memory.keep(key, ready)
    return ready


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
    ready = Ready(spec, name, swap, fp8, job, factor, descale, varlen)
    if job is None or fp8 or descale is not None or varlen is not None:
        return ready
    quick, quick_back = prepared.both(job.decision, q, k, v, spec, swap)
    return ready._replace(quick=quick, quick_back=quick_back)


def check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, ready: Ready) -> Tensor:
    """`out` in the layout of the engines."""
    if wants_gradient(q, k, v):
        from flash.errors import wrong_value

        hint = "call it under torch.no_grad(), or without out"
        raise wrong_value("out", "a tensor", "None when a gradient is wanted", hint)
    shape = (*q.shape[:-1], v.shape[-1])  # q as the caller has it
    check_output("out", out, shape, q, out_dtype(q), (q, k, v))
    return out.transpose(1, 2) if ready.swap else out


def deliver(ready: Ready, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of a dense call in the caller's layout."""
    job, quick = ready.job, ready.quick
    if quick is not None and job is not None:
        dispatch.record(job.decision)
        if job.decision.backward is None:
            return quick(q, k, v)
        found: tuple[Tensor, Tensor] = _apply(q, k, v, ready)
        return found
    if not ready.swap:
        return launch(ready, q, k, v, None)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = launch(ready, q, k, v, None)
    return out.transpose(1, 2), lse


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
        if transformed():
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
        if ready.quick is not None:
            out, lse = ready.quick(q, k, v)
        else:
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
        if dout is None and dlse is None:
            return None, None, None, None
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        plain = not torch.is_grad_enabled() and eager()
        if plain and ready.quick_back is not None and dout is not None and dlse is None:
            found = ready.quick_back(dout, q, k, v, out, lse)
            if found is not None:
                return (*found, None)
        dout = torch.zeros_like(out) if dout is None else dout
        swap = ready.swap and ready.quick is not None  # else the views were made outside
        if swap:
            dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        saved = (dout, dlse, q, k, v, out, lse)
        decision = None if ready.job is None else ready.job.decision.backward
        if not plain or decision is None:
            lengths = (cu_q, cu_k, *ctx.lengths)
            grads = calls.backward(*saved, *lengths, *arguments_of(ready, scales=False)[4:])
        else:
            varlen = None if cu_q is None else Varlen(cu_q, cu_k, *ctx.lengths)
            grads = run_backward(decision, ready.spec, saved, varlen=varlen)
        if swap:
            grads = (x.transpose(1, 2) for x in grads)
        return (*grads, None)


# Function.apply asks first for function transforms, which `eager` has ruled out, and for tensors
# that outlived one, which have no address.
_apply = super(torch.autograd.Function, Direct).apply
