"""Measures the memory of PyTorch code on any device: a dispatch mode that watches storages live."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now` and `peak` count the bytes of storages made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.tensors: Counter[int] = Counter()  # storage -> tensors that hold it
        self.nbytes: dict[int, int] = {}
        self.given: set[int] = set()  # storages that existed before

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:  # fmt: skip
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.nbytes:
                self.given.add(x.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.watch(x)
        return result

    def watch(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.given:
            return
        if key not in self.nbytes:
            self.nbytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self.tensors[key] += 1
        weakref.finalize(x, self.forget, key)

    def forget(self, key: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            self.now -= self.nbytes.pop(key)
            del self.tensors[key]
