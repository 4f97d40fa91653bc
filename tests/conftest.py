"""What several test modules share in this process.

A learner of one rank joins a process group in the process that runs it. DeepSpeed keeps the first one that it sees for
ever, so all such tests use one, and it stays until the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The machine is shared: how long one example took says nothing about the code.
settings.register_profile("sightline", deadline=None)
settings.load_profile("sightline")


@pytest.fixture(scope="module")
def learner_process() -> Iterator[None]:
    """The learner sets its process up for itself (environment, threads); later modules must not find that."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_rank():
    """The lone learner rank of this process."""
    from learner.parallel.ranks import Ranks
    from learner.setup import RankPlace

    ranks = Ranks(RankPlace())
    yield ranks
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(learner_process, one_rank):
    return one_rank


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where there is no device; begin with the files that may take longest."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    longest: dict[Path, float] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0.0), _may_take(item))
    # Stable: files of one length, and the tests of a file, stay in their order.
    items.sort(key=lambda item: -longest[item.path])


def _may_take(item: pytest.Item) -> float:
    """Seconds: the timeout of a slow test, or its default; nothing for a quick one."""
    if item.get_closest_marker("slow") is None or item.get_closest_marker("skip") is not None:
        return 0.0
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0] if limit else item.config.getini("timeout"))
