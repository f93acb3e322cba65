"""The options of a call, checked and turned into a Spec."""

from __future__ import annotations

import math
import numbers
import sys
from difflib import get_close_matches
from typing import Any

import torch

from flash.capability import ALIASES, BACKENDS
from flash.errors import ArgumentTypeError, UnsupportedError, unsupported, wrong_type, wrong_value
from flash.spec import Spec

_LARGEST = sys.float_info.max
_FLOAT32 = torch.finfo(torch.float32)  # the kernels' numbers
LAYOUTS = ("bshd", "bhsd")
ALIGNMENTS = ("bottom-right", "top-left")
OTHER_NAMES = {
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "scaling": "scale",
    "is_causal": "causal",
    "causal_mask": "causal",
    "window_size": "window",
    "sliding_window": "window",
    "logits_soft_cap": "softcap",
    "softcapping": "softcap",
    "return_softmax_lse": "return_lse",
    "return_attn_probs": "return_lse",
    "is_deterministic": "deterministic",
    "qkv_format": "layout",
    "kv_layout": "layout",
    "impl": "backend",
    "descale_q": "q_descale",
    "descale_k": "k_descale",
    "descale_v": "v_descale",
    "max_length_q": "max_seqlen_q",
    "max_length_k": "max_seqlen_k",
    "cu_seq_lens_q": "cu_seqlens_q",
    "cu_seq_lens_k": "cu_seqlens_k",
    "softmax_lse": "lse",
    "do": "dout",
}
NEVER = {
    "dropout_p": "dropout is not offered; use torch's scaled_dot_product_attention",
    "attn_mask": "there is no dense mask: use causal, window or attention_varlen, or flash.sdpa",
    "attn_bias": "there is no dense bias; use torch's scaled_dot_product_attention",
    "alibi_slopes": "there are no position biases; use torch's flex_attention",
    "block_table": "there is no paged K/V cache",
    "page_table": "there is no paged K/V cache",
    "num_splits": "keys are not split by request",
    "enable_gqa": "grouped query heads need no switch; only flash.sdpa takes it",
}


def refuse_unknown(function: str, unknown: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise for a keyword that does not exist, naming the one that was meant."""
    if not unknown:
        return
    name, given = next(iter(unknown.items()))
    if name in NEVER:
        text = f"flash.{function} does not take {name!r}: {NEVER[name]}"
        raise ArgumentTypeError(text, argument=name, given=given, expected=known)
    meant = OTHER_NAMES.get(name, "")
    if meant in known:
        hint = f"it is called {meant!r} here"
    else:
        close = get_close_matches(name, known, n=1, cutoff=0.75)
        meant = close[0] if close else ""
        hint = f"did you mean {meant!r}?" if meant else f"it takes {', '.join(known)}"
    text = f"unknown argument {name!r} of flash.{function}; {hint}"
    raise ArgumentTypeError(text, argument=name, given=given, expected=meant or known)


def flag(name: str, given: Any) -> bool:
    if type(given) is not bool:
        raise wrong_type(name, given, "a bool", "pass True or False")
    return given


def choice(name: str, given: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(given, str):
        raise wrong_type(name, given, f"a string, one of {', '.join(allowed)}")
    if given not in allowed:
        close = get_close_matches(given, allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise wrong_value(name, given, "one of " + ", ".join(map(repr, allowed)), hint)
    return given


def real(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float, numbers.Real)):
        raise wrong_type(name, given, "a number", "a tensor would need a copy from the device")
    try:
        value = float(given)
    except OverflowError:
        value = math.inf
    if not -_LARGEST <= value <= _LARGEST:  # NaN and infinity, also of a traced number
        raise wrong_value(name, given, "a finite number")
    return value


def backend_name(given: Any) -> str:
    """ "v2" -> "v2_parallel"; "auto" stays."""
    if isinstance(given, str) and given in ALIASES:
        return ALIASES[given]
    return choice("backend", given, ("auto", *BACKENDS, *ALIASES))


def window_sides(given: Any) -> tuple[int | None, int | None]:
    if given is None:
        return None, None
    expected = "(left, right), each an int >= 0 or None for no limit"
    if not isinstance(given, (tuple, list)):
        raise wrong_type("window", given, expected, "one number w is (w, w) or, causal, (w, 0)")
    if len(given) != 2:
        raise wrong_value("window", given, expected)
    for side in given:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise wrong_type("window", side, expected)
        if side is not None and side < 0:
            raise wrong_value("window", given, expected, "no limit is None, not a negative number")
    return given[0], given[1]


def band(causal: Any, window: Any) -> tuple[int | None, int | None, bool]:
    """(left, right, top_left)."""
    if isinstance(causal, str):
        top_left = choice("causal", causal, ALIGNMENTS) == "top-left"
        is_causal = True
    elif type(causal) is bool:
        top_left, is_causal = False, causal
    else:
        raise wrong_type("causal", causal, 'a bool, "bottom-right" or "top-left"')
    left, right = window_sides(window)
    if is_causal and right is not None and right > 0:
        hint = "causal hides every key to the right: pass (left, 0), or causal=False"
        raise wrong_value("window", window, "without a right side when causal", hint)
    return left, 0 if is_causal else right, top_left


def make_spec(
    causal: Any, window: Any, scale: Any, softcap: Any, deterministic: Any, head_dim: int
) -> Spec:
    left, right, top_left = band(causal, window)
    factor = head_dim**-0.5 if scale is None else real("scale", scale)
    cap = real("softcap", softcap)
    if cap < 0:
        raise wrong_value("softcap", softcap, ">= 0", "0 switches it off")
    if cap and not _FLOAT32.tiny <= cap <= _FLOAT32.max:
        expected = f"0 or between {_FLOAT32.tiny:.2g} and {_FLOAT32.max:.2g}, as float32 holds it"
        raise wrong_value("softcap", softcap, expected, "0 switches it off")
    if scale is not None and not -_FLOAT32.max <= factor <= _FLOAT32.max:
        raise wrong_value("scale", scale, f"at most {_FLOAT32.max:.2g}, as float32 holds it")
    repeats = flag("deterministic", deterministic) or torch.are_deterministic_algorithms_enabled()
    return Spec(factor, cap, left, right, top_left, repeats)


def check_precision(precision: Any, dtype: Any, allowed: tuple[Any, ...]) -> bool:
    """True when 16-bit inputs shall be quantized for an FP8 forward."""
    if precision is None:
        return False
    choice("precision", precision, ("fp8",))
    if dtype not in allowed:
        hint = "quantization starts from float16 or bfloat16"
        error: UnsupportedError = unsupported("precision", precision, "None for this dtype", hint)
        raise error
    return True
