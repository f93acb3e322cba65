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
        ("forward", 64, 64): Tile(128, 128, 2, 128),
        ("forward", 96, 96): Tile(128, 64, 2, 128),
        ("forward", 128, 128): Tile(128, 64, 2, 128),
        ("forward", 192, 192): Tile(128, 128, 1, 256),
        ("forward", 256, 256): Tile(128, 128, 1, 256),
        ("backward", 64, 64): Tile(64, 128, 2, 128),
        ("backward", 96, 96): Tile(64, 64, 2, 128),
        ("backward", 128, 128): Tile(64, 128, 2, 256),
        ("backward", 192, 192): Tile(64, 64, 2, 256),
        ("backward", 256, 256): Tile(64, 64, 2, 256),
    },
)  # fmt: skip
