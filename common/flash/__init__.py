"""Three generations of exact attention behind one call."""

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
    "attention",
    "attention_backward",
    "attention_varlen",
    "capabilities",
    "compare",
    "explain",
    "last_dispatch",
    "merge",
    "quantize_fp8",
    "sdpa",
]

count_flops()
