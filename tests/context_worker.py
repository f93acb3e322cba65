"""Processes of a group against one process: prints a case and its errors per line.

python tests/context_worker.py WORLD: as few imports of torch as possible, so children are forked.
They use NCCL where there are as many GPUs, otherwise gloo and the CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import flash
from flash import context_parallel as cp

WORLD = int(sys.argv[1])
ON_GPUS = torch.cuda.device_count() >= WORLD
SHAPE = (2, 512, 4, 128) if ON_GPUS else (2, 32, 4, 16)
Groups = dict[str, Any]


def arrangements(world: int) -> dict[str, Groups]:
    """Ring, Ulysses and, on four processes, two by two."""
    everyone = dist.group.WORLD
    found: dict[str, Groups] = {"ring": {"ring": everyone}, "ulysses": {"ulysses": everyone}}
    if world == 4:
        rank = dist.get_rank()
        rings = [dist.new_group([u, u + 2]) for u in (0, 1)]
        heads = [dist.new_group([2 * r, 2 * r + 1]) for r in (0, 1)]
        found["both"] = {"ring": rings[rank % 2], "ulysses": heads[rank // 2]}
    return found


def cases() -> Iterator[tuple[str, dict[str, Any], torch.dtype, int]]:
    """(backend, options, dtype, heads of K and V)."""
    for causal in (False, True):
        for heads_kv in (4, 2):
            yield "torch", {"causal": causal}, torch.float32, heads_kv
        yield "v1", {"causal": causal, "scale": 0.3}, torch.float32, 2
        yield "v2", {"causal": causal}, torch.bfloat16, 2
        yield "v3", {"causal": causal}, torch.bfloat16, 2
        yield "reference", {"causal": causal, "softcap": 3.0}, torch.float64, 1
    yield "torch", {"causal": True, "window": (5, 0)}, torch.float32, 2


def served(backend: str, dtype: torch.dtype) -> bool:
    """The schedules are everywhere; kernels only where they were built for this GPU."""
    if not ON_GPUS:
        return True
    x = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    try:
        flash.attention(x, x, x, backend=backend).sum().backward()
    except flash.BackendUnavailableError:
        return False
    return True


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    errors = [(a.double() - b.double()).abs().max() / b.double().abs().max() for a, b in pairs]
    return float(torch.stack(errors).detach().max())


def whole_and_parts(groups: Groups, backend: str, options: Any, dtype: Any, heads_kv: int) -> float:
    torch.manual_seed(len(str(options)) + heads_kv)
    shapes = (SHAPE, (*SHAPE[:2], heads_kv, SHAPE[3]), (*SHAPE[:2], heads_kv, SHAPE[3]))
    whole = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    dout = torch.randn(SHAPE).to(dtype)
    dlse = torch.randn(SHAPE[0], SHAPE[2], SHAPE[1])
    exact = [x.detach().double().requires_grad_() for x in whole]
    out, lse = flash.attention(*exact, return_lse=True, backend="reference", **options)
    grads = torch.autograd.grad((out, lse), exact, (dout.double(), dlse.double()))
    held = [cp.shard(x.detach(), **groups).requires_grad_() for x in whole]
    part = cp.attention(*held, return_lse=True, backend=backend, **options, **groups)
    cotangents = (cp.shard(dout, **groups), cp.shard(dlse.to(part[1].dtype), **groups, dim=2))
    found = torch.autograd.grad(part, held, cotangents)
    ours = [part[0], part[1].transpose(1, 2), *found]
    theirs = [out, lse.transpose(1, 2), *grads]
    again = cp.unshard(cp.shard(whole[0], **groups), **groups)
    assert torch.equal(again, whole[0])
    return worst(ours, [cp.shard(x.detach(), **groups) for x in theirs])


PACKED = {"zigzag": (0, 8, 8, 24, 64), "any": (0, 1, 14, 17, 44, 64)}


def packed_cases() -> Iterator[tuple[str, dict[str, Any], torch.dtype, str]]:
    for causal in (False, True):
        for lengths in PACKED:
            yield "torch", {"causal": causal}, torch.float32, lengths
        yield "v2", {"causal": causal}, torch.bfloat16, "any"
        yield "reference", {"causal": causal, "softcap": 3.0}, torch.float64, "any"
    yield "torch", {"causal": True, "window": (5, 0)}, torch.float32, "any"


def packed_and_parts(groups: Groups, backend: str, options: Any, dtype: Any, lengths: str) -> float:
    torch.manual_seed(len(str(options)))
    ends = PACKED[lengths]
    where = {**groups, "dim": 0, "cu_seqlens": ends}
    shapes = ((64, 4, SHAPE[3]), (64, 2, SHAPE[3]), (64, 2, SHAPE[3]))
    whole = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    dout, dlse = torch.randn(shapes[0]).to(dtype), torch.randn(64, 4)
    exact = [x.detach().double().requires_grad_() for x in whole]
    cu = torch.tensor(ends, dtype=torch.int32)
    out, lse = flash.attention_varlen(
        *exact, cu, cu, return_lse=True, backend="reference", **options
    )
    grads = torch.autograd.grad((out, lse), exact, (dout.double(), dlse.double().T))
    held = [cp.shard(x.detach(), **where).requires_grad_() for x in whole]
    part = cp.attention_varlen(*held, ends, return_lse=True, backend=backend, **options, **groups)
    cotangents = (cp.shard(dout, **where), cp.shard(dlse, **where).T.to(part[1].dtype))
    found = torch.autograd.grad(part, held, cotangents)
    assert torch.equal(cp.unshard(held[0], **where), whole[0])
    theirs = [cp.shard(x.detach(), **where) for x in (out, lse.T, *grads)]
    return worst([part[0], part[1].T, *found], theirs)


def dtype_of(backend: str) -> torch.dtype:
    """torch's flash attention on a GPU is for 16 bits."""
    return torch.float32 if backend == "v1" and not ON_GPUS else torch.bfloat16


def torchs_context_parallel(backend: str) -> float:
    """torch's own ring, causal, over the operators that flash.activate replaces."""
    torch.manual_seed(5)
    shapes = ((2, 4, 64, SHAPE[3]), (2, 2, 64, SHAPE[3]), (2, 2, 64, SHAPE[3]))
    dtype = dtype_of(backend)
    whole = [torch.randn(s).to(dtype) for s in shapes]
    exact = [x.double().requires_grad_() for x in whole]
    out = flash.attention(*exact, causal=True, layout="bhsd", backend="reference")
    dout = torch.randn_like(out)
    theirs = [out, *torch.autograd.grad(out, exact, dout)]
    held = cp.shard(dout.to(dtype), ring=dist.group.WORLD, dim=2)
    found = (_on_gpus if ON_GPUS else _on_cpus)(whole, held, backend)
    return worst(found, [cp.shard(x.detach(), ring=dist.group.WORLD, dim=2) for x in theirs])


def _on_gpus(whole: list[Tensor], dout: Tensor, backend: str) -> list[Tensor]:
    from torch.distributed.tensor.experimental import context_parallel

    mesh = dist.init_device_mesh("cuda", (WORLD,))
    everything = {"buffers": whole, "no_restore_buffers": set(whole)}
    with context_parallel(mesh, buffer_seq_dims=[2, 2, 2], **everything):
        qkv = [x.requires_grad_() for x in whole]
        flash.activate(backend)
        try:
            out = torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=True
            )
            return [out, *torch.autograd.grad(out, qkv, dout)]
        finally:
            flash.deactivate()


def _on_cpus(whole: list[Tensor], dout: Tensor, backend: str) -> list[Tensor]:
    """torch's ring knows the operators of a GPU only: ours stand in their place on the CPU too."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    from flash.options import backend_name
    from flash.sdpa_override import cuda_backward, cuda_forward

    mesh, backend = dist.init_device_mesh("cpu", (WORLD,)), backend_name(backend)
    library, name = torch.library.Library("aten", "IMPL"), "_scaled_dot_product_flash_attention"
    library.impl(name, cuda_forward(_missing, backend), "CPU")
    library.impl(f"{name}_backward", cuda_backward(_missing, backend), "CPU")
    qkv = [cp.shard(x, ring=dist.group.WORLD, dim=2) for x in whole]
    out, lse, *rest = ring._scaled_dot_product_ring_flash_attention(mesh, *qkv, is_causal=True)
    cu_q, cu_k, longest_q, longest_k, seed, offset, _ = rest
    grads = ring._scaled_dot_product_ring_flash_attention_backward(
        mesh, dout, *qkv, out, lse, cu_q, cu_k, longest_q, longest_k, 0.0, True, seed, offset
    )
    library._destroy()
    return [out, *grads[:3]]


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("torch has none on a CPU")


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except flash.FlashError as error:
        return type(error).__name__
    return "nothing"


def refusals(groups: Groups) -> Iterator[tuple[str, str]]:
    q = torch.randn(1, 8, 4, 16)
    odd = torch.randn(1, 7, 4, 16)
    yield "rows differ", raised(lambda: cp.attention(q, odd, odd, **groups))
    yield "shard", raised(lambda: cp.shard(odd, **groups))
    packed = q[0, :7]
    yield "packed", raised(lambda: cp.attention_varlen(packed, packed, packed, [0, 8], **groups))
    if "ring" in groups:
        yield "window", raised(lambda: cp.attention(q, q, q, window=(2, 2), **groups))
    if "ulysses" in groups:
        three = torch.randn(1, 8, 3, 16)
        yield "heads", raised(lambda: cp.attention(three, three, three, **groups))


def work(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    if ON_GPUS:
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    kind = "nccl" if ON_GPUS else "gloo"
    dist.init_process_group(kind, init_method=f"file://{store}", rank=rank, world_size=world)
    for name, groups in arrangements(world).items():
        everything = [("", whole_and_parts, x) for x in cases()]
        everything += [("_packed", packed_and_parts, x) for x in packed_cases()]
        for kind, run, (backend, options, dtype, more) in everything:
            if ("window" in options and "ring" in groups) or not served(backend, dtype):
                continue
            errors = torch.tensor([run(groups, backend, options, dtype, more)])
            dist.all_reduce(errors, dist.ReduceOp.MAX)
            label = f"{name}{kind} {backend} {options} {more}".replace(" ", "_")
            if rank == 0:
                print("case", label, dtype, float(errors), flush=True)
        for backend in ("v1", "v2", "v3") if name == "ring" else ():
            if not served(backend, torch.bfloat16):
                continue
            errors = torch.tensor([torchs_context_parallel(backend)])
            dist.all_reduce(errors, dist.ReduceOp.MAX)
            if rank == 0:
                print("torch", backend, dtype_of(backend), float(errors), flush=True)
        for label, kind in refusals(groups):
            if rank == 0:
                print("refusal", f"{name} {label}".replace(" ", "_"), kind, flush=True)
    dist.destroy_process_group()


def main(world: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    work(rank, world, f"{folder}/store")
                    status = 0
                except BaseException:
                    traceback.print_exc()
                os._exit(status)
            children.append(child)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(WORLD))
