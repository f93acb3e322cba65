"""Three generations of exact attention behind one call."""

from importlib import import_module as _import_module
from typing import Any as _Any

from flash.attention import attention, attention_backward, attention_varlen
from flash.capability import capabilities
from flash.compare import compare
from flash.dispatch import last_dispatch
from flash.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BackendUnavailableError,
    FlashError,
    LaunchError,
    UnsupportedError,
)
from flash.explain import explain
from flash.flops import count_flops
from flash.merge import merge
from flash.quantize import quantize_fp8
from flash.sdpa import sdpa

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendUnavailableError",
    "FlashError",
    "LaunchError",
    "UnsupportedError",
    "activate",
    "as_sdpa",
    "attention",
    "attention_backward",
    "attention_varlen",
    "capabilities",
    "compare",
    "deactivate",
    "explain",
    "last_dispatch",
    "merge",
    "quantize_fp8",
    "sdpa",
]

_DOORS = {  # imported when first asked for
    "activate": "flash.sdpa_override",
    "as_sdpa": "flash.sdpa_context",
    "deactivate": "flash.sdpa_override",
}

count_flops()


def __getattr__(name: str) -> _Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'flash' has no attribute {name!r}")
    return getattr(_import_module(_DOORS[name]), name)
