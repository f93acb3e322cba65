"""What is said of a call that goes on to PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import torch

from flash.capability import VERSIONS, arch_of
from flash.dispatch import Decision, Request, record
from flash.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flash.errors import BackendUnavailableError as Unavailable

# The errors of a request; those of a launch are nobody else's to serve.
REFUSALS = (ArgumentTypeError, ArgumentValueError, UnsupportedError, Unavailable)


def record_torch(q: Any, v: Any, backend: str, why: Any, direction: str = "forward") -> None:
    """last_dispatch() is PyTorch's, with `why` against the backend, or those of an error."""
    if not isinstance(q, torch.Tensor) or not isinstance(v, torch.Tensor) or not q.ndim * v.ndim:
        return
    request = Request(q.dtype, _last_dim(q), _last_dim(v), direction, backend)
    text = str(why).splitlines()[0]
    names = VERSIONS if backend == "auto" else (backend,)
    given = getattr(why, "reasons", None) or dict.fromkeys(names, (text,))
    reasons = {name: against for name, against in given.items() if name != "torch"}
    record(Decision(request, arch_of(q.device), "torch", "sdpa", reasons))


def _last_dim(x: torch.Tensor) -> int:
    """0 where a nested tensor has no one size."""
    try:
        return int(x.size(-1))
    except RuntimeError:
        return 0
