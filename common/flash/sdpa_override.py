"""activate and deactivate: this project's backends in the place of torch's flash attention.

The operators that scaled_dot_product_attention ends in are replaced in torch's dispatcher, which
everything above them sees: models, autograd, checkpointing, context parallelism.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash.calls import prepare_dense
from flash.checks import check_inputs
from flash.dispatch import record, resolve
from flash.engines import torch_sdpa
from flash.errors import BackendUnavailableError, unsupported
from flash.execute import request_of, run_backward, run_forward
from flash.options import backend_name, make_spec
from flash.sdpa_fallback import REFUSALS, record_torch

NAME = "flash-generations"
OPERATORS = {
    "CPU": "_scaled_dot_product_flash_attention_for_cpu",
    "CUDA": "_scaled_dot_product_flash_attention",
}
Kernel = Callable[..., Any]
_handle: list[Override] = []


def activate(backend: str = "auto") -> None:
    """From now on, in every thread, torch's flash attention is this project's.

    Torch decides first whether a call may go to flash attention at all; what then no generation
    serves runs in torch's own kernel, and `flash.last_dispatch()` tells.
    """
    name = backend_name(backend)
    if not hasattr(torch.library, "get_kernel"):
        text = f"torch {torch.__version__} cannot hand out its own kernels; use flash.as_sdpa"
        raise BackendUnavailableError(text, argument="backend", given=backend)
    deactivate()
    attention = torch.nn.attention
    if hasattr(attention, "register_flash_attention_impl"):
        attention.register_flash_attention_impl(NAME, register_fn=lambda: Override(name))
        attention.activate_flash_attention_impl(NAME)
    else:
        Override(name)


def deactivate() -> None:
    """Torch's flash attention is its own again; nothing happens if it was."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    if current is not None and current() == NAME:
        torch.nn.attention.restore_flash_attention_impl()
    elif _handle:
        _handle[0].remove()


class Override:
    """The replaced operators, for as long as it is not removed."""

    def __init__(self, backend: str) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        self.before = dict(torch_sdpa.OWN)
        self.order = _flash_first()
        _handle[:] = [self]
        for key, operator in OPERATORS.items():
            if key == "CUDA" and torch.version.cuda is None:
                continue
            own = _original(operator, key)
            back = _original(f"{operator}_backward", key)
            torch_sdpa.OWN[key.lower()] = own
            torch_sdpa.OWN[f"{key.lower()} backward"] = back
            cpu = key == "CPU"
            self._put(operator, key, (cpu_forward if cpu else cuda_forward)(own, backend))
            run = (cpu_backward if cpu else cuda_backward)(back, backend)
            self._put(f"{operator}_backward", key, run)

    def _put(self, operator: str, key: str, run: Kernel) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced: on purpose
            self.library.impl(operator, run, key)

    def remove(self) -> None:
        self.library._destroy()
        torch_sdpa.OWN.update(self.before)
        if self.order:
            torch._C._set_sdp_priority_order(self.order)
        _handle.clear()


def _flash_first() -> list[int]:
    """Torch asks flash attention before cuDNN; returns the order that was."""
    if not hasattr(torch._C, "_set_sdp_priority_order"):
        return []
    if torch.cuda.is_available():  # torch settles its order at its first choice, over any other
        x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="cuda")
        torch._fused_sdp_choice(x, x, x)
    order = [int(x) for x in torch._C._get_sdp_priority_order()]
    flash = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)
    torch._C._set_sdp_priority_order([flash, *(x for x in order if x != flash)])
    return order


def _original(operator: str, key: str) -> Kernel:
    """Torch's kernel as it is now."""
    kernel = torch.library.get_kernel(f"aten::{operator}", key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: Any, **kwargs: Any) -> Any:
        return kernel.call_boxed(keys, *args, **kwargs)

    return run


def _turn(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _no_dropout(dropout: float) -> None:
    if dropout:
        raise unsupported("dropout_p", dropout, "0", "torch's own kernel runs")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: Any, backend: str,
    like_query: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """(out, lse); None when torch's own kernel shall run."""
    options = ("top-left" if causal else False, None, scale, 0.0, False, None, "bhsd", backend)
    try:
        _no_dropout(dropout)
        ready = prepare_dense(q, k, v, options, (None, None, None))
    except REFUSALS as why:
        record_torch(q, v, backend, why)
        return None
    job = ready.job
    if job is None:
        record_torch(q, v, backend, "the call is traced, not run")
        return None
    record(job.decision)
    if job.decision.backend == "torch":
        return None
    tq, tk, tv = _turn(q, k, v)
    if like_query and not tq.is_contiguous():
        found, lse = run_forward(job, tq, tk, tv, out=torch.empty_like(tq))
    else:
        found, lse = job.engine.forward(tq, tk, tv, job.spec)
    return found.transpose(1, 2), lse


def _backward(
    dout: Tensor, saved: tuple[Tensor, ...], causal: bool, dropout: float, scale: Any,
    backend: str,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    q, k, v, out, lse = saved
    try:
        _no_dropout(dropout)
        check_inputs(q, k, v, "bhsd")
        spec = make_spec("top-left" if causal else False, None, scale, 0.0, False, q.shape[-1])
        tdout, tq, tk, tv, tout = _turn(dout, q, k, v, out)
        request = request_of(tq, tk, tv, spec, backend, direction="backward")
        decision = resolve(request, q.device)
    except REFUSALS as why:
        record_torch(q, v, backend, why, "backward")
        return None
    record(decision)
    if decision.backend == "torch":
        return None
    tdout = tdout if tdout.stride(-1) == 1 else tdout.contiguous()
    return _turn(*run_backward(decision, spec, (tdout, None, tq, tk, tv, tout, lse)))


def cpu_forward(own: Kernel, backend: str) -> Kernel:
    def run(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        if attn_mask is None:
            found = _forward(q, k, v, is_causal, dropout_p, scale, backend, False)
            if found is not None:
                return found
        else:
            record_torch(q, v, backend, "attn_mask is a tensor: there is no dense mask")
        return own(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    return run


def cpu_backward(own: Kernel, backend: str) -> Kernel:
    def run(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout_p: float,
        is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        saved = (q, k, v, out, lse)
        found = None
        if attn_mask is None:
            found = _backward(dout, saved, is_causal, dropout_p, scale, backend)
        if found is not None:
            return found
        return own(dout, *saved, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    return run


@functools.lru_cache(maxsize=32)
def _of_dropout(device: torch.device, dtype: torch.dtype, inference: bool) -> tuple[Tensor, ...]:
    """Seed, offset and mask of a dropout that is not; nobody reads or writes them."""
    seed = torch.empty(2, dtype=torch.uint64, device=device)
    offset = torch.empty((), dtype=torch.uint64, device=device)
    return seed, offset, torch.empty(0, dtype=dtype, device=device)


def cuda_forward(own: Kernel, backend: str) -> Kernel:
    def run(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        found = _forward(q, k, v, is_causal, dropout_p, scale, backend, True)
        if found is None:
            return own(q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale)
        unused = _of_dropout(q.device, q.dtype, torch.is_inference_mode_enabled())
        return (*found, None, None, q.shape[2], k.shape[2], *unused)

    return run


def cuda_backward(own: Kernel, backend: str) -> Kernel:
    def run(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any,
        scale: float | None = None,
    ) -> Any:  # fmt: skip
        _, _, _, _, dropout_p, is_causal, _, _ = rest
        found = _backward(dout, (q, k, v, out, lse), is_causal, dropout_p, scale, backend)
        return own(dout, q, k, v, out, lse, *rest, scale=scale) if found is None else found

    return run
