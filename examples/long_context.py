"""A small language model learns to recall what it read far above, on 1, 2 or 8 devices alike.

  torchrun --nproc-per-node 2 examples/long_context.py --seqlen 4096

One sequence is spread over all processes: K and V go around a ring (flash.context_parallel), and
parameters are sharded by FSDP2 (`fully_shard`). Each sequence is random text, then the same text
once more; the second half can be foretold only by looking back over half of the sequence. The loss
does not depend on the number of devices. On a CPU give a short --seqlen.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from flash import context_parallel as cp

HEADS, HEADS_KV, DIM = 4, 2, 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--backend", default="auto", help="as in flash.attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ulysses", action="store_true", help="exchange heads, without a ring")
    return parser.parse_args()


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding of (1, rows, heads, dim) by the rows' places in the whole sequence."""
    half = x.shape[-1] // 2
    speeds = 1e4 ** -(torch.arange(half, device=x.device) / half)
    angle = (places[:, None] * speeds)[None, :, None]
    a, b = x.float().chunk(2, -1)
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.cat(turned, -1).to(x.dtype)


class Block(nn.Module):
    """Attention over the whole sequence, then a gated MLP, on the rows held here."""

    def __init__(self, spread: dict[str, Any]) -> None:
        super().__init__()
        width = HEADS * DIM
        self.spread = spread
        self.qkv = nn.Linear(width, (HEADS + 2 * HEADS_KV) * DIM, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        qkv = self.qkv(rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, DIM))
        q, k, v = qkv.split((HEADS, HEADS_KV, HEADS_KV), dim=2)
        q, k = rotated(q, places), rotated(k, places)
        attended = cp.attention(q, k, v, causal=True, **self.spread)
        x = x + self.proj(attended.flatten(2))
        gate, up = self.up(rms_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Model(nn.Module):
    """Blocks between an embedding and its logits; every block is computed again in backward."""

    def __init__(self, layers: int, vocabulary: int, spread: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, HEADS * DIM)
        self.blocks = nn.ModuleList(Block(spread) for _ in range(layers))
        self.head = nn.Linear(HEADS * DIM, vocabulary, bias=False)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, places, use_reentrant=False)
        return self.head(rms_norm(x, x.shape[-1:]))


def text_twice(seqlen: int, vocabulary: int, step: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of the whole sequence, the same in every process; -100 is not asked for."""
    draw = torch.Generator().manual_seed(step)
    half = torch.randint(vocabulary, (1, seqlen // 2), generator=draw)
    tokens = torch.cat([half, half], 1)
    labels = tokens.roll(-1, 1)
    labels[:, : seqlen // 2] = labels[:, -1:] = -100
    return tokens, labels


def main() -> None:
    args = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    start(device, world)
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    everyone = dist.group.WORLD
    spread = {"ulysses" if args.ulysses else "ring": everyone}
    model = Model(args.layers, args.vocabulary, {**spread, "backend": args.backend})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.to(device, dtype)
    mesh = dist.init_device_mesh(device.type, (world,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    places = cp.shard(torch.arange(args.seqlen), dim=0, **spread).to(device)
    begin = time.perf_counter()
    for step in range(1, args.steps + 1):
        whole = text_twice(args.seqlen, args.vocabulary, step)
        tokens, labels = (cp.shard(x, **spread).to(device) for x in whole)
        asked = int((whole[1] != -100).sum())
        logits = model(tokens, places).float()
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (total * world / asked).backward()  # fully_shard takes the mean over processes
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        loss = total.detach() / asked
        dist.all_reduce(loss)
        if rank == 0:
            rate = step * args.seqlen / (time.perf_counter() - begin)
            text = f"step {step}/{args.steps}  loss {loss:.5f}  gradient {norm:.5f}"
            print(f"{text}  {rate:,.0f} tokens/s", flush=True)
    if rank == 0:
        print(f"guessing is {math.log(args.vocabulary):.3f}; {world} processes on {device.type}")
    dist.barrier()  # nobody's group goes while another still uses it
    dist.destroy_process_group()


def start(device: torch.device, world: int) -> None:
    """A process group, of one where torchrun did not start this."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(kind)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=world)


if __name__ == "__main__":
    main()
