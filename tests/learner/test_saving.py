"""Checkpoints beside training: copies that nothing changes any more, and one writer."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.saving import BackgroundWriter, HostCopies
from learner.setup import LearnerSetup
from runtime.planning.footprint import checkpoint_copy, trained_numbers
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.model_shape import ModelGeometry
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import GroupPayload
from tests.support.held_bytes import HeldBytes
from tests.support.learner import GRPO, even
from tests.support.streams import joined_features, random_turns, request, run

WAIT_S = 60.0


def test_a_copy_is_that_of_its_moment_and_shares_nothing_with_what_trains():
    flat = torch.arange(12.0)
    parameter = torch.nn.Parameter(flat[:6].view(2, 3))
    state = {"module": {"a": flat[:6].view(2, 3), "b": parameter}, "steps": [1, {"moment": flat[6:]}], "shape": (2, 3)}
    copied = HostCopies().within(state)
    state["steps"].append(2)
    with torch.no_grad():
        flat.zero_()
    assert copied["module"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["module"]["b"] is copied["module"]["a"], "one place, one copy"
    assert copied["steps"][0] == 1
    assert len(copied["steps"]) == 2
    assert copied["steps"][1]["moment"].tolist() == [6, 7, 8, 9, 10, 11]
    assert copied["module"]["a"].untyped_storage().nbytes() == 24, "no more than the part that was asked for"
    assert copied["shape"] == (2, 3)


def test_memory_that_another_tensor_gets_meanwhile_is_not_taken_for_the_first():
    copies = HostCopies()
    for value in range(20):
        assert copies.of(torch.full((1000,), float(value)))[0] == value


def test_one_thing_is_written_at_a_time_and_its_error_is_told():
    writer, go_on = BackgroundWriter(), threading.Event()
    assert writer.problem() is None
    first = writer.start(lambda: [go_on.wait(WAIT_S)][0] or None)
    assert "is still being written" in str(writer.problem())
    with pytest.raises(AssertionError):
        writer.start(print)
    go_on.set()
    first.result(WAIT_S)
    assert writer.problem() is None

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        writer.start(full).result(WAIT_S)
    writer.start(lambda: None).result(WAIT_S)


def item(path, dtype):
    """A group of one stream."""
    backbone = Backbone.load(path, LayoutConfig(), dtype=dtype)
    made = request(backbone, MemoryConfig("rcsm", 2), random_turns(backbone, np.random.default_rng(0), 3), "s")
    features = joined_features(made)[None].to(backbone.dtype)
    return even(GroupPayload(tuple(run(backbone, [made])), "features", to_array(features)), (1.0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"zero_stage": 1},
        {"zero_stage": 0},
        {"zero_stage": 1, "dtype": "bfloat16"},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 1, "resumable": False},
    ],
    ids=str,
)
def test_the_copy_is_within_5_percent_of_the_estimate_and_gone_once_it_is_written(tmp_path, ranks, values):
    resumable = values.pop("resumable", True)
    config = LearnerConfig(freeze="tower+merger", **values)
    dtype = getattr(torch, config.dtype)
    build_tiny(tmp_path / "model", TinySpec(hidden=128, mlp=512, layers=3, vocab_rows=2048), dtype=dtype)
    geometry = ModelGeometry.read(tmp_path / "model")
    learner = LearnerEngine(LearnerSetup(str(tmp_path / "model"), LayoutConfig(), config, 2, 0), ranks)
    learner.train(0, GRPO, [item(tmp_path / "model", dtype)])  # the optimiser has no moments before
    started, go_on = threading.Event(), threading.Event()
    write = learner.backbone.save

    def held_back(*given):
        started.set()
        assert go_on.wait(WAIT_S)
        write(*given)

    learner.backbone.save = held_back
    gc.collect()
    with HeldBytes() as held:
        held.ignore(found for found in gc.get_objects() if isinstance(found, torch.Tensor))
        written = learner.save(tmp_path / "saved", {}, resumable=resumable)
        assert started.wait(WAIT_S)
        copied = held.now
    said = checkpoint_copy(geometry, config, trained_numbers(geometry, config), resumable=resumable)
    assert copied == pytest.approx(said, rel=0.05), (copied, said)
    go_on.set()
    written.result(WAIT_S)
    assert held.now < copied / 20
    assert (tmp_path / "saved" / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "saved" / "deepspeed").is_dir() == resumable
    learner.close()
