"""What several test modules share in this process.

A learner of one rank joins a process group in the process that runs it. DeepSpeed keeps the first one that it sees for
ever, so all such tests use one, and it stays until the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

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
    """Tests marked `cuda` skip by themselves where there is no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
