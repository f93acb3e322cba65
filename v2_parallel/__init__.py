"""FlashAttention-2: one Q block per CTA, one slice of its rows per warp; O stays in registers."""

from flash.capability import Capability, Row, Tile

_DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256))

CAPABILITY = Capability(
    name="v2_parallel",
    idea="Q outer; O never leaves registers, one division at the end",
    rows=(Row(("float16", "bfloat16"), (8, 0), _DIMS, _DIMS, image="sm_80 and PTX"),),
    features=("causal", "window", "softcap", "gqa", "varlen", "lse", "lse gradient",
              "deterministic", "strides", "head_dim_v"),
    tiles={
        (way, d, d): Tile(128 if d < 256 else 64, 64, 2, 128)
        for way in ("forward", "backward") for d, _ in _DIMS
    },
    alignment=16,
)  # fmt: skip
