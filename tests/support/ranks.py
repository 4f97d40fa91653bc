"""Learner ranks as real processes, in float64: what they are to do, the process of one rank, and its launcher.

DeepSpeed knows no float64: masters, gradients and what travels between ranks would be float32. `float64` is a test-only
patch of exactly those choices; the code paths are the real ones.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from learner.batching import TrainItem
from learner.config import LearnerConfig
from learner.losses.config import LossConfig
from learner.parallel.assign import share_out
from learner.saving import BackgroundWriter
from learner.setup import LearnerSetup
from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.log.record import ChunkRecord
from streams.memory import MemoryConfig
from streams.messages import GroupPayload
from streams.writing.writer import QueryInput, TurnInput
from tests.support.learner import GRPO, SFT, even
from tests.support.project import ROOT
from tests.support.streams import norms_in_input_dtype, request
from tests.support.streams import run as run_streams

LAYOUT = LayoutConfig(system_prompt="Watch.", think_budget=5, max_new_tokens=9)
SPEC = TinySpec(hidden=32, layers=2, mlp=48, vision_depth=1, vision_hidden=32, vision_mlp=32, vision_heads=2)
LOSSES: dict[str, LossConfig] = {"sft": replace(SFT, answer_weight=2.0), "grpo": GRPO}
WAIT_S = 200.0


@dataclass(frozen=True)
class Call:
    """One call on every rank's engine: train, score, weights, moments, save, load; or sleep (`path` seconds, rank `step`).

    copy: `save` whose writing is held back until the call `write`.
    """

    what: str
    step: int = 0
    loss: LossConfig = SFT
    items: tuple[TrainItem, ...] = ()
    path: str = ""


@dataclass(frozen=True)
class Job:
    """What the ranks of one run do, and how. float64: see `float64`; timeout_s: of collectives."""

    checkpoint: str
    learner: LearnerConfig
    calls: tuple[Call, ...]
    reference: str = ""
    float64: bool = True
    timeout_s: float = 60.0
    fused_kernels: str = "auto"


def train(step: int, loss: str, items: list[TrainItem], **settings: float) -> Call:
    return Call("train", step, replace(LOSSES[loss], **settings), tuple(items))


def learner_values(**values: Any) -> LearnerConfig:
    given = {"lr": 1e-4, "grad_clip": 1e6, "row_tokens": 150, "micro_batch_tokens": 300, "head_chunk": 16}
    return LearnerConfig(**(given | values))


def checkpoint(folder: Path, seed: int = 2, **spec: Any) -> Path:
    values = {name: getattr(SPEC, name) for name in vars(SPEC)} | spec
    return build_tiny(folder, TinySpec(**values), seed=seed)


def groups(path: Path, turns: list[int], *, media: str, streams: int = 2, seed: int = 0) -> list[TrainItem]:
    """Return sampled groups in float64, one per entry of `turns` (its number of turns), with media of the kind `media`."""
    items = []
    with norms_in_input_dtype():
        backbone = Backbone.load(path, LAYOUT, dtype=torch.float64)
        for g, count in enumerate(turns):
            rng = np.random.default_rng([seed, g])
            clip = rng.integers(0, 256, (count, 2, 56, 56, 3), dtype=np.uint8)
            with torch.no_grad():
                features = backbone.encode_video([clip])[0]
            grid = (1, 2, 2)
            query = QueryInput(tuple(backbone.layout.query_ids("red?")), None)
            shown = tuple(
                TurnInput(ChunkRecord(t, "clip.mp4", (float(t), t + 0.5), grid, "clip"), query if t == 0 else None)
                for t in range(count)
            )
            memory = MemoryConfig("rcsm", 2)
            requests: list[StreamRequest] = []
            for i in range(streams):
                made = request(backbone, memory, shown, f"{seed}/{g}/{i}", feature_seed=0)
                requests.append(
                    StreamRequest(made.header, shown, tuple(features), made.policy, backbone.layout, patch_seconds=0.5)
                )
            logs = tuple(run_streams(backbone, requests))
            advantages = tuple(float(a) for a in rng.normal(size=streams))
            with torch.no_grad():
                kinds = {"features": features, "pre_merger": backbone.encoding(clip, pre_merger=True).finish()}
            shipped = to_array(kinds[media]) if media in kinds else clip
            items.append(even(GroupPayload(logs, media, shipped), advantages))
    return items


def float64(stack: ExitStack) -> None:
    """Compute in float64 all that DeepSpeed and the backbone would compute in float32."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stack.enter_context(norms_in_input_dtype())
    load = Backbone.load.__func__

    def load_double(cls, path, layout, *, dtype, fused_kernels, **more):
        # What `auto` chooses in float64.
        fused_kernels = "off" if fused_kernels == "torch" else fused_kernels
        return load(cls, path, layout, dtype=torch.float64, fused_kernels=fused_kernels, **more)

    stack.enter_context(mock.patch.object(Backbone, "load", classmethod(load_double)))
    masters = ZeROOptimizer._configure_master_weights

    def double_masters(self, **kwargs):
        masters(self, **kwargs)
        return torch.float64

    for cls in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        stack.enter_context(mock.patch.object(cls, "_configure_master_weights", double_masters))
    configure = DeepSpeedEngine._configure_zero_optimizer

    def configure_double(self, optimizer):
        # The check of communication types sees float32, what is used is float64.
        types = mock.patch.object(DeepSpeedEngine, "get_data_types", return_value=(torch.float64, torch.float64))
        checked = mock.patch.object(DeepSpeedEngine, "communication_data_type", property(lambda _: torch.float32))
        with types, checked:
            made = configure(self, optimizer)
        made.communication_data_type = torch.float64
        (bucket,) = made.ipg_buckets.values()
        made.ipg_buckets = {torch.float64: bucket}
        if torch.is_tensor(getattr(bucket, "buffer", None)):
            bucket.buffer = bucket.buffer.double()
        return made

    used = property(lambda _: torch.float64)
    stack.enter_context(mock.patch.object(DeepSpeedEngine, "communication_data_type", used))
    stack.enter_context(mock.patch.object(DeepSpeedEngine, "_configure_zero_optimizer", configure_double))
    accelerator = type(get_accelerator())
    supported = [*get_accelerator().supported_dtypes(), torch.float64]
    stack.enter_context(mock.patch.object(accelerator, "supported_dtypes", return_value=supported))
    # Where the processor computes in float16, ZeRO-3 asserts that a model's type is one of the three that it knows.
    stack.enter_context(mock.patch.object(accelerator, "is_fp16_supported", return_value=False))


class RankProcesses:
    """The ranks of a run, as processes that run one job after another: starting them takes longer than most jobs."""

    def __init__(self, folder: Path, world: int, timeout_s: float = 60.0) -> None:
        self.folder, self.world, self.jobs = folder, world, 0
        folder.mkdir(parents=True, exist_ok=True)
        root = str(ROOT)
        environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.processes = []
        for rank in range(world):
            with (folder / f"{rank}.err").open("w") as err:
                command = [
                    sys.executable,
                    "-m",
                    "tests.support.ranks",
                    str(folder),
                    str(rank),
                    str(world),
                    str(timeout_s),
                ]
                self.processes.append(subprocess.Popen(command, cwd=root, env=environment, stdout=err, stderr=err))

    def run(self, job: Job) -> list[list[Any]]:
        """Return the replies of every call, by rank. Raises RuntimeError with a rank's stderr once the processes have ended."""
        number, self.jobs = self.jobs, self.jobs + 1
        publish(self.folder / f"{number}.job", pickle.dumps(job))
        outs = [self.folder / f"{number}.{rank}.out" for rank in range(self.world)]
        deadline = time.monotonic() + WAIT_S
        while not all(out.exists() for out in outs):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                codes = self.close()
                said = [(self.folder / f"{rank}.err").read_text()[-3000:] for rank in range(self.world)]
                raise RuntimeError(f"ranks ended with {codes} during job {number}: " + "\n".join(said))
            time.sleep(0.02)
        return [pickle.loads(out.read_bytes()) for out in outs]

    def close(self) -> list[int]:
        for process in self.processes:
            process.kill()
        return [process.wait() for process in self.processes]


def run(job: Job, ranks: int, folder: Path) -> list[list[Any]]:
    """Run one job in processes of its own, as a run or a resume does."""
    processes = RankProcesses(folder, ranks, job.timeout_s)
    try:
        return processes.run(job)
    finally:
        processes.close()


def publish(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that a reader never sees a part of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.rename(partial, path)


def main(folder: Path, rank: int, world: int, timeout_s: float) -> None:
    """Run the process of one rank until its launcher kills it, or is gone."""
    from learner.parallel.ranks import Ranks, open_store
    from learner.setup import RankPlace

    place = RankPlace(rank, world, "127.0.0.1", 0, timeout_s)
    store = None
    if rank == 0:
        store = open_store(place)
        publish(folder / "port", str(store.port).encode())
    wait_for(folder / "port")
    ranks = Ranks(RankPlace(rank, world, place.host, int((folder / "port").read_text()), timeout_s), store)
    for number in itertools.count():
        wait_for(folder / f"{number}.job")
        job: Job = pickle.loads((folder / f"{number}.job").read_bytes())
        # A rank that hangs shows where, in its stderr, before the launcher gives up. (A dump may crash an import.)
        faulthandler.dump_traceback_later(WAIT_S * 0.8)
        with ExitStack() as stack:
            if job.float64:
                float64(stack)
            replies = play(job, ranks, stack)
        faulthandler.cancel_dump_traceback_later()
        publish(folder / f"{number}.{rank}.out", pickle.dumps(replies))


def wait_for(path: Path) -> None:
    launcher = os.getppid()
    while not path.exists():
        if os.getppid() != launcher:
            # No orderly shutdown: a rank whose peers are gone would wait for them.
            os._exit(0)
        time.sleep(0.02)


def play(job: Job, ranks: Any, stack: ExitStack) -> list[Any]:
    from learner.engine import LearnerEngine
    from learner.parallel import deepspeed as module

    plain = module.deepspeed_config

    def everything_partitioned(config: LearnerConfig, trained: int) -> dict[str, Any]:
        """Partition tiny parameters too: by default DeepSpeed keeps those below 100,000 elements whole."""
        made = plain(config, trained)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    stack.enter_context(mock.patch.object(module, "deepspeed_config", everything_partitioned))
    setup = LearnerSetup(
        job.checkpoint,
        LAYOUT,
        job.learner,
        total_steps=10,
        seed=0,
        reference=job.reference,
        fused_kernels=job.fused_kernels,
    )
    engine = LearnerEngine(setup, ranks)
    replies = []
    for call in job.calls:
        try:
            replies.append(one(engine, call, ranks))
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            replies.append(f"{type(error).__name__}: {error}")
    engine.close()
    return replies


def moments(engine: Any) -> dict[str, torch.Tensor]:
    """Return Adam's first moments, gathered from all ranks.

    They scale with the gradient, whereas Adam moves a parameter by about the learning rate whatever the gradient's scale.
    """
    return {name: moment(engine, p).clone() for name, p in engine.backbone.trainable().items()}


def moment(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.config.zero_stage == 0:
        return engine.deepspeed.optimizer.state[parameter]["exp_avg"]
    if engine.config.zero_stage == 3:
        return safe_get_full_optimizer_state(parameter, "exp_avg")
    # DeepSpeed's own reading of stages 1 and 2 passes through float32.
    whole = torch.zeros(parameter.numel(), dtype=torch.float64)
    if (mapping := parameter._hp_mapping) is not None:
        at = mapping.lp_fragment_address
        whole[at.start : at.start + at.numel] = mapping.get_hp_fragment("exp_avg")
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


class HeldWriter(BackgroundWriter):
    """Writes when it is told to."""

    def start(self, write: Callable[[], None]) -> Future[None]:
        self.write = write
        return Future()


def one(engine: Any, call: Call, ranks: Any) -> Any:
    share = share_out([sum(map(len, item.payload.logs)) for item in call.items], ranks.world)[ranks.rank]
    mine = [call.items[i] for i in share]
    if call.what == "train":
        return engine.train(call.step, call.loss, mine).metrics
    if call.what == "score":
        return engine.score([item.payload for item in mine])
    if call.what == "weights":
        return engine.export_weights()
    if call.what == "sleep":
        time.sleep(float(call.path) if ranks.rank == call.step else 0.0)
        return None
    if call.what == "moments":
        return moments(engine)
    if call.what == "save":
        return engine.save(Path(call.path), {"note": "here"}).result(WAIT_S)
    if call.what == "copy":
        engine._writer = HeldWriter()
        engine.save(Path(call.path), {"note": "here"})
        return None
    if call.what == "write":
        return engine._writer.write()
    if call.what == "load":
        return engine.load(Path(call.path))
    raise ValueError(call.what)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
