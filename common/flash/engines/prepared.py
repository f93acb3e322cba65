"""Plain dense calls of settled shapes and strides: what each still needs are addresses.

A call on small tensors is over before Python has asked a tensor twice for its shape, so all of it
that does not change from call to call is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash.dispatch import Decision
from flash.engines import layout
from flash.engines.kernels import BACKWARD, FORWARD, Kernels, engine, stats, stream, view
from flash.spec import Spec

Three = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Three | None]
ALIGNED = 16

# PyTorch's own short ways; only builds with CUDA have them, and only CUDA tensors come here.
_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
new: Callable[..., Tensor] = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cuda",
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda"),
)


def both(
    decision: Decision, q: Tensor, k: Tensor, v: Tensor, spec: Spec, swap: bool
) -> tuple[Forward | None, Backward | None]:
    """The call and its gradient, as far as kernels run them."""
    if decision.engine != "kernels" or q.numel() == 0 or k.numel() == 0:
        return None, None
    parts, back = (q, k, v, spec, swap), decision.backward
    call = forward(engine(str(decision.backend)), *parts)
    if back is None or back.engine != "kernels":
        return call, None
    return call, backward(engine(str(back.backend)), *parts)


def forward(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, spec: Spec, swap: bool) -> Forward:
    """(out, lse) of tensors with just these shapes and strides, on this device.

    Here they are (batch, rows, heads, dim); with `swap` the call takes and gives heads first.
    """
    device, index = q.device, q.device.index
    problem, size = kernels.plan(FORWARD, q, k, v, spec)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), device="meta")
    lse = q.new_empty(layout.lse_shape(q), dtype=torch.float32, device="meta")
    run = kernels.module.DenseForward(problem, stats(lse), view(q), view(k), view(v), view(out))
    out_like, lse_like = _like(out, swap), _like(lse, False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if _device() != index:
            with torch.cuda.device(device):
                return call(q, k, v)
        out, lse = new(*out_like), new(*lse_like)
        workspace = new((size,), (1,), torch.uint8) if size else None
        status = run(
            0 if workspace is None else workspace.data_ptr(), stream(index), lse.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        if status:
            kernels.check(status, "forward", device)
        return out, lse

    return call


def backward(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, spec: Spec, swap: bool) -> Backward:
    """(dq, dk, dv) from (dout, q, k, v, out, lse); None where these are not as kernels read them.

    The gradient and what was saved come with strides of their own: each kind is settled once.
    """
    device, index = q.device, q.device.index
    problem, size = kernels.plan(BACKWARD, q, k, v, spec)
    grads = [x.new_empty(x.shape, device="meta") for x in (q, k, v)]
    dq_like, dk_like, dv_like = (_like(x, swap) for x in grads)
    runs: dict[tuple[tuple[int, ...], ...], Callable[..., int] | None] = {}

    def settle(*tensors: Tensor) -> Callable[..., int] | None:
        dout, q, k, v, out, lse = tensors
        if any(x.stride(-1) != 1 for x in tensors) or lse.dtype != torch.float32:
            return None
        q, k, v, out, dout = (x.transpose(1, 2) if swap else x for x in (q, k, v, out, dout))
        bits = 0
        for x in (q, k, v, out, dout):
            for n, stride in zip(x.shape[:-1], x.stride(), strict=False):
                bits |= stride * x.element_size() if n > 1 else 0
        if bits % ALIGNED:
            return None
        views = (view(x) for x in (q, k, v, out, dout, *grads))
        found: Callable[..., int] = kernels.module.DenseBackward(problem, stats(lse), *views)
        return found

    def call(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Three | None:
        key = (dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), lse.stride())
        if key not in runs:
            runs[key] = settle(dout, q, k, v, out, lse)
        run = runs[key]
        places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr())
        if run is None or any(place % ALIGNED for place in places):
            return None
        if _device() != index:
            with torch.cuda.device(device):
                return call(dout, q, k, v, out, lse)
        dq, dk, dv = new(*dq_like), new(*dk_like), new(*dv_like)
        workspace = new((size,), (1,), torch.uint8) if size else None
        status = run(
            0 if workspace is None else workspace.data_ptr(), stream(index), lse.data_ptr(),
            *places, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        )  # fmt: skip
        if status:
            kernels.check(status, "backward", device)
        return dq, dk, dv

    return call


def _like(x: Tensor, swap: bool) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Shape, strides and dtype as the caller sees them."""
    x = x.transpose(1, 2) if swap else x
    return tuple(x.shape), x.stride(), x.dtype
