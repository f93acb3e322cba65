"""Context parallel attention on the GPUs of one host, beside one GPU's share alone and torch's own.

  torchrun --nproc-per-node 2 -m bench.context_parallel [--tokens-per-gpu 65536] [--json FILE]

Each row is forward plus backward of one causal attention, the slowest process, the median of some
runs; of several sizes, the later ones are run by the ring only. The share is the same number of
score pairs on every GPU at once with nothing to exchange: all rows, and heads divided by the number
of GPUs. TFLOP/s are per GPU by the papers' convention.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash
from bench import record
from flash import context_parallel as cp
from flash.study.timing import Board

Run = Callable[[], Any]
Inside = Callable[[Callable[[Run], Any]], Any]  # times a run where it has to be
HEADS, HEADS_KV, DIM = 32, 8, 128


def main() -> None:
    args = parse()
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]))
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    world, rows = dist.get_world_size(), []
    for place, tokens in enumerate(args.tokens_per_gpu):
        for name, kind in ways(world).items():
            if name != "ring" and (place or name not in (args.only or [name])):
                continue
            rows.append(measured(name, kind, tokens, device, args))
            compared(rows[-1], rows)
            if dist.get_rank() == 0:
                print(line(rows[-1]), flush=True)
    if dist.get_rank() == 0 and args.json:
        head = {"environment": record.environment({}, "cpu")}
        if args.device == "cuda":
            head = record.head(Board().facts())
        about = {"date": record.now(), "command": "torchrun -m bench.context_parallel"}
        record.write(args.json, {**head, **about, "spread": rows})
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens-per-gpu", type=int, nargs="+", default=[1 << 16])
    parser.add_argument("--backend", default="auto", help="as in flash.attention")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    return parser.parse_args()


def ways(world: int) -> dict[str, Callable[..., Inside]]:
    """What is timed, the share first: all others are compared with it."""
    found: dict[str, Callable[..., Inside]] = {
        "share alone": share, "ring": ours("ring"), "ulysses": ours("ulysses"),
    }  # fmt: skip
    if world >= 4 and world % 2 == 0:
        found["both"] = ours("both")
    return {**found, "torch, its flash": torchs(None), "torch, activated": torchs("activate")}


def draw(tokens: int, heads: tuple[int, int], device: torch.device) -> list[Tensor]:
    """q, k, v, dout; N(0, 1)."""
    shapes = ((1, tokens, n, DIM) for n in (heads[0], heads[1], heads[1], heads[0]))
    return [torch.randn(*s, device=device, dtype=torch.bfloat16) for s in shapes]


def share(tokens: int, device: torch.device, backend: str) -> Inside:
    world = dist.get_world_size()
    heads = (HEADS // world, max(HEADS_KV // world, 1))
    *qkv, dout = draw(tokens * world, heads, device)
    qkv = [x.requires_grad_() for x in qkv]

    def run() -> Any:
        out = flash.attention(*qkv, causal=True, backend=backend)
        return out, torch.autograd.grad(out, qkv, dout)

    return lambda timed: timed(run)


def groups(kind: str) -> dict[str, Any]:
    """Heads are exchanged within pairs where both are used, the ring is over the pairs."""
    if kind != "both":
        return {kind: dist.group.WORLD}
    rank, world = dist.get_rank(), dist.get_world_size()
    rings = [dist.new_group(list(range(u, world, 2))) for u in (0, 1)]
    pairs = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    return {"ring": rings[rank % 2], "ulysses": pairs[rank // 2]}


def ours(kind: str) -> Callable[..., Inside]:
    def prepare(tokens: int, device: torch.device, backend: str) -> Inside:
        *qkv, dout = draw(tokens, (HEADS, HEADS_KV), device)
        qkv, where = [x.requires_grad_() for x in qkv], groups(kind)

        def run() -> Any:
            out = cp.attention(*qkv, causal=True, backend=backend, **where)
            return out, torch.autograd.grad(out, qkv, dout)

        return lambda timed: timed(run)

    return prepare


def torchs(door: str | None) -> Callable[..., Inside]:
    """torch.distributed.tensor.experimental.context_parallel, over its kernels or over ours."""

    def prepare(tokens: int, device: torch.device, backend: str) -> Inside:
        from torch.distributed.tensor.experimental import context_parallel

        world = dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        *qkv, _ = draw(tokens * world, (HEADS, HEADS_KV), device)
        qkv = [x.transpose(1, 2).contiguous() for x in qkv]
        dout = torch.randn(1, HEADS, tokens, DIM, device=device, dtype=torch.bfloat16)

        def attend(k: Tensor, v: Tensor, **options: Any) -> Any:
            # by its whole name, under which context_parallel puts its own
            out = torch.nn.functional.scaled_dot_product_attention(
                qkv[0], k, v, is_causal=True, **options
            )
            return out, torch.autograd.grad(out, qkv, dout)

        def run() -> Any:
            try:
                return attend(*qkv[1:], enable_gqa=True)
            except (NotImplementedError, RuntimeError):  # no grouped heads in this torch
                return attend(*(x.repeat_interleave(HEADS // HEADS_KV, 1) for x in qkv[1:]))

        def inside(timed: Callable[[Run], Any]) -> Any:
            gone = set(qkv)
            with context_parallel(
                mesh, buffers=qkv, buffer_seq_dims=[2, 2, 2], no_restore_buffers=gone
            ):
                for x in qkv:
                    x.requires_grad_()
                if door is not None:
                    flash.activate(backend)
                try:
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        return timed(run)
                finally:
                    flash.deactivate()

        return inside

    return prepare


def measured(
    name: str, prepare: Callable[..., Inside], tokens: int, device: torch.device, args: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "tokens_per_gpu": tokens}
    try:
        inside = prepare(tokens, device, args.backend)
        row["ms"] = inside(lambda timed: clocked(timed, device, args.seconds))
        last = flash.last_dispatch()
        row["backend"] = "torch" if name == "torch, its flash" or not last else last.backend
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if device.type == "cuda":
        row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def clocked(run: Run, device: torch.device, seconds: float) -> float:
    """Milliseconds; every process agrees on the number of runs."""
    run()
    times = [slowest(timed(run, device), device)]
    more = max(1, int(seconds / times[0]))
    times += [slowest(timed(run, device), device) for _ in range(more)]
    return round(1e3 * statistics.median(times), 2)


def timed(run: Run, device: torch.device) -> float:
    settled(device)
    dist.barrier()
    begin = time.perf_counter()
    run()
    settled(device)
    return time.perf_counter() - begin


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(seconds: float, device: torch.device) -> float:
    x = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def compared(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds the rate per GPU, and the share's time in the row's."""
    row["gpus"] = dist.get_world_size()
    row["tokens"] = tokens = row["tokens_per_gpu"] * row["gpus"]
    if "ms" not in row:
        return
    flops = 3.5 * 4 * HEADS * DIM * tokens * (tokens + 1) / 2 / row["gpus"]
    row["tflops"] = round(flops / row["ms"] / 1e9, 1)
    shares = [r for r in rows if r["name"] == "share alone" and r["tokens"] == tokens]
    if shares and "ms" in shares[0]:
        row["linear"] = round(shares[0]["ms"] / row["ms"], 4)


def line(row: dict[str, Any]) -> str:
    """tokens, way, ms, share of linear scaling, TFLOP/s per GPU, peak GiB, engine"""
    head = f"{row['tokens']:>8} {row['name']:<18}"
    if "ms" not in row:
        return f"{head} {row['error'][:150]}"
    linear = f"{row['linear']:6.1%}" if "linear" in row else "     -"
    rate, memory = f"{row['tflops']:7.1f} TFLOP/s", f"{row.get('gib', 0):6.1f} GiB"
    return f"{head} {row['ms']:9.2f} ms {linear} {rate} {memory} {row['backend']}"


if __name__ == "__main__":
    main()
