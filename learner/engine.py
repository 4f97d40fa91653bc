"""The learner's engine: DeepSpeed around the shared scoring function, one optimiser step at a time, on one of N ranks.

Invariants:
- It imports no ray: payloads arrive resolved.
- It trains only from logs: ids, masks, positions and turns are taken as logged.
- Gradient and metrics of a step do not depend on how it is cut into micro-batches, nor on the number of ranks.
- Every rank makes the same calls in the same order.
- `version` counts optimiser steps since the weights that the run started from.
- A step whose loss or gradient is not finite is refused on all ranks and changes nothing.
- It knows no loss by name: what differs between losses is behind `learner.losses.base.Loss`.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import time
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.batching import MicroBatch, RankWork, TrainItem
from learner.forward import blank_media
from learner.long_streams.activation_checkpointing import checkpoint_activations
from learner.losses.base import LossValue, TargetCounts
from learner.losses.config import LossConfig
from learner.losses.table import loss_of
from learner.parallel.deepspeed import apply_gradients, wrap
from learner.parallel.ranks import Ranks
from learner.publish import export_weights, full_numel, host_state_dict
from learner.reference import Reference
from learner.saving import BackgroundWriter
from learner.setup import LearnerSetup
from learner.state import copy_state, load_state
from learner.step import Outcome, Outcomes, Share, Step, agree
from streams.backbone.backbone import Backbone
from streams.backbone.fused.modules import settle_fused_kernels
from streams.backbone.kernel_choice import choose_learner_attention, choose_vision_attention
from streams.log.mismatch import LogpDiff, OffToken, most_telling
from streams.log.record import Kind
from streams.messages import GroupPayload, ScoreReport, TrainReport, WeightsUpdate
from streams.scoring.compiled import compile_count
from streams.support.meter import Meter

log = logging.getLogger("sightline.learner")


class LearnerEngine:
    """Trains one backbone."""

    def __init__(self, setup: LearnerSetup, ranks: Ranks) -> None:
        """Load model, reference and optimiser; a collective call. Raises ValueError for a setup that does not fit."""
        self.ranks, self.config = ranks, setup.learner
        torch.set_num_threads(self.config.threads)
        random.seed(setup.seed)
        np.random.seed(setup.seed % 2**32)
        torch.manual_seed(setup.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = choose_learner_attention(self.config.attention, device)
        # DeepSpeed moves a stage-3 model to the device itself, and partitions it there.
        first = "cpu" if self.config.zero_stage == 3 else device
        dtype = getattr(torch, self.config.dtype)
        vision = choose_vision_attention(setup.vision_attention, device, self.config.dtype)
        fused = settle_fused_kernels(setup.fused_kernels, device, self.config.dtype)
        kernels = (attention, vision, fused)
        log.info("rank %d: attention %s, vision attention %s, fused kernels %s", ranks.rank, *kernels)
        self.meter = Meter()
        self._writer = BackgroundWriter()
        with self.meter.phase("load"):
            self.backbone = Backbone.load(
                setup.checkpoint,
                setup.layout,
                dtype=dtype,
                device=first,
                vision_attention=vision.name,
                fused_kernels=fused.name,
            )
            self.backbone.freeze(self.config.freeze, self.config.freeze_names)
            if self.config.activation_checkpointing:
                checkpoint_activations(self.backbone)
            self.reference: Reference | None = None
            if setup.reference:
                self.reference = Reference(setup.reference, setup.layout, self.config, device, self.backbone)
            self.version = setup.version
            self.outlier_above = setup.outlier_above
            self.deepspeed = wrap(self.backbone, self.config, version=self.version, total_steps=setup.total_steps)

    @property
    def trainable_parameters(self) -> int:
        return full_numel(self.backbone.trainable())

    def close(self) -> None:
        """Release the model and its device memory, to make room for the next stage's."""
        self.deepspeed.destroy()
        self.reference = None
        del self.deepspeed, self.backbone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- one optimiser step ---------------------------------------------------------------------------------------

    def train(self, index: int, config: LossConfig, items: list[TrainItem]) -> TrainReport:
        """Run optimiser step number `index` over the logs of all ranks' items; return its report.

        config: the loss and its settings. items: this rank's groups.
        Raises ValueError if some rank's items cannot be trained on, and RuntimeError if loss or gradient is not finite.
        Both are raised on every rank, and the weights stay as they were.
        """
        began = time.monotonic()
        work = self._work(items, "target")
        step = self._agree(index, config, work)
        outcomes = Outcomes(self.ranks.gather(self._gradients(step, work), f"to finish the gradients of step {index}"))
        with self.meter.phase("optimiser step"):
            grad_norm = self._apply(index, outcomes)
        self.version += 1
        metrics = outcomes.metrics()
        metrics["grad_norm"] = grad_norm
        metrics["lr"] = float(self.deepspeed.get_lr()[0])
        metrics["target_tokens"] = float(step.targets)
        metrics["micro_batches"] = float(len(step.work))
        metrics["compiles"] = float(compile_count())
        metrics["step_s"] = time.monotonic() - began
        return TrainReport(index, self.version, metrics, outcomes.age0, outcomes.outlier)

    def _work(self, items: list[TrainItem], which: str) -> RankWork:
        return RankWork(
            items,
            which,
            blank_media(self.backbone),
            row_tokens=self.config.row_tokens,
            max_tokens=self.config.micro_batch_tokens,
            head_chunk=self.config.head_chunk,
        )

    def _agree(self, index: int, config: LossConfig, work: RankWork) -> Step:
        """Agree with the other ranks on the step. Raises ValueError on all of them if any has a problem."""
        tokens, made_by = self.backbone.layout.tokens, loss_of(config)
        problem = made_by.problem(config, work, has_reference=self.reference is not None, boundary=self.config.boundary)
        mine = Share.of(work, problem, TargetCounts.of(work.logs, tokens))
        agreed = agree(self.ranks, mine, f"step {index}", f"to begin step {index}")
        if not agreed.counts.targets:
            raise ValueError(f"step {index}: no token of its logs is a target, there is nothing to learn")
        loss = made_by(config, agreed.counts, tokens)
        return Step(index, loss, agreed.work, agreed.temperature, agreed.counts.targets)

    def _gradients(self, step: Step, work: RankWork) -> Outcome:
        """Run forward and backward of every micro-batch of the step. The gradients accumulate in DeepSpeed."""
        mine = Outcome()
        on_policy: list[np.ndarray] = []
        self.deepspeed.train()
        for i, common in enumerate(step.work):
            batch = work.micro_batch(i, common)
            # Only at the last micro-batch does DeepSpeed reduce the gradients over the ranks.
            self.deepspeed.set_gradient_accumulation_boundary(i == len(step.work) - 1)
            with self.meter.phase("forward"):
                logp, entropy, features = self.deepspeed(
                    batch, common, step.temperature, entropy_gradient=step.loss.needs_entropy
                )
                reference = self._reference_logp(step, batch, logp, features)
                found: LossValue = step.loss(logp, entropy, batch, reference)
            if step.loss.sampled:
                # Streams sampled wholly at the learner's own version: for them the difference must be 0 but for
                # rounding.
                fresh = batch.of_version(self.version)
                on_policy.append(found.differences[fresh])
                outlier = batch.outlier(found.differences, self.outlier_above, fresh)
                mine.outlier = most_telling([mine.outlier, outlier])
            mine.worst = max(mine.worst, batch.furthest(found.differences))
            mine.add(found, float(entropy.detach().sum()), step.targets)
            # DeepSpeed averages gradients over the ranks, but the loss is already divided by the targets of all ranks.
            value = found.value * self.ranks.world
            # A gradient that is not finite makes DeepSpeed skip the step on all ranks. A loss that is not finite need
            # not have such a gradient, so NaN is forced into it.
            with self.meter.phase("backward"):
                self.deepspeed.backward(value if math.isfinite(float(value.detach())) else value * math.nan)
        mine.age0 = LogpDiff.of(np.concatenate(on_policy) if on_policy else np.zeros(0))
        return mine

    def _reference_logp(
        self, step: Step, batch: MicroBatch, logp: torch.Tensor, features: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the frozen reference's log-probs [N], without gradient; None if the loss does not need them."""
        if not step.loss.needs_reference:
            return None
        assert self.reference is not None, "the loss's `problem` refused this"
        # An idle micro-batch has no target to compare.
        return self.reference.logp(batch, features, step.temperature) if batch.rows.num_targets else logp.detach()

    def _apply(self, index: int, outcomes: Outcomes) -> float:
        """Apply the gradients and return their norm. Raises RuntimeError if they were refused as not finite."""
        norm, applied = apply_gradients(self.deepspeed, self.backbone, self.config.zero_stage)
        if not applied:
            distance, stream = outcomes.worst
            raise RuntimeError(
                f"step {index} was refused, the weights are those of version {self.version}: loss {outcomes.loss:g} or "
                f"gradient norm {norm:g} is not finite; the most extreme log-prob ({distance:g} nats off) is in stream "
                f"{stream}. Lower learner.lr or look at that stream"
            )
        return norm

    # --- scoring --------------------------------------------------------------------------------------------------

    def score(self, payloads: list[GroupPayload]) -> ScoreReport:
        """Re-score every sampled token of all ranks' payloads under the current weights.

        Raises ValueError on every rank if the logs have several score temperatures, or the ranks several kinds of
        media.
        """
        work = self._work([TrainItem(payload) for payload in payloads], "sampled")
        agreed = agree(self.ranks, Share.of(work), "scoring", "to begin scoring")
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        outlier: OffToken | None = None
        self.deepspeed.eval()
        with torch.no_grad():
            for i, common in enumerate(agreed.work):
                batch = work.micro_batch(i, common)
                with self.meter.phase("score"):
                    logp, *_ = self.deepspeed(batch, common, agreed.temperature)
                differences = logp.double().cpu().numpy() - batch.column("behaviour_logp")
                outlier = most_telling([outlier, batch.outlier(differences, self.outlier_above)])
                kinds = batch.column("kind")
                for kind in np.unique(kinds):
                    found[Kind(int(kind)).name.lower()].append(differences[kinds == kind])
        here = {kind: LogpDiff.of(np.concatenate(parts)) for kind, parts in found.items()}
        gathered = self.ranks.gather((here, outlier), "to finish scoring")
        everywhere = [part for part, _ in gathered]
        by_kind = {
            kind: LogpDiff.merge([part[kind] for part in everywhere if kind in part])
            for kind in sorted({kind for part in everywhere for kind in part})
        }
        named = most_telling([token for _, token in gathered])
        return ScoreReport(self.version, LogpDiff.merge(list(by_kind.values())), by_kind, named)

    # --- weights and state ----------------------------------------------------------------------------------------

    def export_weights(self) -> WeightsUpdate | None:
        """Return every trainable parameter in one flat buffer, on rank 0; the other ranks take part and return None."""
        with self.meter.phase("publish"):
            return export_weights(self.backbone.trainable(), self.version, self.ranks)

    def save(self, path: Path, streaming: dict[str, Any], *, resumable: bool = True) -> Future[None]:
        """Copy this rank's part of a checkpoint to host memory, and have it written while training goes on; a collective call.

        It is `path`/hf, an exported checkpoint, and if resumable `path`/deepspeed, which is all that the next step depends on.
        The future is done when this rank has written its part. Raises RuntimeError on every rank if any still writes another.
        """
        self.ranks.agree(self._writer.problem(), "to begin a checkpoint")
        backbone, write_state = self.backbone, None
        with self.meter.phase("save"), self.deepspeed.checkpoint_engine.collecting() as copies:
            whole = host_state_dict(backbone.model, self.ranks, copies)
            if resumable:
                write_state = copy_state(path, self.deepspeed, self.ranks, self.config, self.version)

        def write() -> None:
            with self.meter.beside("write checkpoint"):
                if whole is not None:
                    backbone.save(path / "hf", streaming, whole)
                if write_state is not None:
                    write_state()

        return self._writer.start(write)

    def load(self, path: Path) -> int:
        """Load what `save` wrote and return its version. The next step is then the one that would have followed.

        Raises FileNotFoundError or ValueError, see `load_state`.
        """
        self.version = load_state(path, self.deepspeed, self.ranks, self.config)
        return self.version
