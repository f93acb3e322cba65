"""Attention of one sequence that is spread over the processes of torch.distributed."""

from flash.context_parallel.call import attention, attention_varlen
from flash.context_parallel.shards import shard, unshard

__all__ = ["attention", "attention_varlen", "shard", "unshard"]
