"""Counts the memory that torch operations hold, tensor by tensor."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Bytes of all tensors that came out of an operation and still live, each storage once; and the most there were."""

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def ignore(self, tensors):
        """Tensors that were there before."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _see(self, storage):
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self._sizes.pop(key, 0)
