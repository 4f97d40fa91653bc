"""What crosses a process boundary has a version: it changes whenever a field does, also one of a record inside a message."""

from __future__ import annotations

import dataclasses
import hashlib
import typing

import pytest

from learner import messages as learner_messages
from learner import setup as learner_setup
from rollout import setup as rollout_setup
from streams import messages
from streams.layout.layout import LayoutConfig
from streams.log.record import ChunkRecord, LogHeader, StreamLog
from streams.memory import MemoryConfig
from streams.positions.regions import RegionLog

pytestmark = pytest.mark.smoke

FIELDS = {15: "ab55ccd09fe1e790"}
"""Version -> digest of the fields of everything that is sent. On a change: a new version, and its digest alone."""


def reachable(hint: object, found: set[type]) -> set[type]:
    """The dataclasses that a type hint names, and those in their fields."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
        found.add(hint)
        for inner in typing.get_type_hints(hint).values():
            reachable(inner, found)
    for inner in typing.get_args(hint):
        reachable(inner, found)
    return found


def sent() -> set[type]:
    found: set[type] = set()
    for module in (messages, rollout_setup, learner_messages, learner_setup):
        for value in vars(module).values():
            reachable(value, found)
    return found


def digest(kinds: set[type]) -> str:
    lines = [f"{k.__module__}.{k.__qualname__}.{f.name}: {f.type}" for k in kinds for f in dataclasses.fields(k)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def test_the_version_changes_with_any_field():
    assert {messages.MESSAGES_VERSION: digest(sent())} == FIELDS


def test_records_inside_of_messages_count():
    assert {StreamLog, LogHeader, ChunkRecord, RegionLog, MemoryConfig, LayoutConfig} <= sent()
    fewer = dataclasses.make_dataclass("RegionLog", ["token"], namespace={"__module__": RegionLog.__module__})
    assert digest({RegionLog}) != digest({fewer})
