"""Trains blocks of GPT-2 medium's and BERT large's size with each attention: under a minute.

`python -m bench.end_to_end` writes bench/results/<gpu>/end_to_end.json: loss curves on the same
data from the same weights, then step time and memory against length until memory ends.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import script
from bench.memory import STANDARD, attention
from flash.study.competitors import OURS
from flash.study.measure import reason

LENGTHS = tuple(1 << n for n in range(10, 17))
ATTENTIONS = (STANDARD, *OURS)
LEARNING_RATE = 1e-4
IGNORED = -100


@dataclass(frozen=True)
class Model:
    """The published width and heads; fewer layers, a small vocabulary, random weights."""

    name: str
    causal: bool
    width: int = 1024
    heads: int = 16
    layers: int = 4
    vocabulary: int = 2048


MODELS = (Model("GPT-2 medium size", causal=True), Model("BERT large size", causal=False))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.heads, self.causal, self.attention = model.heads, model.causal, name
        self.norms = nn.ModuleList(nn.LayerNorm(model.width) for _ in range(2))
        self.qkv = nn.Linear(model.width, 3 * model.width)
        self.out = nn.Linear(model.width, model.width)
        self.mlp = nn.Sequential(nn.Linear(model.width, 4 * model.width), nn.GELU(),
                                 nn.Linear(4 * model.width, model.width))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(2)
        seen = attention(OURS.get(self.attention, self.attention), q, k, v, self.causal)
        x = x + self.out(seen.flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return x


class Network(nn.Module):
    def __init__(self, model: Model, name: str, seqlen: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary + 1, model.width)
        self.places = nn.Embedding(seqlen, model.width)
        self.blocks = nn.Sequential(*(Block(model, name) for _ in range(model.layers)))
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(model.width, model.vocabulary, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            hidden = self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])
            scores = self.head(self.norm(hidden))
        return F.cross_entropy(scores.float().flatten(0, 1), target.flatten(),
                               ignore_index=IGNORED)  # fmt: skip


def batches(model: Model, count: int, batch: int, seqlen: int, device: str) -> list[Any]:
    """Frequent and rare tokens, half of them set by the one before: next, or masked, tokens."""
    torch.manual_seed(2)
    table = torch.randint(model.vocabulary, (model.vocabulary,))
    x = (model.vocabulary ** torch.rand(count * batch, seqlen + 1)).long() - 1
    bound = torch.rand(x.shape) < 0.5
    for place in range(1, seqlen + 1):
        x[:, place] = torch.where(bound[:, place], table[x[:, place - 1]], x[:, place])
    hidden = torch.rand(x[:, 1:].shape) < 0.15
    before, after = x[:, :-1], x[:, 1:]
    if not model.causal:
        before, after = after.masked_fill(hidden, model.vocabulary), after.masked_fill(
            ~hidden, IGNORED)  # fmt: skip
    return [(before[i::count].to(device), after[i::count].to(device)) for i in range(count)]


class Trainer:
    """The same weights and the same data for every attention."""

    def __init__(self, model: Model, name: str, seqlen: int, device: str) -> None:
        torch.manual_seed(1)
        with torch.device(device):
            self.network = Network(model, name, seqlen)
        for weights in self.network.parameters():
            if weights.dim() > 1:
                nn.init.normal_(weights, std=0.02)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.network(x, target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def curve(model: Model, name: str, data: list[Any], steps: int, device: str) -> list[float]:
    trainer = Trainer(model, name, data[0][0].shape[1], device)
    losses = [trainer.step(*data[i % len(data)]) for i in range(steps)]
    return [round(float(loss), 5) for loss in losses]


def timed(model: Model, name: str, seqlen: int, steps: int = 3) -> dict[str, Any]:
    """Median step of a batch of one, and the peak of all memory."""
    row: dict[str, Any] = {"model": model.name, "competitor": name, "seqlen": seqlen, "batch": 1}
    try:
        trainer = Trainer(model, name, seqlen, "cuda")
        x, target = (torch.randint(model.vocabulary, (1, seqlen), device="cuda") for _ in "xy")
        trainer.step(x, target)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            trainer.step(x, target)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated()
        return {**row, "ms": float(f"{statistics.median(times):.5g}"), "memory_bytes": peak}
    except Exception as problem:
        return {**row, "why": reason(problem)}


def curves(steps: int, seqlen: int, device: str, models: tuple[Model, ...] = MODELS) -> list[Any]:
    found: list[dict[str, Any]] = []
    for model in models:
        data = batches(model, 8, 4, seqlen, device)
        for name in ATTENTIONS:
            row: dict[str, Any] = {"model": model.name, "competitor": name, "seqlen": seqlen}
            try:
                row["losses"] = curve(model, name, data, steps, device)
            except Exception as problem:
                row["why"] = reason(problem)
            found.append(row)
            last = row["losses"][-1] if "losses" in row else row["why"]
            print(model.name, name, last, flush=True)
    return found


def sweep(deadline: float) -> list[dict[str, Any]]:
    """Shortest first; an attention that is out of memory is not asked for more."""
    rows, ended = [], set()
    for seqlen in LENGTHS:
        for model in MODELS:
            for name in ATTENTIONS:
                if (model, name) in ended or time.monotonic() > deadline:
                    continue
                rows.append(timed(model, name, seqlen))
                if "why" in rows[-1]:
                    ended.add((model, name))
                gc.collect()
                torch.cuda.empty_cache()
                print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=55)
    args = parser.parse_args()
    if script.lacks_gpu("end_to_end"):
        return 2
    deadline = time.monotonic() + args.seconds
    found = {"curves": curves(args.steps, 1024, "cuda"), "steps": sweep(deadline)}
    script.leave(args.out, "end_to_end", found, f"end_to_end --steps {args.steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
