"""FLOPs of a call, for explain and for PyTorch's FlopCounterMode."""

from __future__ import annotations

import sys
from typing import Any

from flash.spec import Spec


def visible_pairs(spec: Spec, seqlen_q: int, seqlen_k: int) -> int:
    """(row, key) pairs under the mask, counted exactly without a loop over rows."""
    if seqlen_q <= 0 or seqlen_k <= 0:
        return 0
    first, last = spec.band(seqlen_q, seqlen_k)
    # Row r sees keys max(0, r + first) .. min(seqlen_k - 1, r + last).
    end = seqlen_q * seqlen_k if last is None else _clipped_sum(last + 1, seqlen_q, seqlen_k)
    begin = 0 if first is None else _clipped_sum(first, seqlen_q, seqlen_k)
    return end - begin


def _clipped_sum(start: int, rows: int, limit: int) -> int:
    """Sum over r < rows of min(limit, max(0, start + r))."""
    low = min(rows, max(0, -start))  # rows before it count 0
    high = min(rows, max(low, limit - start))  # rows from it on count `limit`
    ramp = (high - low) * (start + low + start + high - 1) // 2
    return ramp + (rows - high) * limit


def forward_flops(spec: Spec, batch: int, heads: int, seqlen_q: int, seqlen_k: int,
                  head_dim: int, head_dim_v: int) -> int:  # fmt: skip
    """Two matrix products over the visible pairs."""
    return 2 * batch * heads * visible_pairs(spec, seqlen_q, seqlen_k) * (head_dim + head_dim_v)


def backward_flops(forward: int) -> int:
    """Five products instead of two."""
    return forward * 5 // 2


def _count(q: Any, k: Any, v: Any, args: tuple[Any, ...], spec: Spec) -> int:
    """Shapes in, FLOPs out. Of packed tensors only totals are known: equal lengths are assumed."""
    if args[0] is None:
        batch, rows, keys = q[0], q[1], k[1]
    else:
        batch = max(1, args[0][0] - 1)
        rows, keys = q[0] // batch, k[0] // batch
    return forward_flops(spec, batch, q[-2], rows, keys, q[-1], v[-1])


def _forward_formula(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return _count(q, k, v, args, _spec(args[8:14]))


def _backward_formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
    q, k, v = args[2:5]
    return backward_flops(_count(q, k, v, args[7:], _spec(args[11:17])))


def _spec(scores: tuple[Any, ...]) -> Spec:
    return Spec(1.0, 0.0, scores[2], scores[3], scores[4])


def count_flops() -> None:
    """Teach FlopCounterMode the operators, as soon as someone has imported it."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    from flash.ops_autograd import calls

    forward, backward = (calls.forward, calls.forward_out), (calls.backward, calls.backward_out)
    for targets, formula in ((forward, _forward_formula), (backward, _backward_formula)):
        missing = [op for op in targets if op not in module.flop_registry]
        if missing:
            module.register_flop_formula(missing)(formula)
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
            if registry is not None:
                for op in targets:
                    registry.setdefault(op, module.flop_registry[op])
