"""Peak device memory of a run's processes, in bytes, known before any weight is loaded. Pure.

Weights, KV pool, optimiser and feature sizes are exact. The memory of a forward and a backward is a count of the
tensors that autograd keeps (the tests check it against autograd) and of the largest temporaries besides. CUDA's own
context is not included: devices are asked for their free memory once every process has opened its context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from conf.schema import RunConfig
from learner.config import GATHER_BYTES, ZERO_BUCKET, LearnerConfig
from rollout.config import PREFILL_ROWS, SELF_CHECK_HEAD
from runtime.planning.stream_size import StreamSize
from streams.backbone.freezing import trained
from streams.backbone.kernel_choice import FLASHINFER_WORKSPACE, HEAD_VOCAB, REGION_SCORES
from streams.backbone.slices import chunks_per_slice
from streams.checkpoint.model_shape import ModelGeometry, kv_values
from streams.memory import CONTIGUOUS, NATIVE

BYTES = {"float32": 4, "bfloat16": 2}
GATHERED = 2 * GATHER_BYTES
"""Bytes of parameters that stage 3 holds beyond its own slice."""

SELF_CHECK = "self-check"
"""The part of a rollout worker's footprint where re-scoring a stream takes more than a step of the engine."""


@dataclass(frozen=True)
class Footprint:
    """Peak device memory of one process by part, in bytes. host: what it also needs of host memory."""

    process: str
    parts: tuple[tuple[str, int], ...]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)

    def with_copy(self, copied: int, *, on_device: bool) -> Footprint:
        """Return it with the copy from which a checkpoint is written. on_device: the device is the host's memory."""
        if on_device:
            return replace(self, parts=(*self.parts, ("checkpoint copy", copied)))
        return replace(self, host=self.host + copied)

    def line(self) -> str:
        """`learner 6.1 GiB (weights 0.9 + optimiser 3.7 + ...)`."""
        inside = " + ".join(f"{name} {gib(size)}" for name, size in self.parts if size)
        beside = f", and {gib(self.host)} of host memory" if self.host else ""
        return f"{self.process} {gib(self.total)} ({inside}){beside}"


def layer_bytes(geometry: ModelGeometry, width: int, *, dense: bool) -> tuple[int, int]:
    """Return bytes per token that autograd keeps of one text layer, and those of its backward's largest temporaries.

    width: bytes of one value. dense: SDPA with a mask, for which keys and values are repeated for every query head.
    Norms keep their input in float32.
    """
    query, kv = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    norms = 2 * (4 + 2 * width) * geometry.hidden
    attention = 2 * width * query + 2 * width * (query if dense else kv)
    if geometry.family.head_norms:
        attention += (4 + 2 * width) * (query + kv)
    mlp = 4 * width * geometry.mlp
    return norms + attention + mlp, 3 * width * geometry.mlp + 12 * geometry.hidden


def region_bytes(geometry: ModelGeometry, width: int, row: int, text: float, *, dense: bool) -> tuple[int, int]:
    """Return what contiguous positions add to `layer_bytes`.

    These are queries once per region, at most two copies of a text token's key and, if dense, the attention weights of
    every query head over a row's keys. row: tokens of a row. text: share of text tokens in it.
    """
    query, keys = geometry.heads * geometry.head_dim, 1 + 2 * text
    kept = 2 * width * geometry.kv_heads * geometry.head_dim * keys
    if not dense:
        # Rotated, attended to, and weighed against one another.
        return int(kept + 18 * width * query), 6 * width * query
    # In half precision the softmax is taken in float32.
    weights = geometry.heads * row * keys
    return int(kept + 6 * width * query + weights * (width if width == 4 else width + 4)), int(12 * weights)


def micro_batch_tokens(learner: LearnerConfig, stream: StreamSize, streams: int) -> int:
    """Return the padded tokens of the learner's largest forward, for `streams` streams per step."""
    share = math.ceil(streams / learner.ranks) * stream.tokens
    return max(stream.tokens, min(learner.micro_batch_tokens, share))


def learner_footprint(
    geometry: ModelGeometry,
    learner: LearnerConfig,
    trained: int,
    stream: StreamSize,
    streams: int,
    *,
    tower_trains: bool,
    reference: bool,
    flex: bool,
    fused: bool,
    per_clip: int = 1,
    positions: str = NATIVE,
) -> Footprint:
    """Return the peak memory of one learner rank that trains.

    trained: trainable parameters. streams: streams per step, `per_clip` of which share a clip. flex: FlexAttention,
    else SDPA with a dense mask. fused: AdamW without temporaries. positions: `memory.positions`.
    """
    width, ranks = BYTES[learner.dtype], learner.ranks
    total, stage = geometry.total, learner.zero_stage
    tokens = micro_batch_tokens(learner, stream, streams)
    kept, transient = layer_bytes(geometry, width, dense=not flex)
    if positions == CONTIGUOUS:
        regions = region_bytes(geometry, width, _row(learner, stream, tokens), stream.text_share, dense=not flex)
        kept, transient = kept + regions[0], max(transient, regions[1])
    if learner.activation_checkpointing:
        held = geometry.layers * geometry.hidden * width * tokens
    else:
        held = geometry.layers * kept * tokens
    media = tokens * geometry.feature_width * width
    if learner.boundary.worker_merges:
        # The rows before the mergers, and what the mergers keep: their normalised form and both sides of the activation.
        media += tokens * 5 * geometry.pre_merger_width * width
    if tower_trains:
        # A micro-batch encodes each of its clips once, all in one call of the tower.
        clips = math.ceil(tokens // stream.tokens / per_clip)
        media += clips * tower_bytes(geometry, stream, width, _kept_blocks(learner))
    if not flex:
        # The mask, and SDPA's additive copies of it: every layer keeps one.
        row = _row(learner, stream, tokens)
        media += tokens * row * (1 + width * (1 if learner.activation_checkpointing else geometry.layers))
    chunk = min(learner.head_chunk, math.ceil(tokens * stream.text_share))
    head = head_bytes(geometry, width, chunk, learner.head_vocab, backward=True)
    gradients = trained * width
    bucket = min(ZERO_BUCKET, trained) * width if stage else 0
    several = math.ceil(streams / ranks) * stream.tokens > tokens
    # The backward begins at the head with all that the layers hold, and ends at the first layer with all gradients.
    begins = held + head + (gradients if several else 0)
    ends = gradients + tokens * (kept + transient)
    backward = max(begins, ends) + bucket + media
    # The optimiser's step has the gradients once more in a flat row, and as float32.
    if stage:
        masters, moments = 4 * trained // ranks, 8 * trained // ranks
        flat, single = trained * width, 4 * trained // ranks
        casting = flat + (single if width != 4 else 0)
        # AdamW's root and quotient; a flat row of another dtype is gone by then.
        stepping = single + (0 if fused else 2 * single)
        # Offloaded, all of this is in host memory, where the optimiser steps.
        step = gradients + (0 if learner.offload == "cpu" else max(casting, stepping))
    else:
        masters, moments, step = 0, 8 * trained, gradients
    weights = (total * width) // ranks + GATHERED if stage == 3 and ranks > 1 else total * width
    offloaded = masters + moments if learner.offload == "cpu" else 0
    beside = offloaded + 4 * trained // ranks if offloaded else 0
    working = ("backward", backward) if backward >= step else ("optimiser step", step)
    return Footprint(
        _rank_name(learner),
        (
            ("weights", weights),
            ("optimiser", masters + moments - offloaded),
            ("reference", total * width if reference else 0),
            working,
        ),
        host=beside + trained * width,
    )


def checkpoint_copy(geometry: ModelGeometry, learner: LearnerConfig, trained: int, *, resumable: bool) -> int:
    """Return the bytes of host memory that rank 0 copies for a checkpoint, until they are written.

    resumable: with the optimiser's state. The export's weights are those of that state's model, copied once.
    """
    width, ranks = BYTES[learner.dtype], learner.ranks
    copied = geometry.total * width
    if resumable:
        # An fp32 copy of what trains, and two moments; stage 0 keeps only the moments.
        copied += 12 * trained // ranks if learner.zero_stage else 8 * trained
    if resumable and learner.zero_stage >= 2:
        # Frozen parameters once more, by themselves.
        copied += (geometry.total - trained) * width // (ranks if learner.zero_stage == 3 else 1)
    return copied


def worker_footprint(
    geometry: ModelGeometry,
    dtype: str,
    trained: int,
    stream: StreamSize,
    config: RunConfig,
    kv_bytes: int,
    *,
    paged: bool = False,
    flex: bool = False,
    graphs: bool = False,
    ahead: bool = False,
) -> Footprint:
    """Return the peak memory of one rollout worker.

    trained: parameters that an update replaces. kv_bytes: size of its KV pool. paged: FlashInfer, which has a workspace and
    no masks.
    flex: streams are re-scored with FlexAttention. graphs: decode steps are CUDA graphs, which keep their memory.
    ahead: clips are encoded while the engine steps.
    """
    width = BYTES[dtype]
    features = geometry.pre_merger_width if config.learner.boundary.worker_merges else geometry.feature_width
    clips = stream.tasks * stream.turns * stream.video * features * width
    # Only RL sends updates.
    updates = trained * width if "rl" in config.job.stages else 0
    staged = updates if config.weights.staging == "device" else 0
    streams = config.rollout.max_streams
    # A forward takes turns of streams until it has PREFILL_ROWS rows; each has a mask over its stream's keys.
    turn = stream.video + stream.text
    rows = min(streams * turn, PREFILL_ROWS + turn)
    masks = rows * stream.live(config) * max(width, 4)
    forward = rows * width * (6 * geometry.hidden + 3 * geometry.mlp) + (FLASHINFER_WORKSPACE if paged else masks)
    choosing = streams * geometry.vocab * 24
    tower = tower_bytes(geometry, stream, width, "slice")
    step = max(forward, choosing, 0 if ahead else tower)
    # The self-check runs between two engine steps, so only the larger of both peaks counts.
    check = self_check_bytes(geometry, width, stream, flex=flex, positions=config.memory.positions)
    return Footprint(
        "rollout worker",
        (
            ("weights", geometry.total * width),
            ("staged weights", staged),
            ("KV pool", kv_bytes),
            ("decode graphs", choosing if graphs else 0),
            ("cached features", min(config.data.cache_mb * 2**20, clips)),
            ("encoding ahead", tower if ahead else 0),
            (SELF_CHECK, check) if config.monitor.every and check > step else ("a step", step),
        ),
        host=updates - staged,
    )


def _kept_blocks(learner: LearnerConfig) -> str:
    return "inputs" if learner.activation_checkpointing else "all"


def tower_bytes(geometry: ModelGeometry, stream: StreamSize, width: int, kept: str) -> int:
    """Return the memory of the tower's largest call for the longest clip: pixels as float32, and activations of its blocks.

    kept: `all` activations, for a backward; the blocks' `inputs`, if it recomputes them; `one` block's, without a
    backward; `slice`, the same for a clip that is encoded some chunks at a time, on a GPU: a CPU takes fewer.
    """
    chunk = stream.video * geometry.merge_size**2
    patches = chunk * (min(stream.turns, chunks_per_slice(chunk, "cuda")) if kept == "slice" else stream.turns)
    pixels = 3 * geometry.temporal_patch_size * geometry.patch_size**2
    block = width * (6 * geometry.vision_hidden + 3 * geometry.vision_mlp)
    # Computed again, a block's activations stand beside their gradients.
    blocks = {
        "all": geometry.vision_layers * block,
        "inputs": geometry.vision_layers * geometry.vision_hidden * width + 2 * block,
        "one": block,
        "slice": block,
    }
    return patches * (2 * 4 * pixels + blocks[kept])


def scorer_footprint(
    geometry: ModelGeometry,
    learner: LearnerConfig,
    trained: int,
    stream: StreamSize,
    streams: int,
    *,
    flex: bool,
    positions: str = NATIVE,
) -> Footprint:
    """Return the peak memory of a rank that only scores logs: no backward, no moments (a first step makes them)."""
    width, ranks = BYTES[learner.dtype], learner.ranks
    tokens = micro_batch_tokens(learner, stream, streams)
    row, head = _row(learner, stream, tokens), (learner.head_chunk, learner.head_vocab)
    forward = _scoring_bytes(geometry, width, tokens, row, head, stream.text_share, flex=flex, positions=positions)
    if learner.boundary.learner_runs_tower:
        # Every stream of an evaluation shows a clip of its own.
        forward += tokens // stream.tokens * tower_bytes(geometry, stream, width, "one")
    weights = geometry.total * width
    return Footprint(
        _rank_name(learner),
        (
            ("weights", weights // ranks + GATHERED if learner.zero_stage == 3 and ranks > 1 else weights),
            ("optimiser", 4 * trained // ranks if learner.zero_stage and learner.offload == "none" else 0),
            ("scoring", forward),
        ),
    )


def self_check_bytes(geometry: ModelGeometry, width: int, stream: StreamSize, *, flex: bool, positions: str) -> int:
    """Return the memory that a rollout worker needs to re-score the largest stream."""
    tokens, share = stream.tokens, stream.text_share
    head = SELF_CHECK_HEAD, HEAD_VOCAB
    return _scoring_bytes(geometry, width, tokens, tokens, head, share, flex=flex, positions=positions)


def head_bytes(geometry: ModelGeometry, width: int, targets: int, block: int, *, backward: bool) -> int:
    """Return the memory of the LM head for `targets` at once. backward: with the gradients of hidden states and logits."""
    # A block's logits and one more of their kind, in float32 at least.
    each = min(geometry.vocab, block) * 2 * max(width, 4)
    if backward:
        # In half precision the logits' gradient is a copy.
        each += min(geometry.vocab, block) * (width if width < 4 else 0) + (width + 8) * geometry.hidden
    return targets * each


def _scoring_bytes(
    geometry: ModelGeometry,
    width: int,
    tokens: int,
    row: int,
    head: tuple[int, int],
    text: float,
    *,
    flex: bool,
    positions: str,
) -> int:
    """Return the memory of a forward without a backward: `tokens` in rows of `row`, `head` targets and ids at a time."""
    query, kv = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    keys = 1 + 2 * text if positions == CONTIGUOUS else 1
    # Queries, as they come and rotated, and the output; keys and values, repeated for every query head under a mask.
    attention = tokens * width * (3 * query + 2 * (kv if flex else query))
    if positions == CONTIGUOUS and flex:
        attention += tokens * sum(region_bytes(geometry, width, row, text, dense=False))
    elif positions == CONTIGUOUS:
        # Some queries at a time: region by region, joined, masked in float32; or the softmax of half precision in float32.
        attention += int(12 * min(geometry.heads * tokens * row * keys, REGION_SCORES))
    elif not flex:
        attention += tokens * row * width  # the mask as numbers to add
    mlp = tokens * width * 3 * geometry.mlp
    layer = max(attention, mlp) + tokens * width * 2 * geometry.hidden
    logits = head_bytes(geometry, width, min(head[0], math.ceil(tokens * text)), head[1], backward=False)
    mask = 0 if flex else int(tokens * row * keys)
    lasting = int(tokens * width * (2 * geometry.hidden + (1 - text) * geometry.feature_width)) + mask
    return lasting + max(layer, logits)


def _row(learner: LearnerConfig, stream: StreamSize, tokens: int) -> int:
    """Return the tokens of one row in a forward of `tokens` tokens."""
    return max(stream.tokens, min(learner.row_tokens, tokens))


def _rank_name(learner: LearnerConfig) -> str:
    return "learner" if learner.ranks == 1 else "learner rank"


def trained_numbers(geometry: ModelGeometry, learner: LearnerConfig) -> int:
    """Return the number of trainable parameters."""
    names = trained(geometry.parameters, learner.freeze, learner.freeze_names)
    return sum(geometry.parameters[name] for name in names)


def slot_bytes(geometry: ModelGeometry, dtype: str, positions: str = NATIVE) -> int:
    """Return the bytes of one token in the KV pool. Contiguous positions need its un-rotated keys, too."""
    sizes = geometry.layers, geometry.kv_heads, geometry.head_dim
    return kv_values(*sizes, unrotated=positions == CONTIGUOUS) * BYTES[dtype]


def gib(count: int) -> str:
    """Return a number of bytes in readable units."""
    if count >= 2**27:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count / 2**10:.1f} KiB"
