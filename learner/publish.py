"""Gathers whole parameters from a partitioned model, for publication and for export.

Invariants:
- Gathering is collective under ZeRO-3: every rank runs these functions between two optimiser steps, in the order of
  `named_parameters`.
- A rank holds at most `GATHER_BYTES` of gathered parameters beyond its partition, or the largest single one if that is
  more (the embedding).
- Only rank 0 copies parameters out, into host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from learner.config import GATHER_BYTES
from learner.parallel.ranks import Ranks
from learner.saving import HostCopies
from streams.messages import WeightsUpdate


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether this rank holds only a slice of the parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameters: dict[str, nn.Parameter]) -> int:
    """Return the number of elements of all parameters together, counting partitioned ones whole."""
    return sum(int(np.prod(full_shape(p), dtype=np.int64)) for p in parameters.values())


def full_bytes(parameter: nn.Parameter) -> int:
    return int(np.prod(full_shape(parameter), dtype=np.int64)) * parameter.element_size()


def chunks(parameters: dict[str, nn.Parameter], limit: int) -> Iterator[dict[str, nn.Parameter]]:
    """Yield consecutive parameters in chunks of at most `limit` bytes; a larger parameter is a chunk of its own."""
    chunk: dict[str, nn.Parameter] = {}
    used = 0
    for name, parameter in parameters.items():
        size = full_bytes(parameter)
        if chunk and used + size > limit:
            yield chunk
            chunk, used = {}, 0
        chunk[name] = parameter
        used += size
    if chunk:
        yield chunk


def visit_whole(
    parameters: dict[str, nn.Parameter],
    visit: Callable[[str, torch.Tensor], None] | None,
    limit: int = GATHER_BYTES,
) -> None:
    """Call `visit(name, tensor)` on every parameter while it is whole. Ranks other than 0 pass None, but take part."""
    if any(is_partitioned(parameter) for parameter in parameters.values()):
        from deepspeed.runtime.zero import GatheredParameters

        for chunk in chunks(parameters, limit):
            # modifier_rank=None: nothing is changed inside, so nothing is broadcast back.
            with GatheredParameters(list(chunk.values()), modifier_rank=None):
                _visit(chunk, visit)
    else:
        _visit(parameters, visit)


def _visit(parameters: dict[str, nn.Parameter], visit: Callable[[str, torch.Tensor], None] | None) -> None:
    if visit is not None:
        for name, parameter in parameters.items():
            visit(name, parameter.detach())


def export_weights(parameters: dict[str, nn.Parameter], version: int, ranks: Ranks) -> WeightsUpdate | None:
    """Return every given parameter in one flat buffer of host memory, on rank 0; other ranks take part and return None.

    Raises ValueError if the parameters have several dtypes.
    """
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"trainable parameters of several dtypes cannot be published together: {sorted(map(str, dtypes))}"
        )
    if not ranks.leads:
        visit_whole(parameters, None)
        return None
    buffer = np.empty(sum(full_bytes(parameter) for parameter in parameters.values()), np.uint8)
    dtype = next(iter(dtypes), torch.float32)
    flat = torch.from_numpy(buffer).view(dtype)
    at = 0

    def copy(name: str, whole: torch.Tensor) -> None:
        nonlocal at
        flat[at : at + whole.numel()].copy_(whole.reshape(-1))
        at += whole.numel()

    visit_whole(parameters, copy)
    return WeightsUpdate(
        version=version,
        names=tuple(parameters),
        shapes=tuple(full_shape(parameter) for parameter in parameters.values()),
        dtype=str(dtype).removeprefix("torch."),
        buffer=buffer,
    )


def host_state_dict(model: nn.Module, ranks: Ranks, host: HostCopies) -> dict[str, torch.Tensor] | None:
    """Return a copy of the model's state dict in host memory, on rank 0; None on other ranks. Tied entries share one tensor."""
    parameters = dict(model.named_parameters())
    copies: dict[str, torch.Tensor] = {}

    def copy(name: str, whole: torch.Tensor) -> None:
        # What was gathered for the visit is nobody else's, and gone after it.
        copies[name] = whole.to("cpu", copy=True) if is_partitioned(parameters[name]) else host.of(whole)

    visit_whole(parameters, copy if ranks.leads else None)
    if not ranks.leads:
        return None
    # `named_parameters` lists a tied parameter once, `state_dict` under each of its names: all must be there, and the
    # export decides which of them it writes.
    by_parameter = {id(p): copies[name] for name, p in parameters.items()}
    return {
        name: by_parameter[id(value)] if id(value) in by_parameter else host.of(value.detach())
        for name, value in model.state_dict(keep_vars=True).items()
    }
