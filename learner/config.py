"""Typed settings of the learner (Hydra key `learner`, with `sft.learner` overriding single values for the cold start)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from streams.backbone.boundary import Boundary
from streams.backbone.kernel_choice import HEAD_VOCAB, LEARNER_ATTENTION

OFFLOAD = ("none", "cpu")
ZERO_STAGES = (0, 1, 2, 3)
GATHER_BYTES = 256 * 2**20
"""Bytes of gathered parameters that publication and export hold at once on a rank, beyond its partition."""
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")
ZERO_BUCKET = 500_000_000
"""Most parameters in DeepSpeed's gradient bucket (its own default). It is allocated whole, however few there are."""


@dataclass(frozen=True)
class LearnerConfig:
    """The learner ranks: optimiser, what is frozen, how streams are batched. `sft.learner` replaces single values
    in the cold start.
    """

    ranks: int = 1
    """Data-parallel learner actors, one GPU each where the cluster has them."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments, each in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    schedule: str = "constant"
    """Learning rate over the steps of the stage, by a transformers scheduler: `constant`, `constant_with_warmup`,
    `cosine` or `linear`.
    """
    warmup_steps: int = 0
    """Steps in which the learning rate rises to `learner.lr`, unless `sft.warmup_ratio` or
    `algorithm.warmup_ratio` is set. No effect with `learner.schedule=constant`.
    """
    zero_stage: int = 1
    """What DeepSpeed partitions over the ranks: `0` nothing (float32 only), `1` optimiser states and master
    weights, `2` also gradients, `3` also parameters.
    """
    offload: str = "none"
    """`cpu` keeps the optimiser's states in host memory (`learner.zero_stage` 1 to 3), `none` on the device."""
    collective_timeout_s: float = 600.0
    """Seconds that a rank waits for the others in a collective before it gives up and ends the run."""
    dtype: str = "float32"
    """Computation dtype of the learner's model: `float32` or `bfloat16`."""
    freeze: str = "none"
    """Vision side that is frozen, and so what rollouts ship: `none` (frames), `tower` (the tower's output before
    the mergers) or `tower+merger` (features).
    """
    freeze_names: tuple[str, ...] = ()
    """Shell-style patterns over whole parameter names; what matches is frozen besides `learner.freeze`. A pattern
    without a match is an error.
    """
    attention: str = "auto"
    """Attention kernel: `flex` (FlexAttention, CUDA only), `sdpa` (the same mask, dense), or `auto` = flex on
    CUDA, else sdpa.
    """
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, one forward more."""
    row_tokens: int = 1024
    """Tokens that streams are packed into rows of; a longer stream has a row of its own."""
    micro_batch_tokens: int = 16384
    """Tokens of one forward, padding included; at least one row. 0 = the most of 16384, 8192, 4096 and 2048 that the
    device holds: then losses of different GPUs differ in rounding.
    """
    head_chunk: int = 4096
    """Target positions whose logits exist at once, `learner.head_vocab` of each."""
    head_vocab: int = HEAD_VOCAB
    """Ids of the vocabulary whose logits exist at once."""
    threads: int = 1
    """Torch CPU threads of a rank."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"learner.ranks={self.ranks} must be at least 1")
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(f"learner.zero_stage={self.zero_stage} is not one of 0, 1, 2, 3")
        if self.offload not in OFFLOAD:
            raise ValueError(f"learner.offload={self.offload!r} is not one of {', '.join(OFFLOAD)}")
        if self.zero_stage == 0 and (self.offload != "none" or self.dtype != "float32"):
            raise ValueError(
                f"learner.zero_stage=0 with learner.offload={self.offload} and learner.dtype={self.dtype}: stage 0 neither "
                "offloads nor keeps float32 master weights; use stage 1, 2 or 3"
            )
        if not 0 < self.collective_timeout_s < math.inf:
            raise ValueError(f"learner.collective_timeout_s={self.collective_timeout_s} must be a positive number")
        Boundary.of(self.freeze)
        # Lists come from YAML, and from `sft.learner`.
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "freeze_names", tuple(self.freeze_names))
        if not all(isinstance(pattern, str) and pattern for pattern in self.freeze_names):
            raise ValueError(f"learner.freeze_names={list(self.freeze_names)} must be patterns over parameter names")
        if self.attention not in LEARNER_ATTENTION:
            raise ValueError(f"learner.attention={self.attention!r} is not one of {', '.join(LEARNER_ATTENTION)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"learner.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"learner.dtype={self.dtype!r} is not one of float32, bfloat16")
        if not (0 < self.lr < math.inf and 0 < self.grad_clip < math.inf):
            raise ValueError(f"learner.lr={self.lr} and learner.grad_clip={self.grad_clip} must be positive numbers")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"learner.weight_decay={self.weight_decay} must be 0 or a positive number")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"learner.betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.micro_batch_tokens < 0:
            raise ValueError(
                f"learner.micro_batch_tokens={self.micro_batch_tokens} must be a number of tokens, 0 for what the device holds"
            )
        for key in ("row_tokens", "head_chunk", "head_vocab", "threads"):
            if getattr(self, key) < 1:
                raise ValueError(f"learner.{key}={getattr(self, key)} must be at least 1")
        if self.warmup_steps < 0:
            raise ValueError(f"learner.warmup_steps={self.warmup_steps} must not be negative")

    def with_overrides(self, overrides: dict[str, Any]) -> LearnerConfig:
        """Return a copy with some values replaced, as `sft.learner` does. Raises ValueError for wrong names or types."""
        unknown = sorted(set(overrides) - set(vars(self)))
        if unknown:
            raise ValueError(f"sft.learner.{unknown[0]} is not a learner setting (known: {', '.join(vars(self))})")
        for key, value in overrides.items():
            # `sft.learner` is a free dictionary that Hydra's schema does not type: an int may stand for a float, but a
            # bool is no number (although Python calls it an int).
            kind = type(getattr(self, key))
            fits = isinstance(value, list | tuple if kind is tuple else int | float if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"sft.learner.{key}={value!r} must be a {kind.__name__}, as learner.{key} is")
        return LearnerConfig(**(vars(self) | overrides))

    @property
    def boundary(self) -> Boundary:
        """The freeze boundary that `freeze` names."""
        return Boundary(self.freeze)
