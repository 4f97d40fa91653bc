"""The learner's engine: DeepSpeed around the shared scoring function, one optimiser step at a time.

Owner: learner. It holds no ray import: payloads arrive resolved. Invariants: it trains only from logs; ids, masks,
positions and turns are taken as logged; the gradient of a step is independent of the micro-batch cut; `version`
counts optimiser steps since the weights that the run started from.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from learner.config import LearnerConfig
from learner.losses import decision_weights, grpo_loss, sft_loss
from streams.backbone import Backbone, to_tensor
from streams.layout import LayoutConfig
from streams.log import Kind, StreamLog
from streams.messages import GroupPayload, LearnerSetup, ScoreReport, TrainReport, WeightsUpdate
from streams.scoring.logprobs import behaviour_differences, score_rows
from streams.scoring.packing import Rows, pack, plan_micro_batches
from streams.scoring.stats import LogpDiff


@dataclass(frozen=True)
class TrainItem:
    """One group with its media resolved: logs, media array (see GroupPayload), one advantage per log (RL)."""

    payload: GroupPayload
    advantages: tuple[float, ...] = ()


class _Scorer(nn.Module):
    """What DeepSpeed wraps: the scoring function as a module whose parameters are the backbone's."""

    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__()
        self.model = backbone.model
        self._backbone = [backbone]
        self._config = config

    def forward(
        self, rows: Rows, media: list[tuple[str, np.ndarray]], order: list[int], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp, entropy) of the rows' targets. media: distinct clips; order: which clip each log shows."""
        backbone = self._backbone[0]
        encoded = encode_media(backbone, media)
        features = torch.cat([encoded[i].flatten(0, 1) for i in order])
        scores = score_rows(
            backbone,
            rows,
            features,
            temperature=temperature,
            head_chunk=self._config.head_chunk,
            attention=resolve_attention(self._config.attention, backbone.device),
        )
        return scores.logp, scores.entropy


def resolve_attention(attention: str, device: torch.device) -> str:
    """`auto` is FlexAttention on CUDA; on CPU it is SDPA, since FlexAttention has no backward there."""
    if attention == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return attention


def encode_media(backbone: Backbone, media: list[tuple[str, np.ndarray]]) -> list[torch.Tensor]:
    """[chunks, tokens, F] per clip: features as shipped, frames through the tower in one call (with gradient)."""
    frames = [array for kind, array in media if kind == "frames"]
    encoded = iter(backbone.encode_video(frames) if frames else [])
    return [next(encoded) if kind == "frames" else to_tensor(array).to(backbone.device) for kind, array in media]


def prepare_single_rank(rank_port: int) -> None:
    """Environment of a one-rank process group, set inside the actor before DeepSpeed is imported."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(rank_port))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # Otherwise every start compiles a shared-memory all-reduce in C++ (half a minute, or a failure without a
        # compiler); gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class LearnerEngine:
    """Trains one backbone. `import deepspeed` happens here: it is slow, and only learners need it."""

    def __init__(self, setup: LearnerSetup, rank_port: int) -> None:
        prepare_single_rank(rank_port)
        import deepspeed
        from transformers import get_scheduler

        values = dict(setup.learner)
        self.config = LearnerConfig(**(values | {"betas": tuple(values["betas"])}))
        torch.set_num_threads(self.config.threads)
        random.seed(setup.seed)
        np.random.seed(setup.seed % 2**32)
        torch.manual_seed(setup.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        layout: LayoutConfig = setup.layout
        self.backbone = Backbone.load(setup.checkpoint, layout, dtype=getattr(torch, self.config.dtype), device=device)
        self.backbone.freeze(self.config.freeze)
        self.version = setup.version
        trainable = list(self.backbone.trainable().values())
        optimiser = torch.optim.AdamW(
            trainable, lr=self.config.lr, betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        scheduler = get_scheduler(
            self.config.schedule,
            optimiser,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=max(setup.total_steps, 1),
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=_Scorer(self.backbone, self.config),
            model_parameters=trainable,
            optimizer=optimiser,
            lr_scheduler=scheduler,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": self.config.grad_clip,
                "zero_optimization": {"stage": self.config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": self.config.dtype == "bfloat16"},
                "steps_per_print": 10**9,
            },
        )

    def train(self, step: int, loss: str, items: list[TrainItem], settings: dict[str, float]) -> TrainReport:
        """One optimiser step over all logs of `items`. loss: "grpo" or "sft"."""
        began = time.monotonic()
        logs = [log for item in items for log in item.payload.logs]
        clip_of = [i for i, item in enumerate(items) for _ in item.payload.logs]
        advantages = np.array([a for item in items for a in item.advantages])
        refused = [log.header.stream_id for log in logs if loss == "grpo" and not log.header.trainable]
        if refused:
            raise ValueError(f"stream {refused[0]} was decoded greedily: it can be scored but not trained on")
        temperatures = {log.header.score_temperature for log in logs}
        if len(temperatures) > 1:
            raise ValueError(f"step {step}: logs of several score temperatures in one batch: {sorted(temperatures)}")
        targets = sum(int(log.target.sum()) for log in logs)
        normaliser = float(targets)
        if loss == "sft":
            weights = self._sft_weights(logs, settings)
            normaliser = float(sum(weights.of(log.ids[log.target], log.kind[log.target]).sum() for log in logs))
        totals: dict[str, float] = defaultdict(float)
        batches = plan_micro_batches([len(log) for log in logs], self.config.row_tokens, self.config.micro_batch_tokens)
        on_policy: list[np.ndarray] = []
        self.backbone.model.train()
        for i, batch in enumerate(batches):
            members = sorted(m for row in batch for m in row)
            rows = pack(logs, batch)
            media, order = _distinct_media(items, [clip_of[m] for m in members])
            self.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            logp, entropy = self.deepspeed(rows, media, order, logs[members[0]].header.score_temperature)
            if loss == "grpo":
                behaviour = _at_targets(rows, logs, "behaviour_logp")
                on_policy.append(self._on_policy_differences(rows, logs, logp, behaviour))
                value, sums = grpo_loss(
                    logp,
                    torch.from_numpy(behaviour).to(logp),
                    torch.from_numpy(advantages[rows.stream.numpy()]).to(logp),
                    normaliser=normaliser,
                    clip_low=settings["clip_low"],
                    clip_high=settings["clip_high"],
                )
            else:
                weight = weights.of(rows.target_ids.numpy(), _at_targets(rows, logs, "kind"))
                value, sums = sft_loss(logp, torch.from_numpy(weight).to(logp), normaliser=normaliser)
            self.deepspeed.backward(value)
            totals["loss"] += float(value.detach())
            totals["entropy"] += float(entropy.sum()) / targets
            for name, total in sums.items():
                totals[name] += float(total) / targets
        self.deepspeed.step()
        self.version += 1
        fresh = LogpDiff.of(np.concatenate(on_policy) if on_policy else np.zeros(0))
        totals["age0_tokens"] = float(fresh.tokens)
        if fresh.mean is not None and fresh.max is not None:
            totals["age0_logp_diff_mean"], totals["age0_logp_diff_max"] = fresh.mean, fresh.max
        if "ratio_square" in totals:
            square = totals.pop("ratio_square")
            totals["effective_sample_share"] = totals["ratio"] ** 2 / square if square else 0.0
        grad_norm = self.deepspeed.get_global_grad_norm()
        totals["grad_norm"] = float(grad_norm) if grad_norm is not None else float("nan")
        totals["lr"] = float(self.deepspeed.get_lr()[0])
        totals["target_tokens"] = float(targets)
        totals["micro_batches"] = float(len(batches))
        totals["step_s"] = time.monotonic() - began
        return TrainReport(step, self.version, dict(totals))

    def score(self, payloads: list[GroupPayload]) -> ScoreReport:
        """Re-score every sampled token under the current weights (part b of the mismatch monitor)."""
        self.backbone.model.eval()
        logs: list[StreamLog] = []
        features: list[torch.Tensor] = []
        with torch.no_grad():
            for payload in payloads:
                clip = encode_media(self.backbone, [(payload.media_kind, payload.media)])[0].flatten(0, 1)
                logs += payload.logs
                features += [clip] * len(payload.logs)
        attention = resolve_attention(self.config.attention, self.backbone.device)
        differences = behaviour_differences(self.backbone, logs, features, attention=attention) if logs else []
        by_kind: dict[str, list[np.ndarray]] = defaultdict(list)
        for log, difference in zip(logs, differences, strict=True):
            kinds = log.kind[log.sampled]
            for kind in np.unique(kinds):
                by_kind[Kind(int(kind)).name.lower()].append(difference[kinds == kind])
        return ScoreReport(
            version=self.version,
            diff=LogpDiff.of(np.concatenate(differences) if differences else np.zeros(0)),
            by_kind={kind: LogpDiff.of(np.concatenate(parts)) for kind, parts in sorted(by_kind.items())},
        )

    def export_weights(self) -> WeightsUpdate:
        """Every trainable tensor, flat, for publication."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.backbone.trainable().items()}
        buffer = np.concatenate([t.view(-1).view(torch.uint8).numpy() for t in tensors.values()])
        return WeightsUpdate(
            version=self.version,
            names=tuple(tensors),
            shapes=tuple(tuple(t.shape) for t in tensors.values()),
            dtype=self.config.dtype,
            buffer=buffer,
        )

    def save(self, path: Path, streaming: dict[str, Any]) -> None:
        """Write `path`/hf (an exported checkpoint) and `path`/deepspeed (model and optimiser state)."""
        self.backbone.save(path / "hf", streaming)
        self.deepspeed.save_checkpoint(str(path / "deepspeed"), tag="state")

    def load(self, path: Path) -> None:
        """Load model, optimiser and scheduler state written by `save`."""
        if not (path / "deepspeed" / "state").is_dir():
            raise FileNotFoundError(f"{path}: no DeepSpeed state there")
        self.deepspeed.load_checkpoint(str(path / "deepspeed"), tag="state")

    def _on_policy_differences(
        self, rows: Rows, logs: list[StreamLog], logp: torch.Tensor, behaviour: np.ndarray
    ) -> np.ndarray:
        """|difference| at targets of streams sampled wholly at the learner's own version: there it must vanish."""
        fresh = np.array([log.single_version == self.version for log in logs])
        difference = np.abs(logp.detach().double().cpu().numpy() - behaviour)
        return difference[fresh[rows.stream.numpy()]]

    def _sft_weights(self, logs: list[StreamLog], settings: dict[str, float]) -> SftWeights:
        """Weights of a whole step, from the decisions that all its logs demonstrate."""
        tokens = self.backbone.layout.tokens
        decisions = np.concatenate([log.ids[log.target & (log.kind == Kind.DECISION)] for log in logs])
        silent, spoken = 1.0, 1.0
        if settings["balance_decisions"]:
            silent, spoken = decision_weights(
                int((decisions == tokens.silent).sum()),
                int((decisions == tokens.response).sum()),
                settings["decision_weight_clamp"],
            )
        return SftWeights(tokens.silent, tokens.response, silent, spoken, settings["answer_weight"])


@dataclass(frozen=True)
class SftWeights:
    """Weights of the two decision tokens and of the words of an answer; every other target weighs 1."""

    silent_id: int
    response_id: int
    silent: float
    spoken: float
    answer: float

    def of(self, ids: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """float64 [N] for target ids and kinds [N]."""
        weight = np.where(kind == Kind.RESPONSE, self.answer, 1.0)
        decision = kind == Kind.DECISION
        weight[decision & (ids == self.silent_id)] = self.silent
        weight[decision & (ids == self.response_id)] = self.spoken
        return weight


def _at_targets(rows: Rows, logs: list[StreamLog], column: str) -> np.ndarray:
    """The values [N] that a log column holds at the rows' targets."""
    stream, index = rows.stream.numpy(), rows.target_index.numpy()
    values = np.zeros(rows.num_targets, getattr(logs[0], column).dtype)
    for s in np.unique(stream):
        mine = stream == s
        values[mine] = getattr(logs[int(s)], column)[index[mine]]
    return values


def _distinct_media(items: list[TrainItem], clip_of: list[int]) -> tuple[list[tuple[str, np.ndarray]], list[int]]:
    """Each clip of a micro-batch once, and for every log which of them it shows."""
    distinct = sorted(set(clip_of))
    place = {clip: i for i, clip in enumerate(distinct)}
    media = [(items[clip].payload.media_kind, items[clip].payload.media) for clip in distinct]
    return media, [place[clip] for clip in clip_of]
