"""The object stores are compared with what they must hold, and what Ray spills from them is seen."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from conf.training import AlgorithmConfig
from runtime.planning.clip_cache import chunk_size
from runtime.planning.footprint import BYTES
from runtime.planning.object_store import NodeStore, StoreNeed, check_object_store, store_need
from runtime.planning.stream_size import StreamSize
from runtime.tracking.spilling import SpillWatch, spilled_bytes
from streams.log.record import BYTES_PER_TOKEN
from tests.support.configs import composed
from tests.support.geometries import THREE_B
from tests.support.project import ROOT

GIB = 2**30
NEED = StoreNeed("rl", version=6 * GIB, group=GIB, batch=4, alive=12, features=2 * GIB)
ALL = ("learner", "rollout worker 0", "rollout worker 1", "scorer")
STREAM = StreamSize(turns=10, video=64, text=40, fixed=20, tasks=3)


def told(size: float, actors=ALL, need=NEED):
    return check_object_store(need, [NodeStore("10.0.0.1", int(size * GIB), actors)])


def test_a_store_that_holds_everything_at_once_is_told_with_the_arithmetic():
    (line,) = told(26)
    assert line == (
        "object store of rl: 2 versions of the weights x 6.00 GiB + up to 12 groups x 1.00 GiB + features that are kept "
        "2.00 GiB; a step needs 4 of them: up to 26.00 GiB of 26.00 GiB on node 10.0.0.1 (learner, rollout worker 0, "
        "rollout worker 1, scorer)"
    )


def test_a_store_that_will_spill_is_warned_about_and_one_too_small_for_a_step_is_refused():
    (line,) = told(25.9)
    assert line.startswith("warning: object store of rl: ")
    assert "Ray will write some of it to disk" in line
    assert "algorithm.groups_in_flight" in line
    assert told(16)[0].startswith("warning: ")
    said = r"16\.00 GiB at once, but the object store has only 15\.90 GiB on node 10\.0\.0\.1"
    with pytest.raises(ValueError, match=said) as error:
        told(15.9)
    for way in ("--shm-size", "--object-store-memory", "algorithm.groups_per_step", "data.cache_mb", "learner.freeze"):
        assert way in str(error.value)


def test_a_node_of_workers_holds_its_share_and_one_of_the_learner_a_batch():
    workers = NodeStore("w", 12 * GIB + 4 * GIB * 3 // 4, ("rollout worker 0", "rollout worker 1", "rollout worker 2"))
    learner = NodeStore("l", 16 * GIB, ("learner", "rollout worker 3", "scorer"))
    assert (NEED.least(workers, 4), NEED.most(workers, 4)) == (15 * GIB, 12 * GIB + 9 * GIB + 3 * GIB // 2)
    assert (NEED.least(learner, 4), NEED.most(learner, 4)) == (16 * GIB, 12 * GIB + 4 * GIB + GIB // 2)
    assert len(check_object_store(NEED, [workers, learner])) == 2
    with pytest.raises(ValueError, match="on node w"):
        check_object_store(NEED, [dataclasses.replace(workers, size=15 * GIB - 1), learner])


def test_what_a_stage_needs_is_its_weights_its_longest_clip_and_its_logs():
    parameters = {"model.language_model.layers.0.mlp.up_proj.weight": 2048, "lm_head.weight": 512}
    geometry = dataclasses.replace(THREE_B, parameters=parameters)
    config = dataclasses.replace(composed(), algorithm=AlgorithmConfig(steps=1, groups_per_step=4, groups_in_flight=8))
    learner = config.learner.with_overrides({"freeze": "tower+merger"})
    need = store_need(config, geometry, learner, "rl", STREAM)
    clip = 10 * chunk_size(geometry, "features", config.model.dtype, config.data.video).nbytes
    assert need.group == clip + config.algorithm.group_size * BYTES_PER_TOKEN * STREAM.tokens
    assert (need.batch, need.alive) == (4, 8)
    assert need.features == min(config.data.cache_mb * 2**20, 3 * clip)
    assert need.version == (2048 + 512) * BYTES[config.model.dtype]
    frozen = learner.with_overrides({"freeze_names": ["model.language_model.layers.*"]})
    assert store_need(config, geometry, frozen, "rl", STREAM).version == 512 * BYTES[config.model.dtype]
    assert store_need(config, geometry, learner.with_overrides({"freeze": "none"}), "rl", STREAM).features == 0
    cold = store_need(config, geometry, learner, "sft", STREAM)
    assert (cold.version, cold.features, cold.batch) == (0, 0, config.sft.batch)
    (line,) = check_object_store(cold, [NodeStore("n", 2**50, ALL)])
    assert "demonstrations" in line
    assert "versions" not in line


PAGE = """# TYPE ray_spill_manager_objects_bytes gauge
ray_spill_manager_objects_bytes{Component="raylet",State="Pinned",Version="2.60.0"} 35655902.0
ray_spill_manager_objects_bytes{Component="raylet",State="Spilled",Version="2.60.0"} 1.5e+09
ray_spill_manager_objects{Component="raylet",State="Spilled"} 63.0
"""


def test_spilling_is_counted_and_warned_of_once(caplog):
    assert spilled_bytes(PAGE) == 1_500_000_000
    assert spilled_bytes("") == 0
    pages = iter([[], [PAGE], [PAGE, PAGE], [PAGE]])
    watch = SpillWatch(lambda: next(pages), every_s=3600)
    try:
        for _ in range(4):
            watch.look()
    finally:
        watch.close()
    assert watch.spilled == 3_000_000_000
    assert caplog.text.count("writes objects to disk, 1.40 GiB so far") == 1


SPILL = """
import os, time
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray, numpy as np
from runtime.tracking.spilling import SpillWatch
ray.init(address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20, logging_level="ERROR")
watch = SpillWatch(every_s=0.5)
kept = [ray.put(np.zeros(2 * 2**20, dtype=np.uint8)) for _ in range(80)]
give_up = time.monotonic() + 90
while not watch.spilled and time.monotonic() < give_up:
    time.sleep(0.5)
watch.close()
print(watch.spilled)
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_real_store_that_is_full_is_seen_to_spill():
    done = subprocess.run([sys.executable, "-c", SPILL], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 40 * 2**20, done.stderr
    assert done.stderr.count("writes objects to disk") == 1
