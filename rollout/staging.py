"""Weights on the worker's side: staged in the background, copied into place between two visits of the engine.

Threads: `stage` runs on the thread that fetched the update, `apply` on the engine thread.

Invariants:
* the running weights change only in `StagedWeights.apply`, called between two visits;
* a version older than the running one is never applied (the service sees to it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streams.backbone.backbone import Backbone
from streams.backbone.boundary import Boundary
from streams.messages import WeightsUpdate


@dataclass(frozen=True)
class StagedWeights:
    """A fetched version, unpacked into tensors of the backbone's dtype, not yet running; on its device, or in host memory."""

    version: int
    tensors: dict[str, torch.Tensor]

    @classmethod
    def stage(cls, update: WeightsUpdate, backbone: Backbone, where: str = "device") -> StagedWeights:
        """Unpack an update. Raises ValueError if it does not fit the backbone.

        Args:
            where: `device` puts it beside the running weights (a short pause at the swap); `host` needs no memory there and
                copies over at the swap.
        """
        dtype = getattr(torch, update.dtype)
        wanted = sum(int(np.prod(shape)) for shape in update.shapes) * dtype.itemsize
        if len(update.buffer) != wanted:
            raise ValueError(
                f"weights of version {update.version}: {len(update.buffer)} bytes for shapes that take {wanted}"
            )
        # The object store hands out read-only memory: one copy here is the staging buffer.
        flat = torch.from_numpy(np.array(update.buffer)).view(dtype)
        if where == "host" and backbone.device.type == "cuda":
            flat = flat.pin_memory()
        parameters = dict(backbone.model.named_parameters())
        tensors, at = {}, 0
        for name, shape in zip(update.names, update.shapes, strict=True):
            if name not in parameters or tuple(parameters[name].shape) != shape:
                raise ValueError(f"weights of version {update.version}: {name} {shape} does not fit this backbone")
            size = int(np.prod(shape))
            parameter = parameters[name]
            device = parameter.device if where == "device" else flat.device
            tensors[name] = flat[at : at + size].view(shape).to(device, parameter.dtype)
            at += size
        return cls(update.version, tensors)

    def outdates(self, boundary: Boundary) -> bool:
        """Return whether what is kept at the boundary was encoded by weights that this version replaces."""
        # With nothing frozen, workers still keep what the whole vision side made of a clip.
        kept_at = boundary if boundary is not Boundary.NONE else Boundary.TOWER_MERGER
        return any(kept_at.below(name) for name in self.tensors)

    @torch.no_grad()
    def apply(self, backbone: Backbone) -> None:
        """Copy the tensors into the backbone's parameters. Raises RuntimeError if the device refuses a copy."""
        parameters = dict(backbone.model.named_parameters())
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor)
