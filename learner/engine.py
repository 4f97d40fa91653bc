"""The learner's engine: DeepSpeed around the shared scoring function, one optimiser step at a time, on one of N ranks.

It holds no ray import: payloads arrive resolved. Invariants: it trains only from logs; ids, masks,
positions and turns are taken as logged; gradient and metrics of a step are independent of the micro-batch cut and of the
number of ranks; every rank makes the same calls in the same order; `version` counts optimiser steps since the weights
that the run started from; a step with a loss or gradient that is not finite is refused on all ranks and changes nothing.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.batching import (
    MicroBatch,
    RankWork,
    SftWeights,
    Shape,
    TargetCounts,
    TrainItem,
    common_shapes,
)
from learner.config import ZERO_BUCKET, LearnerConfig
from learner.forward import PolicyForward, blank_media
from learner.long_streams.activation_checkpointing import checkpoint_activations
from learner.losses import Sums, grpo_loss, sft_loss
from learner.publish import export_weights, full_shape, host_state_dict
from learner.ranks import Ranks
from learner.reference import Reference
from learner.setup import LearnerSetup
from learner.state import load_state, save_state
from learner.zero3_linear import replace_deepspeed_linear
from streams.backbone.backbone import Backbone
from streams.backbone.boundary import Boundary
from streams.backbone.kernel_choice import choose_learner_attention, choose_vision_attention
from streams.log.mismatch import LogpDiff, OffToken, most_telling
from streams.log.record import Kind
from streams.messages import GroupPayload, ScoreReport, TrainReport, WeightsUpdate
from streams.scoring.compiled import compile_count
from streams.scoring.packing import Rows
from streams.support.meter import Meter

log = logging.getLogger("sightline.learner")


@dataclass(frozen=True)
class Share:
    """What one rank tells the others before a step: its work, or why it cannot do it."""

    problem: str | None
    shapes: tuple[Shape, ...]
    temperatures: frozenset[float]
    media_kinds: frozenset[str]
    counts: TargetCounts = field(default_factory=TargetCounts)


@dataclass
class Outcome:
    """What one rank found in a step. worst: (distance, stream) of the most extreme log-prob; infinite if not finite."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    age0: LogpDiff = field(default_factory=LogpDiff)
    off: OffToken | None = None
    worst: tuple[float, str] = (-1.0, "none")


@dataclass(frozen=True)
class Step:
    """The whole step as every rank knows it: its loss, and totals over all ranks."""

    index: int
    loss: str
    settings: dict[str, float]
    shapes: list[Shape]
    temperature: float
    targets: int
    normaliser: float
    weights: SftWeights | None


def deepspeed_config(config: LearnerConfig, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings; micro-batches are cut by tokens, so its own batch sizes mean nothing. trained: numbers."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(ZERO_BUCKET, trained)}
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU Adam is compiled at first use; torch's runs everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 10**9,
    }


class LearnerEngine:
    """Trains one backbone. `import deepspeed` happens here: it is slow, and only learners need it."""

    def __init__(self, setup: LearnerSetup, ranks: Ranks) -> None:
        self.ranks = ranks
        values = dict(setup.learner)
        self.config = LearnerConfig(**(values | {"betas": tuple(values["betas"])}))
        torch.set_num_threads(self.config.threads)
        random.seed(setup.seed)
        np.random.seed(setup.seed % 2**32)
        torch.manual_seed(setup.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = choose_learner_attention(self.config.attention, device)
        # DeepSpeed itself moves a stage-3 model to the device, whole, and cuts it up there.
        first = "cpu" if self.config.zero_stage == 3 else device
        dtype = getattr(torch, self.config.dtype)
        vision = choose_vision_attention(setup.vision_attention, device, self.config.dtype)
        log.info("rank %d: attention %s, vision attention %s", ranks.rank, attention, vision)
        self.meter = Meter()
        with self.meter.phase("load"):
            self.backbone = Backbone.load(
                setup.checkpoint, setup.layout, dtype=dtype, device=first, vision_attention=vision.name
            )
            self.backbone.freeze(self.config.freeze, self.config.freeze_names)
            if self.config.activation_checkpointing:
                checkpoint_activations(self.backbone)
            self.reference: Reference | None = None
            if setup.reference:
                self.reference = Reference(setup.reference, setup.layout, self.config, device, self.backbone)
            self.version = setup.version
            self.off_above = setup.off_above
            self.deepspeed = self._initialize(setup.total_steps)

    def _initialize(self, total_steps: int) -> Any:
        import deepspeed
        from transformers import get_scheduler

        config = self.config
        trainable = list(self.backbone.trainable().values())
        optimiser = torch.optim.AdamW(
            trainable,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            # One kernel over all parameters; the default makes temporary copies as large as they are.
            fused=torch.cuda.is_available() or None,
        )
        scheduler = get_scheduler(
            config.schedule,
            optimiser,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=max(total_steps, 1),
        )
        if self.version:
            # Weights without their optimiser's state stand where they stood in the schedule. (A state brings its own.)
            scheduler.last_epoch = self.version - 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                scheduler.step()
        engine, *_ = deepspeed.initialize(
            model=PolicyForward(self.backbone, config),
            model_parameters=trainable,
            optimizer=optimiser,
            lr_scheduler=scheduler,
            config=deepspeed_config(config, self.trainable_parameters),
        )
        if config.zero_stage == 3:
            replace_deepspeed_linear()
        return engine

    @property
    def trainable_parameters(self) -> int:
        return sum(int(np.prod(full_shape(p), dtype=np.int64)) for p in self.backbone.trainable().values())

    def close(self) -> None:
        """Release the model, so that the next stage's fits beside nothing."""
        self.deepspeed.destroy()
        self.reference = None
        del self.deepspeed, self.backbone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- one optimiser step ---------------------------------------------------------------------------------------

    def train(self, step: int, loss: str, items: list[TrainItem], settings: dict[str, float]) -> TrainReport:
        """One optimiser step over the logs of all ranks' items. loss: "grpo" or "sft"."""
        began = time.monotonic()
        work = self._work(items, "target")
        plan = self._plan(step, loss, work, settings)
        mine = Outcome()
        on_policy: list[np.ndarray] = []
        self.deepspeed.train()
        for i, shape in enumerate(plan.shapes):
            batch = work.micro_batch(i, shape)
            self.deepspeed.set_gradient_accumulation_boundary(i == len(plan.shapes) - 1)
            with self.meter.phase("forward"):
                logp, entropy, features = self.deepspeed(batch, shape, plan.temperature)
                value, sums, off = self._loss(plan, work, batch, logp, features)
            if loss == "grpo":
                fresh = self._fresh(work, batch.rows)
                on_policy.append(off[fresh])
                mine.off = most_telling([mine.off, work.off_token(batch.rows, off, self.off_above, fresh)])
            mine.worst = max(mine.worst, _worst(off, batch.rows, work))
            mine.sums["loss"] += float(value.detach())
            # DeepSpeed averages over the ranks, and the normaliser is already that of all of them.
            value = value * self.ranks.world
            # A gradient that is not finite makes DeepSpeed drop the step on all ranks; a bad loss must have one.
            with self.meter.phase("backward"):
                self.deepspeed.backward(value if math.isfinite(float(value.detach())) else value * math.nan)
            sums["entropy"] = entropy.sum()
            for name, total in sums.items():
                mine.sums[name] += float(total) / plan.targets
        mine.age0 = LogpDiff.of(np.concatenate(on_policy) if on_policy else np.zeros(0))
        outcomes = self.ranks.gather(mine, f"to finish the gradients of step {step}")
        with self.meter.phase("optimiser step"):
            grad_norm = self._apply(step, outcomes)
        self.version += 1
        age0 = LogpDiff.merge([outcome.age0 for outcome in outcomes])
        metrics = self._metrics(plan, outcomes, age0, grad_norm, began)
        return TrainReport(step, self.version, metrics, age0, most_telling([outcome.off for outcome in outcomes]))

    def _work(self, items: list[TrainItem], which: str) -> RankWork:
        return RankWork(
            items,
            which,
            blank_media(self.backbone),
            row_tokens=self.config.row_tokens,
            max_tokens=self.config.micro_batch_tokens,
            head_chunk=self.config.head_chunk,
        )

    def _plan(self, step: int, loss: str, work: RankWork, settings: dict[str, float]) -> Step:
        """Agree with the other ranks on the step. Raises ValueError on all of them if any has a problem."""
        tokens = self.backbone.layout.tokens
        counts = TargetCounts.of(work.logs, tokens)
        problem = self._problem(loss, work, settings)
        mine = Share(problem, work.shapes, frozenset(work.temperatures), frozenset(work.media_kinds), counts)
        shares = self.ranks.gather(mine, f"to begin step {step}")
        self._refuse(shares, f"step {step}")
        total = sum((share.counts for share in shares), TargetCounts())
        if not total.targets:
            raise ValueError(f"step {step}: no token of its logs is a target, there is nothing to learn")
        weights = SftWeights.balanced(total, tokens, settings) if loss == "sft" else None
        return Step(
            index=step,
            loss=loss,
            settings=settings,
            shapes=common_shapes([share.shapes for share in shares]),
            temperature=next(t for share in shares for t in share.temperatures),
            targets=total.targets,
            normaliser=weights.total(total) if weights else float(total.targets),
            weights=weights,
        )

    def _problem(self, loss: str, work: RankWork, settings: dict[str, float]) -> str | None:
        """Why this rank's share cannot be trained on, or None."""
        if loss == "sft":
            return None
        if settings.get("kl_coef", 0.0) and self.reference is None:
            return f"algorithm.kl_coef={settings['kl_coef']} but the learner was set up without a reference checkpoint"
        if settings.get("kl_coef", 0.0) and self.config.boundary is Boundary.TOWER and "frames" in work.media_kinds:
            return (
                "learner.freeze=tower: the reference holds no tower, it cannot be shown frames (ship pre-merger rows)"
            )
        for log in work.logs:
            if not log.header.trainable:
                return f"stream {log.header.stream_id} was decoded greedily: it can be scored but not trained on"
        if len(work.advantages) != len(work.logs):
            return f"{len(work.logs)} streams but {len(work.advantages)} advantages"
        return None

    @staticmethod
    def _refuse(shares: list[Share], what: str) -> None:
        """Raises the first problem, on every rank alike."""
        for rank, share in enumerate(shares):
            if share.problem is not None:
                raise ValueError(share.problem if len(shares) == 1 else f"learner rank {rank}: {share.problem}")
        temperatures = {t for share in shares for t in share.temperatures}
        if len(temperatures) > 1:
            raise ValueError(f"{what}: logs of several score temperatures in one batch: {sorted(temperatures)}")
        kinds = {kind for share in shares for kind in share.media_kinds}
        if len(shares) > 1 and len(kinds) > 1:
            raise ValueError(
                f"{what}: media of several kinds ({', '.join(sorted(kinds))}): ranks must call the tower alike"
            )

    def _loss(
        self, plan: Step, work: RankWork, batch: MicroBatch, logp: torch.Tensor, features: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sums, np.ndarray]:
        """(loss, sums, off): off [N] is logp - behaviour in RL and logp in SFT; infinite if not finite."""
        rows, scored = batch.rows, logp.detach().double().cpu().numpy()
        if plan.weights is not None:
            weight = plan.weights.of(rows.target_ids.numpy(), work.at_targets(rows, "kind"))
            value, sums = sft_loss(logp, torch.from_numpy(weight).to(logp), normaliser=plan.normaliser)
            return value, sums, _or_infinite(scored)
        behaviour = work.at_targets(rows, "behaviour_logp")
        advantage = work.advantages[rows.stream.numpy()]
        kl_coef = plan.settings.get("kl_coef", 0.0)
        reference = None
        if kl_coef and self.reference is not None:
            reference = self.reference.logp(batch, features, plan.temperature) if rows.num_targets else logp.detach()
        value, sums = grpo_loss(
            logp,
            torch.from_numpy(behaviour).to(logp),
            torch.from_numpy(advantage).to(logp),
            normaliser=plan.normaliser,
            clip_low=plan.settings["clip_low"],
            clip_high=plan.settings["clip_high"],
            reference=reference,
            kl_coef=kl_coef,
        )
        return value, sums, _or_infinite(np.where(np.isfinite(advantage), scored - behaviour, np.inf))

    def _fresh(self, work: RankWork, rows: Rows) -> np.ndarray:
        """Which targets are of streams sampled wholly at the learner's own version: there the distance must vanish."""
        fresh = np.array([log.single_version == self.version for log in work.logs], dtype=bool)
        return fresh[rows.stream.numpy()]

    def _apply(self, step: int, outcomes: list[Outcome]) -> float:
        """Let the optimiser step; returns the gradient norm. Raises RuntimeError if it was refused."""
        optimiser = self.deepspeed.optimizer
        if self.config.zero_stage == 0:
            # Stage 0 is torch's plain optimiser, which would apply anything.
            gradients = [p.grad for p in self.backbone.trainable().values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            applied = math.isfinite(norm)
            if applied:
                self.deepspeed.step()
            else:
                self.deepspeed.zero_grad()
        else:
            self.deepspeed.step()
            applied = not optimiser.overflow
            norm = float(self.deepspeed.get_global_grad_norm())
        if not applied:
            loss = sum(outcome.sums["loss"] for outcome in outcomes)
            distance, stream = max(outcome.worst for outcome in outcomes)
            raise RuntimeError(
                f"step {step} was refused, the weights are those of version {self.version}: loss {loss:g} or gradient "
                f"norm {norm:g} is not finite; the most extreme log-prob ({distance:g} nats off) is in stream {stream}. "
                "Lower learner.lr or look at that stream"
            )
        return norm

    def _metrics(
        self, plan: Step, outcomes: list[Outcome], age0: LogpDiff, grad_norm: float, began: float
    ) -> dict[str, float]:
        """Sums over ranks, and the largest where a largest is meant; the same whatever the number of ranks."""
        totals = {name: sum(o.sums[name] for o in outcomes) for name in sorted(outcomes[0].sums)}
        totals["age0_tokens"] = float(age0.tokens)
        measured = {"age0_logp_diff_mean": age0.mean, "age0_logp_diff_max": age0.max, "age0_logp_diff_k3": age0.k3}
        totals |= {name: value for name, value in measured.items() if value is not None}
        if "ratio_square" in totals:
            square = totals.pop("ratio_square")
            totals["effective_sample_share"] = totals["ratio"] ** 2 / square if square else 0.0
        totals["grad_norm"] = grad_norm
        totals["lr"] = float(self.deepspeed.get_lr()[0])
        totals["target_tokens"] = float(plan.targets)
        totals["micro_batches"] = float(len(plan.shapes))
        totals["compiles"] = float(compile_count())
        totals["step_s"] = time.monotonic() - began
        return totals

    # --- scoring --------------------------------------------------------------------------------------------------

    def score(self, payloads: list[GroupPayload]) -> ScoreReport:
        """Re-score every sampled token of all ranks' payloads under the current weights."""
        work = self._work([TrainItem(payload) for payload in payloads], "sampled")
        mine = Share(None, work.shapes, frozenset(work.temperatures), frozenset(work.media_kinds))
        shares = self.ranks.gather(mine, "to begin scoring")
        self._refuse(shares, "scoring")
        shapes = common_shapes([share.shapes for share in shares])
        temperature = next((t for share in shares for t in share.temperatures), 1.0)
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        named: OffToken | None = None
        self.deepspeed.eval()
        with torch.no_grad():
            for i, shape in enumerate(shapes):
                batch = work.micro_batch(i, shape)
                with self.meter.phase("score"):
                    logp, *_ = self.deepspeed(batch, shape, temperature)
                behaviour = work.at_targets(batch.rows, "behaviour_logp")
                off = logp.double().cpu().numpy() - behaviour
                kinds = work.at_targets(batch.rows, "kind")
                named = most_telling([named, work.off_token(batch.rows, off, self.off_above)])
                for kind in np.unique(kinds):
                    found[Kind(int(kind)).name.lower()].append(off[kinds == kind])
        here = {kind: LogpDiff.of(np.concatenate(parts)) for kind, parts in found.items()}
        gathered = self.ranks.gather((here, named), "to finish scoring")
        everywhere = [part for part, _ in gathered]
        by_kind = {
            kind: LogpDiff.merge([part[kind] for part in everywhere if kind in part])
            for kind in sorted({kind for part in everywhere for kind in part})
        }
        off_token = most_telling([token for _, token in gathered])
        return ScoreReport(self.version, LogpDiff.merge(list(by_kind.values())), by_kind, off_token)

    # --- weights and state ----------------------------------------------------------------------------------------

    def export_weights(self) -> WeightsUpdate | None:
        """Every trainable tensor, flat, for publication; rank 0 only (the others take part in gathering)."""
        with self.meter.phase("publish"):
            return export_weights(self.backbone.trainable(), self.version, self.ranks)

    def save(self, path: Path, streaming: dict[str, Any], *, resumable: bool = True) -> None:
        """Write `path`/hf (an exported checkpoint) and, if resumable, `path`/deepspeed (all that the next step depends on)."""
        with self.meter.phase("save"):
            whole = host_state_dict(self.backbone.model, self.ranks)
            if whole is not None:
                self.backbone.save(path / "hf", streaming, whole)
            if resumable:
                save_state(path, self.deepspeed, self.ranks, self.config, self.version)
            else:
                self.ranks.gather(None, "to finish the export")

    def load(self, path: Path) -> int:
        """Load what `save` wrote, and go on from there as if nothing had stopped; returns the version."""
        self.version = load_state(path, self.deepspeed, self.ranks, self.config)
        return self.version


def _or_infinite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)


def _worst(off: np.ndarray, rows: Rows, work: RankWork) -> tuple[float, str]:
    if not len(off):
        return -1.0, "none"
    distance = np.abs(off)
    at = int(distance.argmax())
    return float(distance[at]), work.logs[int(rows.stream[at])].header.stream_id
