"""Typed errors: each says what was given, what is supported and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Reasons = Mapping[str, tuple[str, ...]]


class FlashError(Exception):
    """Base of all errors of this package; tests read the attributes, people read the message."""

    def __init__(
        self,
        message: str,
        *,
        argument: str | None = None,
        given: Any = None,
        expected: Any = None,
        reasons: Reasons | None = None,
    ) -> None:
        super().__init__(message)
        self.argument = argument
        self.given = given
        self.expected = expected
        self.reasons: dict[str, tuple[str, ...]] = dict(reasons or {})


class ArgumentTypeError(FlashError, TypeError):
    """An argument of the wrong kind."""


class ArgumentValueError(FlashError, ValueError):
    """An argument with an impossible value or shape."""


class UnsupportedError(FlashError, NotImplementedError):
    """A legal request that no chosen backend serves; `reasons` lists why, for every backend."""


class BackendUnavailableError(FlashError, RuntimeError):
    """The backend exists, but is not built for or cannot run on this machine."""


class LaunchError(FlashError, RuntimeError):
    """CUDA refused a launch; the message carries its text."""


def wrong_type(argument: str, given: Any, expected: str, hint: str = "") -> ArgumentTypeError:
    """`k must be a torch.Tensor, got list; ...`."""
    kind = type(given).__name__
    text = f"{argument} must be {expected}, got {kind}" + (f"; {hint}" if hint else "")
    return ArgumentTypeError(text, argument=argument, given=given, expected=expected)


def wrong_value(argument: str, given: Any, expected: str, hint: str = "") -> ArgumentValueError:
    """`layout must be "bshd" or "bhsd", got 'bhds'; ...`."""
    text = f"{argument} must be {expected}, got {given!r}" + (f"; {hint}" if hint else "")
    return ArgumentValueError(text, argument=argument, given=given, expected=expected)


def unsupported(argument: str, given: Any, expected: str, hint: str) -> UnsupportedError:
    """`dropout_p=0.1 is not supported: supported is 0; ...`."""
    text = f"{argument}={given!r} is not supported: supported is {expected}; {hint}"
    return UnsupportedError(text, argument=argument, given=given, expected=expected)


def describe_reasons(reasons: Reasons) -> str:
    """One line per backend: `  v3_hopper: needs compute capability 9.0, this is 8.0; ...`."""
    return "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
