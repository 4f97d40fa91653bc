"""What launch.py asks before anything starts, for a configuration alone."""

from __future__ import annotations

from conf.schema import RunConfig
from runtime import checks
from runtime.checks import Rows
from runtime.starting_point import StartingPoint


def check_inputs(config: RunConfig) -> Rows:
    return checks.check_inputs(config, StartingPoint.of(config))


def check_memory_policy(config: RunConfig) -> None:
    checks.check_memory_policy(config, StartingPoint.of(config))


def describe(config: RunConfig) -> list[str]:
    return checks.describe(config, StartingPoint.of(config))
