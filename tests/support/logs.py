"""Comparison of logs field by field, and a disk that is full while they are written."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from streams.log.record import StreamLog
from streams.positions.regions import RegionLog


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Keep every file of this process from growing beyond `size` bytes: the nearest thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_same_log(got: StreamLog | RegionLog, wanted: StreamLog | RegionLog) -> None:
    """Assert that two logs are equal field by field, dtypes and shapes included."""
    for field in dataclasses.fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(b, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        elif isinstance(b, RegionLog):
            assert_same_log(a, b)
        else:
            assert a == b, field.name
