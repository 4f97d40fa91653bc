"""Property: whatever is shown or asked later changes nothing before it, under every policy, on both backbones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.writing.writer import QueryInput
from tests.support.strategies import EVERY_MEMORY, for_backbone, layouts
from tests.support.streams import FP64_BAR, differences, random_turns, request, run


def other_frames(stream, turn, backbone):
    """The same stream with other frames from `turn` on."""
    before = sum(shown.chunk is not None for shown in stream.turns[:turn])
    generator = torch.Generator().manual_seed(before)
    other = [torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in stream.features[before:]]
    return dataclasses.replace(stream, features=(*stream.features[:before], *other))


def other_queries(stream, turn, backbone):
    """The same stream with a query where there was none, and none where there was one, from `turn` on."""
    query = QueryInput(tuple(backbone.layout.query_ids("yes?")))
    later = [dataclasses.replace(shown, query=None if shown.query else query) for shown in stream.turns[turn:]]
    return dataclasses.replace(stream, turns=(*stream.turns[:turn], *later))


@pytest.mark.parametrize("name", sorted(EVERY_MEMORY))
@given(data=st.data())
@settings(max_examples=4)
def test_the_future_changes_nothing_before_it(fp64, name, data):
    memory = for_backbone(data.draw(EVERY_MEMORY[name]), fp64)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(2, 6))
    cut = data.draw(st.integers(1, count - 1))
    layout = data.draw(layouts(fp64))
    turns = random_turns(fp64, rng, count)
    stream = dataclasses.replace(request(fp64, memory, turns, "s", feature_seed=1), layout=layout)
    change = data.draw(st.sampled_from([other_frames, other_queries]))
    if change is other_frames and not any(shown.chunk for shown in turns[cut:]):
        change = other_queries
    streams = [stream, change(stream, cut, fp64)]
    # One after the other: side by side they would share rounding.
    first, second = (run(fp64, [s])[0] for s in streams)
    until = int(np.flatnonzero(first.turn == cut)[0])
    assert until == int(np.flatnonzero(second.turn == cut)[0])
    assert (first.ids[:until] == second.ids[:until]).all()
    assert (np.minimum(first.expiry, until)[:until] == np.minimum(second.expiry, until)[:until]).all()
    np.testing.assert_allclose(first.behaviour_logp[:until], second.behaviour_logp[:until], atol=FP64_BAR)
    assert not np.array_equal(first.behaviour_logp[until:], second.behaviour_logp[until:], equal_nan=True), (
        "the future must really differ"
    )
    # The learner's: what the two futures are scored with leaves their common past where it was sampled.
    assert differences(fp64, [first, second], streams).max() <= FP64_BAR
