"""Configurations as the command line composes them, and one of a trained checkpoint."""

from __future__ import annotations

import dataclasses

from hydra import compose, initialize_config_dir

from conf.schema import MemoryConfig, RunConfig, load_config, register_schema
from rewards import RewardConfig
from streams.layout.layout import LayoutConfig
from streams.video.config import VideoConfig
from tests.support.project import ROOT

register_schema()


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load_config(compose("config", overrides=list(overrides)))


def reward_preset(name: str) -> RewardConfig:
    """Return the reward of `reward=NAME`."""
    return composed(f"reward={name}").reward


VIDEO = VideoConfig(chunk_seconds=0.5, frames_per_chunk=4, min_pixels=784, max_pixels=1568)


def trained():
    base = RunConfig(memory=MemoryConfig("rcsm", 4), layout=LayoutConfig("Watch.", 6, 10))
    return dataclasses.replace(base, data=dataclasses.replace(base.data, video=VIDEO))
