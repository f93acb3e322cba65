"""FlashAttention-3: TMA feeds a ring of K/V stages, warpgroups take turns on the tensor cores."""

from flash.capability import Capability, Row, Tile

_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))

CAPABILITY = Capability(
    name="v3_hopper",
    idea="producer and consumers over a ring of stages; softmax between the GEMMs; FP8",
    rows=(
        Row(("float16", "bfloat16"), (9, 0), _DIMS, _DIMS, (9, 0), image="sm_90a"),
        Row(("float8_e4m3fn",), (9, 0), _DIMS, (), (9, 0), image="sm_90a"),
    ),
    features=("causal", "window", "softcap", "gqa", "varlen", "fp8", "varlen fp8", "lse",
              "lse gradient", "deterministic", "strides", "head_dim_v"),
    tiles={
        ("forward", 64, 64): Tile(192, 128, 4, 512),
        ("forward", 96, 96): Tile(128, 128, 2, 384),
        ("forward", 128, 128): Tile(128, 128, 2, 384),
        ("forward", 192, 128): Tile(128, 128, 2, 384),
        ("forward", 192, 192): Tile(128, 64, 3, 384),
        ("forward", 256, 256): Tile(128, 64, 2, 384),
        ("backward", 64, 64): Tile(64, 128, 3, 512),
        ("backward", 96, 96): Tile(64, 128, 3, 512),
        ("backward", 128, 128): Tile(64, 128, 3, 384),
        ("backward", 192, 128): Tile(64, 64, 3, 384),
        ("backward", 192, 192): Tile(64, 64, 3, 384),
        ("backward", 256, 256): Tile(64, 64, 2, 384),
    },
    long_tiles={
        ("forward", 96, 96): Tile(192, 96, 2, 512),
        ("forward", 128, 128): Tile(192, 64, 3, 512),
    },
    fp8_tiles={
        ("forward", 64, 64): Tile(256, 128, 4, 640),
        ("forward", 96, 96): Tile(192, 128, 4, 512),
        ("forward", 128, 128): Tile(192, 128, 4, 512),
        ("forward", 192, 128): Tile(192, 128, 2, 512),
        ("forward", 192, 192): Tile(128, 128, 2, 384),
        ("forward", 256, 256): Tile(128, 128, 2, 384),
    },
    long_rows=8192,
    long_rows_full=2048,
    long_rows_of_all_heads=1 << 18,
    alignment=16,
    exact_head_dims=("float8_e4m3fn",),
)  # fmt: skip
