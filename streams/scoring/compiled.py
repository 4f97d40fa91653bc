"""FlexAttention, compiled once for every shape that training meets.

Invariants:
* where the compiler can run, nothing falls back to uncompiled code in silence (with `fullgraph`, hitting Dynamo's limit
  of recompilations raises);
* lengths are dynamic, so that the number of compilations depends on dtype, heads and gradients, not on data.

`compile_count` counts the compilations of this process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_counted = {"graphs": 0}


def compile_count() -> int:
    """Return the number of graphs that this module's functions have compiled in this process."""
    return _counted["graphs"]


def can_compile(device: torch.device, dtype: torch.dtype, *, lse: bool = False) -> bool:
    """Return whether FlexAttention compiles for such tensors, gradients as they are now. lse: also with log-sum-exp.

    On CPU it is a forward without gradients and without log-sum-exp, and needs a C++ compiler and AVX2.
    """
    if dtype not in COMPILED_DTYPES:
        return False
    if device.type != "cpu":
        return device.type == "cuda"
    if lse or torch.is_grad_enabled():
        return False
    return shutil.which(os.environ.get("CXX", "g++")) is not None and _has_avx2()


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _counting_inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Count, then call Inductor. Dynamo's own counters include what other code compiles, and change with releases."""
    _counted["graphs"] += 1
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all lengths at once."""
    return torch.compile(function, backend=_counting_inductor, dynamic=True, fullgraph=True)
