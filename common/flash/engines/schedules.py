"""A generation without its GPU: vN/schedule.py, tile by tile in plain PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from flash.engines import layout
from flash.spec import Descale, Grads, Result, Spec, Varlen


class Schedule:
    """The engine of one version: adds packed sequences, given outputs and empty inputs."""

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def module(self) -> Any:
        return importlib.import_module(f"flash.{self.version}.schedule")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        *,
        descale: Descale | None = None,
        varlen: Varlen | None = None,
        out: Tensor | None = None,
    ) -> Result:
        result = layout.new_result(q, v, out)
        if varlen is None:
            _copy(self._dense(q, k, v, spec, descale), result)
            return result
        layout.fill_empty(result)
        for rows, keys, scales in layout.sequences(varlen, descale):
            part = Result(result.out[None, rows], result.lse[None, :, rows])
            _copy(self._dense(q[None, rows], k[None, keys], v[None, keys], spec, scales), part)
        return result

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, descale: Descale | None
    ) -> Result | None:
        """None when there is nothing to attend to."""
        if q.numel() == 0 or k.numel() == 0:
            return None
        found: Result = self.module.forward(q, k, v, spec, descale=descale)
        return found

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: Spec,
        *,
        varlen: Varlen | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> Grads:
        grads = layout.new_grads(q, k, v, dq, dk, dv)
        if varlen is None:
            self._dense_backward((dout, dlse, q, k, v, out, lse), spec, grads)
            return grads
        for grad in grads:
            grad.zero_()
        for rows, keys, _ in layout.sequences(varlen, None):
            stats = [None if s is None else s[None, :, rows] for s in (dlse, lse)]
            inputs = (dout[None, rows], stats[0], q[None, rows], k[None, keys], v[None, keys],
                      out[None, rows], stats[1])  # fmt: skip
            part = Grads(grads.dq[None, rows], grads.dk[None, keys], grads.dv[None, keys])
            self._dense_backward(inputs, spec, part)
        return grads

    def _dense_backward(self, inputs: tuple[Tensor | None, ...], spec: Spec, grads: Grads) -> None:
        q, k = inputs[2], inputs[3]
        if q is None or k is None or q.numel() == 0 or k.numel() == 0:
            for grad in grads:
                grad.zero_()
            return
        found = self.module.backward(*inputs, spec)
        for grad, value in zip(grads, found, strict=True):
            grad.copy_(value)


def _copy(found: Result | None, result: Result) -> None:
    if found is None:
        layout.fill_empty(result)
        return
    result.out.copy_(found.out)
    result.lse.copy_(found.lse)
