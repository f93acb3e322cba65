"""What of flash-attn's arguments is served, and errors that name it for the rest."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from flash.errors import unsupported, wrong_type, wrong_value
from flash.options import real, refuse_unknown

Window = tuple[int | None, int | None]
INERT = {
    "qv": ((None,), "give K and V only"),
    "attention_chunk": ((0, None), "use window_size for local attention"),
    "num_splits": ((0, 1), "keys are not split by request; leave it out"),
    "pack_gqa": ((None, True, False), ""),  # of speed only; the kernels decide
    "sm_margin": ((0,), "kernels use the whole GPU; leave it out"),
    "seqused_q": ((None,), "give cumulative lengths without gaps"),
    "seqused_k": ((None,), "give cumulative lengths without gaps"),
    "block_table": ((None,), "there is no paged K/V cache: give K and V packed"),
    "page_table": ((None,), "there is no paged K/V cache: give K and V packed"),
    "learnable_sink": ((None,), "there are no sinks"),
    "score_mod": ((None,), "use torch's flex_attention"),
    "mask_mod": ((None,), "use causal and window_size, or torch's flex_attention"),
}
SCALES = ("q_descale", "k_descale", "v_descale")
OPTIONS = (
    "softmax_scale", "causal", "window_size", "softcap", "deterministic", "return_attn_probs",
    "backend",
)  # fmt: skip


def refuse(argument: str, given: Any, expected: str, hint: str) -> NoReturn:
    raise unsupported(argument, given, expected, hint)


def served(
    function: str, dropout_p: Any, alibi_slopes: Any, later: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The FP8 scales, if any; raises for what would change the result and is not served."""
    if dropout_p != 0.0:
        probability = real("dropout_p", dropout_p)
        if not 0.0 <= probability <= 1.0:
            raise wrong_value("dropout_p", dropout_p, "between 0 and 1")
        hint = "set it to 0, as in evaluation, or use torch's scaled_dot_product_attention"
        refuse("dropout_p", dropout_p, "0.0 (the scale of scores is `softmax_scale`)", hint)
    if alibi_slopes is not None:
        hint = "there are causal, window_size and softcap; for biases use torch's flex_attention"
        refuse("alibi_slopes", "a tensor", "None", hint)
    if not later:
        return None
    for name, given in later.items():
        if name in INERT:
            allowed, hint = INERT[name]
            if not any(given is x or (type(given) is int and given == x) for x in allowed):
                shown = "a tensor" if isinstance(given, torch.Tensor) else given
                refuse(name, shown, " or ".join(map(str, allowed)), hint)
        elif name not in SCALES:
            refuse_unknown(
                f"compat.flash_attn.{function}", {name: given}, (*OPTIONS, *INERT, *SCALES)
            )
    scales = tuple(later.get(name) for name in SCALES)
    if all(x is None for x in scales):
        return None
    return tuple(_blocked(x) for x in scales)


def _blocked(scale: Any) -> Any:
    """flash-attn's (batch, heads_kv) scales as (batch, 1 block, heads_kv)."""
    return scale.unsqueeze(1) if isinstance(scale, torch.Tensor) and scale.ndim == 2 else scale


def window_of(window_size: Any, causal: Any) -> Window | None:
    """-1 and None mean no limit; causal hides the right side whatever was given for it."""
    if not isinstance(window_size, (tuple, list)):
        raise wrong_type("window_size", window_size, "(left, right), -1 for no limit")
    if len(window_size) != 2:
        raise wrong_value("window_size", window_size, "(left, right), -1 for no limit")
    left, right = (None if x == -1 else x for x in window_size)
    right = 0 if causal and right is not None else right
    return None if left is None and right is None else (left, right)


def count(name: str, given: Any) -> int:
    """A number that may come as a tensor of one element, which is then waited for."""
    if isinstance(given, torch.Tensor) and given.numel() == 1:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, int):
        raise wrong_type(name, given, "an int")
    return given
