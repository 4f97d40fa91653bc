"""Sets DeepSpeed up around a backbone, and applies its optimiser steps.

Invariants:
- Micro-batches are cut by tokens, so DeepSpeed's own batch sizes mean nothing.
- deepspeed is imported inside functions: the import is slow, and only learners need it.
- A step whose gradient is not finite is never applied, at any ZeRO stage.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from learner.config import ZERO_BUCKET, LearnerConfig
from learner.forward import PolicyForward
from learner.parallel.zero3_linear import replace_deepspeed_linear
from learner.publish import full_numel
from streams.backbone.backbone import Backbone


def deepspeed_config(config: LearnerConfig, trained: int) -> dict[str, Any]:
    """Return DeepSpeed's settings. trained: number of trainable parameters."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(ZERO_BUCKET, trained)}
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU Adam needs a compiler at first use; torch's runs everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 10**9,
    }


def wrap(backbone: Backbone, config: LearnerConfig, *, version: int, total_steps: int) -> Any:
    """Return a DeepSpeed engine with the backbone's forward, an optimiser and a learning-rate schedule.

    version: optimiser steps that the weights have behind them, from which the schedule of `total_steps` continues.
    """
    import deepspeed
    from transformers import get_scheduler

    from learner.parallel.snapshot import SnapshotEngine

    trainable = backbone.trainable()
    optimiser = torch.optim.AdamW(
        list(trainable.values()),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        # One kernel over all parameters; the default makes temporary copies as large as the parameters.
        fused=torch.cuda.is_available() or None,
    )
    scheduler = get_scheduler(
        config.schedule,
        optimiser,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=max(total_steps, 1),
    )
    if version:
        # Weights that come without optimiser state keep their place in the schedule. (A loaded state brings its own.)
        scheduler.last_epoch = version - 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            scheduler.step()
    engine, *_ = deepspeed.initialize(
        model=PolicyForward(backbone, config),
        model_parameters=list(trainable.values()),
        optimizer=optimiser,
        lr_scheduler=scheduler,
        config=deepspeed_config(config, full_numel(trainable)),
    )
    engine.checkpoint_engine = SnapshotEngine(engine._config)
    if config.zero_stage == 3:
        replace_deepspeed_linear()
    return engine


def apply_gradients(deepspeed: Any, backbone: Backbone, zero_stage: int) -> tuple[float, bool]:
    """Run the optimiser's step; return (gradient norm, whether the weights changed)."""
    if zero_stage:
        deepspeed.step()
        return float(deepspeed.get_global_grad_norm()), not deepspeed.optimizer.overflow
    # Stage 0 is torch's plain optimiser, which would apply NaN, too.
    gradients = [p.grad for p in backbone.trainable().values() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        deepspeed.step()
        return norm, True
    deepspeed.zero_grad()
    return norm, False
