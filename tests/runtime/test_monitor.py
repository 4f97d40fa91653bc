"""The mismatch gate: what stops a run, what it then says, and that a run stopped so goes on.

The runs are real: launch.py with its actors, once with a limit below the noise, once with a learner whose mask is wrong.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.monitor import MonitorConfig
from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.mismatch_gate import MismatchGate
from runtime.store.checkpoint import read_state
from runtime.store.journal import journal_path, read_lines
from runtime.task_order import names_of
from streams.backbone.config import ModelConfig
from streams.log.mismatch import LogpDiff, OffToken, most_telling
from streams.log.record import NEVER
from streams.memory import MemoryConfig
from streams.scoring.logprobs import behaviour_differences
from tests.support.commands import launch
from tests.support.streams import joined_features, loud_backbone, random_turns, request, run


def monitor(dtype: str = "float32", **knobs: float) -> MismatchGate:
    config = RunConfig(
        memory=MemoryConfig("full"),
        model=ModelConfig(dtype=dtype),
        learner=LearnerConfig(dtype=dtype),
        monitor=MonitorConfig(**knobs),
    )
    return MismatchGate(config)


def sample(*differences: float) -> LogpDiff:
    return LogpDiff.of(np.array(differences))


def test_limits_are_the_bars_of_the_dtype_unless_given():
    assert vars(monitor().limits) == {"max": 3e-4, "mean": 1e-5, "k3": math.inf}
    assert vars(monitor("bfloat16").limits) == {"max": math.inf, "mean": 1e-2, "k3": 1e-4}
    assert vars(monitor(max=0, k3=2e-4).limits) == {"max": math.inf, "mean": 1e-5, "k3": 2e-4}
    assert MonitorConfig().limits("bfloat16", "float32").mean == 1e-2
    assert monitor().limits.token == 3e-4
    assert monitor("bfloat16").limits.token == 0.1


def test_one_token_above_the_largest_difference_stops_at_once():
    watch = monitor()
    watch.observe("here", sample(1e-6, -2e-4), None)
    with pytest.raises(RuntimeError, match=r"max difference .* above monitor\.max=0\.0003 \(there; 2 tokens"):
        watch.observe("there", sample(1e-6, -4e-4), None)


def test_means_are_judged_once_enough_tokens_of_one_place_are_together():
    watch = monitor(tokens=4)
    for _ in range(3):
        watch.observe("here", sample(1e-4), None)
        watch.observe("there", sample(0.0), None)
    watch.observe("there", sample(0.0), None)
    with pytest.raises(RuntimeError, match=r"mean difference .* above monitor\.mean=1e-05 \(here; 4 tokens"):
        watch.observe("here", sample(1e-4), None)


def test_a_bias_that_hides_in_the_mean_is_stopped_by_k3():
    watch = monitor("bfloat16", tokens=10)
    noisy = [0.0] * 98 + [0.3, -0.3]
    with pytest.raises(RuntimeError, match=r"k3 difference .* above monitor\.k3=0\.0001"):
        watch.observe("here", sample(*noisy), None)
    monitor("bfloat16", tokens=10, k3=0).observe("here", sample(*noisy), None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_run_under_any_limits(bad):
    with pytest.raises(RuntimeError, match="is not finite"):
        monitor(max=0, mean=0, k3=0).observe("here", sample(0.0, bad), None)


def test_an_empty_sample_says_nothing_while_training_and_is_an_error_at_the_end():
    watch = monitor()
    watch.observe("here", LogpDiff(), None)
    with pytest.raises(RuntimeError, match="could not be compared"):
        watch.judge("here", LogpDiff(), None)
    watch.judge("here", sample(1e-6), None)
    with pytest.raises(RuntimeError, match=r"monitor\.mean"):
        watch.judge("here", sample(2e-5), None)


@pytest.fixture(scope="module")
def engine_logs(tmp_path_factory):
    backbone = loud_backbone(tmp_path_factory.mktemp("loud"), torch.float32)
    rng = np.random.default_rng(1)
    requests = [request(backbone, MemoryConfig("rcsm", 2), random_turns(backbone, rng, 9), f"s{i}") for i in range(3)]
    return backbone, run(backbone, requests), [joined_features(r) for r in requests]


def test_the_first_token_after_an_eviction_that_the_scorer_forgot_is_named(engine_logs):
    backbone, logs, features = engine_logs
    watch = monitor()

    def observe(scored):
        differences = behaviour_differences(backbone, scored, features)
        named = [
            OffToken.of(log, np.flatnonzero(log.sampled), found, watch.limits.token)
            for log, found in zip(logs, differences, strict=True)
        ]
        watch.observe("rollout worker 1", LogpDiff.of(np.concatenate(differences)), most_telling(named))
        return named

    assert not any(token.above for token in observe(logs))
    first_eviction = int(logs[0].expiry.min())
    assert first_eviction < len(logs[0])
    with pytest.raises(RuntimeError) as stopped:
        observe([replace(log, expiry=np.full_like(log.expiry, NEVER)) for log in logs])
    said = str(stopped.value)
    index = int(re.search(r"First token that deviates: stream s0, index (\d+) ", said).group(1))
    # No later than the first token that was sampled after the eviction.
    assert index == np.flatnonzero(logs[0].sampled & (np.arange(len(logs[0])) >= first_eviction))[0]
    assert f"(id {logs[0].ids[index]}, " in said
    assert f"turn {logs[0].turn[index]}, memory rcsm, weights version 0)" in said
    assert f"sampled at log-prob {logs[0].behaviour_logp[index]:.6g}, re-scored -" in said
    assert "rollout worker 1" in said


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (
            MemoryConfig("custom", target="streams.memory:RecentFrames", args={"window": 2}),
            "streams.memory:RecentFrames",
        ),
        (MemoryConfig("sink_window", 2, 3, positions="contiguous"), "sink_window (contiguous)"),
    ],
)
def test_ones_own_policy_and_moving_positions_are_named(engine_logs, memory, said):
    backbone, _, _ = engine_logs
    rng = np.random.default_rng(1)
    (log,) = run(backbone, [request(backbone, memory, random_turns(backbone, rng, 3), "s")])
    index = np.flatnonzero(log.sampled)
    assert OffToken.of(log, index, np.zeros(len(index)), 3e-4).policy == said


def test_of_several_tokens_the_first_beyond_the_limit_tells_most(engine_logs):
    _, logs, _ = engine_logs
    index = np.flatnonzero(logs[0].sampled)
    off = np.zeros(len(index))
    off[3], off[5] = 2e-4, -1e-4
    below = OffToken.of(logs[0], index, off, 3e-4)
    assert (below.index, below.above) == (index[3], False)
    off[4], off[6] = math.nan, 9.0
    beyond = OffToken.of(logs[0], index, off, 3e-4)
    assert (beyond.index, beyond.above) == (index[4], True)
    assert most_telling([below, None, beyond]) is beyond
    assert most_telling([None]) is None
    assert OffToken.of(logs[0], index[:0], off[:0], 3e-4) is None


# ---- real runs ----

SETTINGS = (
    "job.stages=[data,sft,rl]",
    "seed=2",
    "data.max_turns=9",
    "data.synthetic.train_clips=4",
    "data.synthetic.heldout_per_mode=1",
    "memory.window=2",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
    "model.tiny.mlp=128",
    "sft.steps=2",
    "sft.batch=2",
    "algorithm.mode=sync",
    "algorithm.groups_per_step=2",
    "algorithm.group_size=2",
    "rollout.workers=1",
    "monitor.every=1",
    "checkpoint.every=2",
    "eval.every=1",
    "eval.tasks=2",
    "tracking.enabled=false",
)
PLANT = '''
"""A learner that forgets what the engine evicted: only it imports learner.batching."""
import importlib.abc, importlib.util, sys


class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "learner.batching":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            pack = module.pack

            def forgetful(logs, layout, **options):
                rows = pack(logs, layout, **options)
                rows.expiry.fill_(rows.expiry.shape[1])
                return rows

            module.pack = forgetful

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Planter())
'''


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_mismatch_stops_a_real_run_and_the_same_command_goes_on_once_it_is_mended(tmp_path):
    root = tmp_path / "out"
    settings = (*SETTINGS, f"run_root={root}")
    done = launch(*settings, "algorithm.steps=2")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    evaluated = [line for line in read_lines(journal_path(root, "rl")) if line.kind == "eval"]
    assert [line.step for line in evaluated] == [1, 2]
    for line in evaluated:
        # Both streams, at one version: the learner stood still for them.
        assert line.values["eval/oldest_version"] == line.values["eval/newest_version"] == line.step
        assert line.values["mismatch/learner_tokens"] > 20
        assert 0 <= line.values["mismatch/learner_mean"] <= line.values["mismatch/learner_max"] <= 3e-4
    kept = read_state(root / "checkpoints" / "rl" / "final")

    def stopped(where, *overrides, **more):
        failed = launch(*settings, "algorithm.steps=4", *overrides, **more)
        assert failed.returncode == 1, f"{failed.stdout}\n{failed.stderr}"
        found = re.search(r"^error: learner and engine disagree: .*", failed.stderr, re.MULTILINE)
        assert found, f"{failed.stdout}\n{failed.stderr}"
        said = found.group(0)
        assert re.search(rf"monitor\.max=\S+ \({where}", said), said
        assert re.search(
            r"First token that deviates: stream \S+, index \d+ \(id \d+, \w+, turn \d+, memory rcsm, weights version 2\): "
            r"sampled at log-prob -\S+, re-scored -",
            said,
        ), said
        assert [line.step for line in read_lines(journal_path(root, "rl")) if line.kind == "step"] == [1, 2]
        names = [path.name for path in (root / "checkpoints" / "rl").iterdir()]
        assert not [name for name in names if name.startswith("step000003")], names
        return said

    assert "monitor.max=1e-12 " in stopped("rollout worker 0", "monitor.max=1e-12")
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANT)
    assert "monitor.max=0.0003 " in stopped("learner", env={"PYTHONPATH": str(planted)})

    done = launch(*settings, "algorithm.steps=4")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [line.step for line in read_lines(journal_path(root, "rl")) if line.kind == "step"] == [1, 2, 3, 4]
    consumed = names_of(read_state(root / "checkpoints" / "rl" / "final"))
    assert {*names_of(kept)} < {*consumed}
    assert len(set(consumed)) == 8
