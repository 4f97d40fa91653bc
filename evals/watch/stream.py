"""One greedy stream of job=watch: a file's chunks through the engine, each turn reported as soon as it is over.

Invariants:
* engine, layout and inputs are those of a rollout; only the features are encoded chunk by chunk.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import torch

from conf.schema import RunConfig
from evals.watch.watched import WatchedFile, WatchedTurn
from rollout.engine.engine import Engine
from rollout.engine.kv_pool import KVPool
from rollout.engine.request import StreamRequest, stream_bound
from streams.backbone.backbone import Backbone
from streams.backbone.fused.modules import settle_fused_kernels
from streams.log.record import GENERATED, Kind, LogHeader
from streams.memory import CONTIGUOUS, knobs, make_policy
from streams.turns import ParsedTurn
from streams.video.reader import Clip, ClipReader
from streams.writing.inputs import turn_inputs
from streams.writing.writer import StreamWriter


class EncodedOnDemand(Sequence[torch.Tensor]):
    """A clip's features, encoded one chunk at a time when the engine asks for it, as in a live stream."""

    def __init__(self, backbone: Backbone, clip: Clip) -> None:
        self._backbone, self._clip = backbone, clip

    def __len__(self) -> int:
        return len(self._clip.frames)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with torch.no_grad():
            return self._backbone.encode_video([self._clip.frames[index : index + 1]])[0][0]


def watch_file(config: RunConfig, checkpoint: Path, shown: WatchedFile) -> Iterator[WatchedTurn]:
    """Yield the turns of one greedy stream over the file as the engine finishes them. Raises ValueError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(checkpoint, device)
    fused = settle_fused_kernels(config.model.fused_kernels, device, str(dtype).removeprefix("torch."))
    backbone = Backbone.load(checkpoint, config.layout, dtype=dtype, device=device, fused_kernels=fused.name)
    # Chunks are as long as in the whole file, however little of it is watched.
    seconds = config.data.video.chunk_seconds_of(replace(shown, end=shown.length))
    with ClipReader(config.data.video, backbone.image.patch_size, backbone.image.merge_size) as reader:
        chunks = max(1, math.ceil(shown.end / seconds - 1e-6))
        clip = reader.read(shown.video, 0.0, shown.end, chunks, chunk_seconds=seconds)
    request = _request(config, backbone, shown, clip, seconds)
    raw = config.memory.positions == CONTIGUOUS
    slot_bytes = KVPool.bytes_per_slot(backbone.num_layers, *backbone.kv_shape, backbone.dtype, raw=raw)
    given = config.rollout.kv_memory_mb * 2**20 // slot_bytes
    slots = given or stream_bound(request)
    rollout = config.rollout
    engine = Engine(backbone, slots, 1, rollout.attention, rollout.decode_steps, rollout.cuda_graphs)
    writer = engine.add(request)
    return _turns(engine, writer, shown, seconds)


def _turns(engine: Engine, writer: StreamWriter, shown: WatchedFile, seconds: float) -> Iterator[WatchedTurn]:
    began, reported = time.monotonic(), 0
    asked = {shown.chunk_of(query.time, seconds): query.text for query in shown.queries}
    while engine.busy:
        engine.step()
        over = writer.state is not None and writer.state.over
        if not over or writer.turn < reported:
            continue
        now = time.monotonic()
        parsed = _parse(engine, writer)
        kinds = writer.held.column("kind")
        yield WatchedTurn(
            start_s=writer.turn * seconds,
            end_s=min(shown.end, (writer.turn + 1) * seconds),
            query=asked.get(writer.turn, ""),
            thought=parsed.thought,
            response=parsed.response,
            well_formed=parsed.well_formed,
            memory_tokens=len(kinds),
            memory_video=int((kinds == Kind.VIDEO).sum()),
            seconds=now - began,
        )
        began, reported = time.monotonic(), writer.turn + 1


def _parse(engine: Engine, writer: StreamWriter) -> ParsedTurn:
    """Parse the turn that is over, from the end of the log: earlier turns are not read again."""
    log = writer.log
    start = log.begins(writer.turn)
    kinds = log.column("kind", start)
    made = np.isin(kinds, GENERATED)
    forced = made & ~log.column("sampled", start) & ~log.column("target", start)
    return engine.backbone.layout.parse_turn(writer.turn, log.column("ids", start)[made], kinds[made], forced[made])


def _request(config: RunConfig, backbone: Backbone, shown: WatchedFile, clip: Clip, seconds: float) -> StreamRequest:
    video = config.data.video
    return StreamRequest(
        header=LogHeader(
            stream_id=shown.id,
            task_id=shown.id,
            backbone=backbone.name,
            policy=config.memory.name,
            policy_knobs=knobs(config.memory),
            position_convention=backbone.position_convention,
            banned=backbone.layout.banned,
            seed=config.seed,
            temperature=0.0,
            score_temperature=1.0,
        ),
        turns=turn_inputs(shown, clip, backbone.layout, seconds, backbone.image.merge_size),
        features=EncodedOnDemand(backbone, clip),
        policy=make_policy(config.memory),
        layout=backbone.layout,
        patch_seconds=seconds / (video.frames_per_chunk // backbone.image.temporal_patch_size),
    )


def _dtype(checkpoint: Path, device: str) -> torch.dtype:
    """Return the dtype that the checkpoint was saved in; on a CPU float32, since half precision is slow there."""
    if device == "cpu":
        return torch.float32
    name = json.loads((checkpoint / "config.json").read_text()).get("dtype", "bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16
