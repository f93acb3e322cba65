"""as_sdpa: inside it, torch's scaled_dot_product_attention runs on this project's backends."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from flash.calls import any_autocast, deliver, prepare_dense, under_autocast, wants_gradient
from flash.capability import DTYPES
from flash.dispatch import Decision, Request, record, resolve
from flash.options import backend_name, flag
from flash.sdpa import sdpa
from flash.sdpa_fallback import REFUSALS, record_torch

_PLAIN = (Tensor, torch.nn.Parameter)
_flash_enabled = torch._C._get_flash_sdp_enabled


class as_sdpa(TorchFunctionMode):
    """`with flash.as_sdpa(backend="auto"):` every scaled_dot_product_attention below is ours.

    Calls that no generation serves (a mask, dropout, a dtype, ..) run in PyTorch as they would
    without it, and so do all while `sdpa_kernel` excludes flash attention;
    `flash.last_dispatch()` tells. It holds for this thread, and for models that were written
    without a thought of this package.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend_name(backend)

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func in _OUTER:
            with self:
                return _OUTER[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        try:
            if not self._stands_in(query, key, value):
                pass
            elif attn_mask is None and dropout_p == 0.0 and _regular(query, key, value):
                causal = "top-left" if flag("is_causal", is_causal) else False
                options = (causal, None, scale, 0.0, False, None, "bhsd", self.backend)
                found = _run(query, key, value, options)
                if found is not None:
                    return found
            elif self._serves(query, key, value):
                return sdpa(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                    backend=self.backend,
                )  # fmt: skip
        except REFUSALS as why:
            record_torch(query, value, self.backend, why)
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _stands_in(self, q: Any, k: Any, v: Any) -> bool:
        if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
            record_torch(q, v, self.backend, f"the query is a {type(q).__name__}, no plain tensor")
            return False
        if q.is_nested or k.is_nested or v.is_nested:
            record_torch(q, v, self.backend, "the tensors are nested")
            return False
        if not _flash_enabled():
            record_torch(q, v, self.backend, "flash attention is switched off in torch")
            return False
        return True

    def _serves(self, q: Any, k: Any, v: Any) -> bool:
        """A generation would run a plain call; errors of any other kind come from `sdpa`."""
        if q.dtype not in DTYPES or not q.ndim * v.ndim:
            return True
        gradient = wants_gradient(q, k, v)
        decision = _plain(
            q.dtype, q.shape[-1], v.shape[-1], self.backend, q.device, gradient
        )  # fmt: skip
        if decision.backend == "torch":
            record(decision)
            return False
        return True


def _run(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> Tensor | None:
    """flash.attention's steps; None when PyTorch would be chosen."""
    if any_autocast():
        q, k, v = under_autocast(q, k, v)
    ready = prepare_dense(q, k, v, options, (None, None, None))
    if ready.job is not None and ready.job.decision.backend == "torch":
        record(ready.job.decision)
        return None
    return deliver(ready, q, k, v)[0]


def _regular(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Nothing is left for flash.sdpa to check or to reshape."""
    shape, other = q.shape, k.shape
    return len(shape) == len(other) == 4 and shape[1] == other[1] and shape[0] == other[0]


def _unchecked(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its question whether a mode wants it."""
    names = {name: _no for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, None, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False


# A mode is off below the functions that it sees; below these attention may be called again.
_OUTER = {
    func: _unchecked(func)
    for func in (multi_head_attention_forward, torch.autograd.grad, Tensor.backward)
}


@functools.lru_cache(maxsize=256)
def _plain(
    dtype: torch.dtype, dim: int, dim_v: int, backend: str, device: torch.device, gradient: bool
) -> Decision:
    back = Request(dtype, dim, dim_v, "backward", backend) if gradient else None
    return resolve(Request(dtype, dim, dim_v, "forward", backend), device, back)
