"""Which kernels the workers and the learner would use, asked on the node that each of them is on: packages may differ.

Invariants:
* no model is loaded: a kernel depends on the device, the dtype, and what is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.cluster.session import Session
from streams.backbone.kernel_choice import (
    choose_cuda_graphs,
    choose_decode_attention,
    choose_fused_kernels,
    choose_learner_attention,
    choose_rollout_attention,
    choose_vision_attention,
)

Ask = Callable[[str], str]
"""From the type of a device, `cuda` or `cpu`, to the kernels in words."""


def kernel_lines(session: Session, config: RunConfig, learner: LearnerConfig | None, head_dim: int) -> list[str]:
    """Return a line for each choice of kernels, with the actors that make it. Raises ValueError for one that cannot run."""
    ranks, workers = session.devices()
    asked: list[tuple[str, str, Ask]] = [
        (f"rollout worker {i}", _type(device.cuda), partial(worker_kernels, config, head_dim))
        for i, device in zip(sorted(session.crew.places.here), workers, strict=True)
    ]
    if learner is not None:
        asked += [
            (name, _type(device.cuda), partial(learner_kernels, config, learner))
            for name, device in zip(_names(len(ranks)), ranks, strict=True)
        ]
    homes = {actor: store.id for store in session.stores for actor in store.actors}
    replies = [(actor, _on(homes[actor], ask, device)) for actor, device, ask in asked]
    lines: dict[str, list[str]] = {}
    for actor, reply in replies:
        lines.setdefault(session.call(reply, f"the kernels of {actor}"), []).append(actor)
    return [f"{', '.join(actors)}: {kernels}" for kernels, actors in lines.items()]


def worker_kernels(config: RunConfig, head_dim: int, device: str) -> str:
    """Return what a rollout worker would use. Raises ValueError, as for every forced kernel that cannot run."""
    dtype = config.model.dtype
    prefill = choose_rollout_attention(config.rollout.attention, device, dtype, head_dim)
    decode = choose_decode_attention(config.rollout.attention, device, prefill.name)
    graphs = choose_cuda_graphs(config.rollout.cuda_graphs, device, decode.name)
    return f"attention {prefill}, decode steps {decode}, CUDA graphs {graphs}, {_both(config, device, dtype)}"


def learner_kernels(config: RunConfig, learner: LearnerConfig, device: str) -> str:
    """Return what a learner rank would use. Raises ValueError likewise."""
    attention = choose_learner_attention(learner.attention, device)
    return f"attention {attention}, {_both(config, device, learner.dtype)}"


def _both(config: RunConfig, device: str, dtype: str) -> str:
    vision = choose_vision_attention(config.model.vision_attention, device, dtype)
    return f"vision attention {vision}, fused kernels {choose_fused_kernels(config.model.fused_kernels, device, dtype)}"


def _on(node: str, ask: Ask, device: str) -> Any:
    remote: Any = ray.remote(_asked)
    pinned = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return remote.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(ask, device)


def _asked(ask: Ask, device: str) -> str:
    return ask(device)


def _type(cuda: bool) -> str:
    return "cuda" if cuda else "cpu"


def _names(ranks: int) -> list[str]:
    return ["learner"] if ranks == 1 else [f"learner rank {rank}" for rank in range(ranks)]
