"""Whether a run fits into its devices' memory, and how large the KV pools may be.

Pure: it compares footprints with the devices that the actors report, before any of them loads a weight.

Invariants:
* what cannot fit is refused with the arithmetic and ways out;
* a pool has room for the largest stream, at least;
* all workers get pools of the same size;
* without `rollout.kv_memory_mb` a pool is never larger than its streams can fill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.planning.footprint import (
    SELF_CHECK,
    Footprint,
    checkpoint_copy,
    gib,
    learner_footprint,
    scorer_footprint,
    slot_bytes,
    trained_numbers,
    worker_footprint,
)
from runtime.planning.stream_size import StreamSize
from streams.backbone.kernel_choice import (
    HALF,
    choose_cuda_graphs,
    choose_decode_attention,
    choose_fused_kernels,
    choose_learner_attention,
    choose_rollout_attention,
    choose_vision_attention,
)
from streams.backbone.slices import encodes_ahead
from streams.checkpoint.model_shape import ModelGeometry
from streams.memory import check_text_tells_time, make_policy
from streams.support.usage import DeviceInfo
from streams.task import StreamTask

MARGIN = 0.06
"""Share of a device's free memory that is left free, for the allocator's fragments and libraries' workspaces."""

MICRO_BATCHES = (16384, 8192, 4096, 2048)
"""What learner.micro_batch_tokens=0 is chosen from."""


@dataclass(frozen=True)
class Process:
    """A process and its device. kv: whether it has a KV pool, whose size is yet to be determined."""

    footprint: Footprint
    device: DeviceInfo
    kv: bool = False


@dataclass(frozen=True)
class PoolNeed:
    """What a KV pool is needed for.

    Attributes:
        slot: Bytes of one token.
        largest: Most tokens of one stream that are live at once.
        streams: Most streams at once.
        given: Bytes of the pool as configured; 0 = what the device has left.
        sized_by: Which rows the streams take their size from, in words.
    """

    slot: int
    largest: int
    streams: int
    given: int = 0
    sized_by: str = ""


@dataclass(frozen=True)
class DevicePlan:
    """How the devices are filled.

    Attributes:
        kv_slots: of every worker's pool.
        lines: the arithmetic, for the terminal.
        footprints: the different ones among the processes.
        devices: of the learner ranks, then of the workers.
        wanted_slots: of a pool that holds all that it could be asked to hold.
        staging: weights.staging, chosen where that is auto.
        micro_batch_tokens: chosen for the learners whose own is 0.
    """

    kv_slots: int
    lines: tuple[str, ...]
    footprints: tuple[Footprint, ...]
    devices: tuple[DeviceInfo, ...] = ()
    wanted_slots: int = 0
    staging: str = "device"
    micro_batch_tokens: int = MICRO_BATCHES[0]

    def settled(self, learner: LearnerConfig) -> LearnerConfig:
        """Return a learner's settings with what was chosen for them."""
        return settle(learner, self.micro_batch_tokens)


def settle(learner: LearnerConfig, tokens: int) -> LearnerConfig:
    """Return the settings with micro-batches of `tokens` tokens where their own are open."""
    return learner if learner.micro_batch_tokens else replace(learner, micro_batch_tokens=tokens)


def plan_device_memory(
    processes: list[Process],
    need: PoolNeed,
    describe_pool: Callable[[int], Footprint],
    taken: frozenset[str] = frozenset(),
) -> DevicePlan:
    """Return the size of all pools.

    describe_pool: a worker's footprint with a pool of that many bytes. taken: ways out that the configuration has
    taken.
    Raises ValueError, with the arithmetic and ways out, if something does not fit.
    """
    wanted = need.given // need.slot if need.given else need.largest * need.streams
    slots = wanted
    sized_by = f". {need.sized_by}" if need.sized_by else ""
    for device, here in _by_device(processes).items():
        pools = sum(process.kv for process in here)
        fixed = sum(process.footprint.total for process in here)
        room = int(device.free * (1 - MARGIN))
        left = room - fixed
        words = f"{device.name} has {gib(device.free)} free ({MARGIN:.0%} of it stay so) for {_listed(here)}"
        if left < 0:
            raise ValueError(f"{words}: {gib(fixed)}, {gib(-left)} too many. {_ways_out(here, taken)}{sized_by}")
        if pools:
            possible = left // pools // need.slot
            if need.given and possible < wanted:
                raise ValueError(
                    f"{words}: {gib(fixed)}; {gib(left)} are left for {pools} KV pools, but rollout.kv_memory_mb asks for "
                    f"{gib(need.given)} each. Lower it (0 takes what is left), or more room. {_ways_out(here, taken)}{sized_by}"
                )
            slots = min(slots, possible)
    if slots < need.largest:
        source = "rollout.kv_memory_mb" if need.given else "what is left of the device"
        raise ValueError(
            f"the largest stream may hold {need.largest:,} tokens in the KV pool, {need.slot:,} bytes each: "
            f"{gib(need.largest * need.slot)}, but {source} gives each pool {slots:,} slots ({gib(slots * need.slot)}): raise "
            "rollout.kv_memory_mb or leave it at 0, or hold less: memory.window, data.video.max_pixels, data.max_turns"
            f"{sized_by}"
        )
    found = [describe_pool(slots * need.slot) if p.kv else p.footprint for p in processes]
    distinct = tuple(dict.fromkeys(found))
    return DevicePlan(slots, tuple(_lines(processes, found)), distinct, wanted_slots=wanted)


def _by_device(processes: list[Process]) -> dict[DeviceInfo, list[Process]]:
    """Return processes by the device that they share. If they report different free memory, the least counts."""
    by_key: dict[str, list[Process]] = {}
    for process in processes:
        by_key.setdefault(process.device.key, []).append(process)
    return {min((p.device for p in here), key=lambda d: d.free): here for here in by_key.values()}


def _lines(processes: list[Process], found: list[Footprint]) -> list[str]:
    lines = [
        f"memory estimate: {'each ' if count > 1 else ''}{footprint.line()}"
        for footprint, count in Counter(found).items()
    ]
    for device, here in _by_device(processes).items():
        total = sum(f.total for p, f in zip(processes, found, strict=True) if p in here)
        lines.append(f"memory estimate: {gib(total)} of the {gib(device.free)} free on {device.name}")
    return lines


def _listed(here: list[Process]) -> str:
    counts = Counter(process.footprint for process in here)
    return ", ".join((f"{count} x " if count > 1 else "") + footprint.line() for footprint, count in counts.items())


def _ways_out(here: list[Process], taken: frozenset[str]) -> str:
    """Return, in words, what would help on a device with these processes and has not been done yet."""
    cuda = here[0].device.cuda
    pools, ranks = any(process.kv for process in here), any(not process.kv for process in here)
    ways = [] if cuda else ["a smaller model", "fewer workers"]
    if ranks:
        ways += ["learner.offload=cpu"] if cuda else []
        ways += ["learner.freeze=tower+merger", "learner.activation_checkpointing=true"]
        ways.append("a smaller learner.micro_batch_tokens or learner.head_vocab")
    if pools:
        ways += ["weights.staging=host"] if cuda else []
        ways.append("a smaller rollout.max_streams or data.cache_mb")
    if any(SELF_CHECK in dict(process.footprint.parts) for process in here):
        ways.append("monitor.every=0 (workers re-score no streams)")
    if cuda and pools and ranks:
        ways.append("rollout workers on GPUs of their own (cluster.placement=separated)")
    return f"Ways out: {', '.join(way for way in ways if way not in taken)}"


def _taken(config: RunConfig, stages: dict[str, LearnerConfig]) -> frozenset[str]:
    """Return ways out that are taken or change nothing: only RL stages weights, only training keeps activations."""
    learners = stages.values()
    trains = [learner for stage, learner in stages.items() if stage != "eval"]
    done = {
        "learner.offload=cpu": all(learner.offload == "cpu" for learner in learners),
        "learner.freeze=tower+merger": all(not learner.boundary.vision_trains for learner in learners),
        "learner.activation_checkpointing=true": all(learner.activation_checkpointing for learner in trains),
        "weights.staging=host": config.weights.staging == "host" or "rl" not in stages,
    }
    return frozenset(way for way, is_done in done.items() if is_done)


def _check_kernels(
    config: RunConfig,
    stages: dict[str, LearnerConfig],
    devices: tuple[list[DeviceInfo], list[DeviceInfo]],
    head_dim: int,
) -> None:
    """Raise ValueError for a forced kernel that the device or the dtype rules out, before a model is loaded.

    Whether a kernel's package is installed is known only where it runs: the actors check again.
    """
    ranks, workers = ({"cuda" if device.cuda else "cpu" for device in part} for part in devices)
    for device in ranks:
        for learner in stages.values():
            choose_learner_attention(learner.attention, device)
            if device == "cpu" or learner.dtype not in HALF:
                choose_vision_attention(config.model.vision_attention, device, learner.dtype)
            if device == "cpu":
                choose_fused_kernels(config.model.fused_kernels, device, learner.dtype)
    for device in workers:
        if device == "cpu" or config.model.dtype not in HALF:
            prefill = choose_rollout_attention(config.rollout.attention, device, config.model.dtype, head_dim)
            if device == "cpu":
                choose_decode_attention(config.rollout.attention, device, prefill.name)
            choose_vision_attention(config.model.vision_attention, device, config.model.dtype)
        if device == "cpu":
            choose_fused_kernels(config.model.fused_kernels, device, config.model.dtype)


def _scores_by_flex(learner: LearnerConfig, device: DeviceInfo) -> bool:
    """Return whether logs are scored with FlexAttention on that device, by the learner or in a worker's self-check."""
    return device.cuda and learner.attention != "sdpa"


def plan_devices(
    config: RunConfig,
    stages: dict[str, LearnerConfig],
    geometry: ModelGeometry,
    tasks: Iterable[StreamTask],
    devices: tuple[list[DeviceInfo], list[DeviceInfo]],
) -> DevicePlan:
    """Return one plan for all stages: the learner that needs the most memory, and one size of KV pools.

    stages: name -> settings of its learner; `eval` only scores. devices: of the learner ranks, and of the workers. What the
    configuration leaves open (weights.staging=auto, learner.micro_batch_tokens=0) is chosen here: the first choice under
    which the pool holds all its streams, or else the one with the largest pool. Streams that wait cost more than a longer
    pause at the swap or one more forward. Raises ValueError if something does not fit.
    """
    _check_kernels(config, stages, devices, geometry.head_dim)
    check_text_tells_time(make_policy(config.memory), geometry.family.timestamps)
    choices = _choices(config, stages, devices[1])
    stream = StreamSize.largest(config, tasks, geometry)
    # (plan, what was tried before it and came to less)
    fits: list[tuple[DevicePlan, tuple[str, ...]]] = []
    less: list[str] = []
    refused: ValueError | None = None
    for staging, tokens in choices:
        said = _said(config, stages, staging, tokens)
        chosen = replace(config, weights=replace(config.weights, staging=staging))
        settled = {stage: settle(learner, tokens) for stage, learner in stages.items()}
        try:
            plan = _plan_as_set(chosen, settled, geometry, stream, devices)
        except ValueError as error:
            refused = error
            less.append(f"{said} does not fit")
            continue
        fits.append((replace(plan, staging=staging, micro_batch_tokens=tokens), tuple(less)))
        if plan.kv_slots >= plan.wanted_slots:
            break
        less.append(f"{said} leaves {plan.kv_slots:,}")
    if not fits:
        assert refused is not None
        if len(choices) == 1:
            raise refused
        raise ValueError(f"{refused} (with {_said(config, stages, *choices[-1])}, the least of what is chosen from)")
    # Of equal ones the first.
    best, before = max(fits, key=lambda fit: fit[0].kv_slots)
    if len(choices) == 1:
        return best
    because = f" ({'; '.join(before)})" if before else ""
    line = (
        f"memory choice: {_said(config, stages, best.staging, best.micro_batch_tokens)}: {best.kv_slots:,} KV slots of the "
        f"{best.wanted_slots:,} that a worker's streams can fill{because}"
    )
    return replace(best, lines=(line, *best.lines))


def _choices(config: RunConfig, stages: dict[str, LearnerConfig], workers: list[DeviceInfo]) -> list[tuple[str, int]]:
    """Return what may be chosen as (staging, tokens of a micro-batch), the fastest first; one entry where nothing is open."""
    stagings: tuple[str, ...] = (config.weights.staging,)
    if config.weights.staging == "auto":
        # Without a GPU both are the same memory.
        stagings = ("device", "host") if any(device.cuda for device in workers) and "rl" in stages else ("device",)
    open_sizes = any(learner.micro_batch_tokens == 0 for learner in stages.values())
    sizes = MICRO_BATCHES if open_sizes else MICRO_BATCHES[:1]
    return [(staging, tokens) for tokens in sizes for staging in stagings]


def _said(config: RunConfig, stages: dict[str, LearnerConfig], staging: str, tokens: int) -> str:
    """Write the open settings as they are chosen."""
    words = [f"weights.staging={staging}"] if config.weights.staging == "auto" else []
    if any(learner.micro_batch_tokens == 0 for learner in stages.values()):
        words.append(f"learner.micro_batch_tokens={tokens}")
    return " ".join(words)


def _plan_as_set(
    config: RunConfig,
    stages: dict[str, LearnerConfig],
    geometry: ModelGeometry,
    stream: StreamSize,
    devices: tuple[list[DeviceInfo], list[DeviceInfo]],
) -> DevicePlan:
    """Plan as `plan_devices` does, with nothing left open."""
    learner_devices, worker_devices = devices
    positions = config.memory.positions

    def learner_of(stage: str, learner: LearnerConfig, device: DeviceInfo) -> Footprint:
        flex = _scores_by_flex(learner, device)
        numbers = trained_numbers(geometry, learner)
        if stage == "eval":
            return scorer_footprint(geometry, learner, numbers, stream, stream.tasks, flex=flex, positions=positions)
        copied = checkpoint_copy(geometry, learner, numbers, resumable=config.checkpoint.optimizer != "none")
        found = learner_footprint(
            geometry,
            learner,
            numbers,
            stream,
            config.sft.batch if stage == "sft" else config.streams_per_step,
            tower_trains=learner.boundary.learner_runs_tower,
            reference=stage == "rl" and config.algorithm.kl_coef > 0,
            flex=flex,
            fused=device.cuda,
            per_clip=1 if stage == "sft" else config.algorithm.group_size,
            positions=positions,
        )
        return found.with_copy(copied, on_device=not device.cuda)

    paged = all(
        device.cuda
        and choose_rollout_attention(config.rollout.attention, "cuda", config.model.dtype, geometry.head_dim).name
        == "flashinfer"
        for device in worker_devices
    )

    flex = all(_scores_by_flex(config.learner, device) for device in worker_devices)
    # Triton comes with a torch for CUDA; whether it can compile is known only where it runs.
    decode = "triton" if config.rollout.attention in ("auto", "triton") else config.rollout.attention
    graphs = all(device.cuda for device in worker_devices)
    graphs = graphs and choose_cuda_graphs(config.rollout.cuda_graphs, "cuda", decode).name == "graphs"

    ahead = any(encodes_ahead(config.learner.boundary, "cuda" if device.cuda else "cpu") for device in worker_devices)

    def worker(kv_bytes: int) -> Footprint:
        trained = trained_numbers(geometry, config.learner)
        found = {"paged": paged, "flex": flex, "graphs": graphs, "ahead": ahead}
        return worker_footprint(geometry, config.model.dtype, trained, stream, config, kv_bytes, **found)

    processes = [Process(worker(0), device, kv=True) for device in worker_devices]
    for device in learner_devices if stages else []:
        found = [learner_of(stage, learner, device) for stage, learner in stages.items()]
        processes.append(Process(max(found, key=lambda footprint: footprint.total), device))
    need = PoolNeed(
        slot=slot_bytes(geometry, config.model.dtype, positions),
        largest=stream.live(config),
        streams=config.rollout.max_streams,
        given=config.rollout.kv_memory_mb * 2**20,
        sized_by=stream.sized_by,
    )
    plan = plan_device_memory(processes, need, worker, _taken(config, stages))
    return replace(plan, devices=(*learner_devices, *worker_devices))
