"""Presets of the configuration as a run gets them: composed by Hydra from the YAML files, then validated."""

from hydra import compose, initialize_config_dir

from conf.schema import RunConfig, load_config, register_schema
from rewards import RewardConfig
from tests.support.project import ROOT


def composed(*overrides: str) -> RunConfig:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load_config(compose("config", overrides=list(overrides)))


def reward_preset(name: str) -> RewardConfig:
    """The reward of `reward=NAME`."""
    return composed(f"reward={name}").reward
