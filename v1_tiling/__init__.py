"""FlashAttention-1: K/V blocks stay on chip while every Q block streams past them."""

from flash.capability import Capability, Row, Tile

_DIMS = ((64, 64), (128, 128))

CAPABILITY = Capability(
    name="v1_tiling",
    idea="K/V outer, Q inner; O, m and l travel through memory at every visit",
    rows=(
        Row(("float16",), (7, 5), _DIMS, _DIMS, (7, 9), image="sm_75"),
        Row(("float16", "bfloat16", "float32"), (8, 0), _DIMS, _DIMS, image="sm_80 and PTX"),
    ),
    features=("causal", "window", "softcap", "gqa", "varlen", "lse", "lse gradient",
              "deterministic", "strides", "head_dim_v"),
    tiles={
        ("forward", 64, 64): Tile(256, 768, 12, 256, whole=True),
        ("forward", 128, 128): Tile(256, 320, 5, 256, whole=True),
        ("backward", 64, 64): Tile(64, 128, 2, 128),
        ("backward", 128, 128): Tile(64, 64, 2, 128),
    },
)  # fmt: skip
