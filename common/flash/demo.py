"""The main job in one call: three generations on the same inputs, held against exact attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.analysis import peak_bytes, standard_steps
from flash.engines import kernels, reference
from flash.picture import census, visible_pairs
from flash.spec import Spec
from flash.tiles import Tile
from flash.traffic import Traffic

VERSIONS = ("v1_tiling", "v2_parallel", "v3_hopper")
STANDARD = "textbook"


@dataclass(frozen=True)
class Setting:
    """The inputs of a demonstration: N(0, 1), drawn once, the same for everybody."""

    batch: int = 1
    seqlen: int = 1024
    heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    causal: bool = True
    device: str = "cpu"
    seed: int = 0

    def draw(self) -> list[Tensor]:
        """q, k, v, dout."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.seqlen, self.heads, self.head_dim)
        drawn = (torch.randn(shape, generator=generator) for _ in range(4))
        return [x.to(self.device, self.dtype) for x in drawn]

    def spec(self) -> Spec:
        return Spec(self.head_dim**-0.5, right=0 if self.causal else None)

    def describe(self) -> str:
        mask = "causal" if self.causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        return (f"batch {self.batch}, {self.seqlen} rows and keys, {self.heads} heads of "
                f"{self.head_dim}, {dtype}, {mask}, on {self.device}")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    direction: str
    ran: str  # kernel or schedule
    error: float  # relative L2, against fp64
    hbm_bytes: int  # counted by the schedule
    flops: int  # of the tiles that are computed
    memory: int  # bytes allocated, inputs not counted
    ms: float | None = None  # kernels only

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.to(torch.float64) - exact).norm() / exact.norm())


def textbook(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Standard attention: S and P exist in full. The baseline of every claim here."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    S = (q @ k.mT) * spec.scale
    if spec.right is not None:
        hidden = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)
        S = S.masked_fill(hidden, -torch.inf)
    P = S.softmax(-1)
    return (P @ v).transpose(1, 2)


def textbook_line(setting: Setting, inputs: list[Tensor], exact: Tensor, spec: Spec) -> Line:
    q, k, v, _ = inputs
    out = textbook(q, k, v, spec)
    steps = standard_steps(setting.seqlen, setting.head_dim, q.element_size())
    heads = setting.batch * setting.heads
    return Line(STANDARD, "forward", "PyTorch", relative(out, exact),
                heads * sum(step.nbytes for step in steps),
                heads * (steps[0].flops + steps[2].flops),
                memory_of(lambda: textbook(q, k, v, spec), q.device))  # fmt: skip


def memory_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` had allocated at its peak."""
    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median of event-timed calls after warm-up; `bench/` measures with more care."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def has_kernel(version: str, inputs: list[Tensor], direction: str) -> bool:
    """This version's kernels are here, run on this device, and serve these inputs."""
    q, _, v, _ = inputs
    if q.device.type != "cuda" or kernels.load(version).module is None:
        return False
    if kernels.probe(version, torch.cuda.current_device()):
        return False
    way, code = int(direction == "backward"), kernels.CODES[q.dtype]
    return any(
        row[:2] == (way, code) and q.shape[-1] <= row[2] and v.shape[-1] <= row[3]
        for row in kernels.instances(version)
    )


class Answer(NamedTuple):
    """The exact results in fp64, and out and lse as the backward pass is given them."""

    out: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    saved: tuple[Tensor, Tensor]


def solve(inputs: list[Tensor], spec: Spec) -> Answer:
    q, k, v, dout = (x.to(torch.float64) for x in inputs)
    out, lse = reference.forward(q, k, v, spec)
    grads = reference.backward(dout, None, q, k, v, out, lse, spec)
    return Answer((out,), tuple(grads), (out.to(inputs[0].dtype), lse.to(torch.float32)))


def lines(setting: Setting, progress: Callable[[str], None] = lambda _: None) -> Iterator[Line]:
    """Textbook attention, then the three generations, forward and backward."""
    inputs, spec = setting.draw(), setting.spec()
    progress("exact reference in fp64")
    answer = solve(inputs, spec)
    progress(STANDARD)
    yield textbook_line(setting, inputs, answer.out[0], spec)
    for version in VERSIONS:
        for direction in ("forward", "backward"):
            progress(f"{version} {direction}")
            yield version_line(version, direction, setting, inputs, answer)


def version_line(
    version: str, direction: str, setting: Setting, inputs: list[Tensor], answer: Answer
) -> Line:
    """One generation: its kernel where this GPU has it, else its schedule, which counts bytes."""
    (q, k, v, dout), spec = inputs, setting.spec()
    schedule = importlib.import_module(f"flash.{version}.schedule")
    kernel = has_kernel(version, inputs, direction)
    engine: Any = kernels.engine(version) if kernel else schedule

    def call(engine: Any = engine, **options: Any) -> tuple[Tensor, ...]:
        if direction == "forward":
            return (engine.forward(q, k, v, spec, **options).out,)
        return tuple(engine.backward(dout, None, q, k, v, *answer.saved, spec, **options))

    traffic = Traffic()
    call(schedule, traffic=traffic)
    exact = answer.out if direction == "forward" else answer.grads
    pairs = census(spec, setting.seqlen, setting.seqlen, Tile(*schedule.TILE)).pairs_computed
    flops = 4 * setting.batch * setting.heads * setting.head_dim * pairs
    return Line(
        version,
        direction,
        "kernel" if kernel else "schedule",
        max(relative(x, y) for x, y in zip(call(), exact, strict=True)),
        traffic.total,
        flops if direction == "forward" else flops * 5 // 2,
        memory_of(call, q.device),
        milliseconds(call) if kernel else None,
    )


def exact_flops(setting: Setting) -> int:
    """4 d per visible pair: what a perfect kernel would compute."""
    pairs = visible_pairs(setting.spec(), setting.seqlen, setting.seqlen)
    return 4 * setting.batch * setting.heads * setting.head_dim * pairs
