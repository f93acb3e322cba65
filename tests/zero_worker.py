"""DeepSpeed's ZeRO-3 around context parallel attention: prints the losses of some steps.

torchrun --nproc-per-node N tests/zero_worker.py: the model and text of examples/long_context.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from long_context import Model, text_twice

from flash import context_parallel as cp

SEQLEN, STEPS, VOCABULARY = 64, 3, 64
CONFIG = {
    "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 1.0,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    world, spread = dist.get_world_size(), {"ring": dist.group.WORLD}
    model = Model(2, VOCABULARY, {**spread, "backend": "auto"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    places = cp.shard(torch.arange(SEQLEN), dim=0, **spread)
    for step in range(1, STEPS + 1):
        whole = text_twice(SEQLEN, VOCABULARY, step)
        tokens, labels = (cp.shard(x, **spread) for x in whole)
        asked = int((whole[1] != -100).sum())
        logits = engine(tokens, places)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        engine.backward(total * world / asked)  # ZeRO takes the mean over processes
        engine.step()
        loss = total.detach() / asked
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {step}/{STEPS}  loss {loss:.5f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
