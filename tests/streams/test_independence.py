"""Property: a stream's tokens and scores do not depend on what runs beside it or is packed with it, on both backbones."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.scoring.logprobs import score_rows
from streams.scoring.packing import pack
from tests.support.strategies import ANY_MEMORY, watched
from tests.support.streams import FP64_BAR, joined_features, run


@st.composite
def groups(draw, backbone):
    """Two or three streams, each under a memory of its own."""
    return [draw(watched(backbone, ANY_MEMORY, str(i), turns=5))[1] for i in range(draw(st.integers(2, 3)))]


@st.composite
def packings(draw, count):
    """Rows that hold each of `count` streams once, in any order."""
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.sets(st.integers(1, count - 1))))
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


@given(data=st.data())
@settings(max_examples=8)
def test_tokens_do_not_depend_on_the_batch(fp64, data):
    requests = data.draw(groups(fp64))
    order = data.draw(st.permutations(range(len(requests))))
    # Streams that wait for a place begin in another step.
    mixed = run(fp64, [requests[i] for i in order], max_streams=data.draw(st.integers(1, len(requests))))
    for i, among in zip(order, mixed, strict=True):
        (alone,) = run(fp64, [requests[i]])
        for column in ("ids", "kind", "lane", "expiry", "positions"):
            assert (getattr(alone, column) == getattr(among, column)).all(), column
        np.testing.assert_allclose(alone.behaviour_logp, among.behaviour_logp, atol=FP64_BAR)


@given(data=st.data())
@settings(max_examples=8)
def test_packed_streams_score_as_each_alone(fp64, data):
    requests = data.draw(groups(fp64))
    logs = run(fp64, requests)
    packing = data.draw(packings(len(logs)))
    rows = pack(logs, packing, which="sampled")
    with torch.no_grad():
        scores = score_rows(fp64, rows, torch.cat([joined_features(r) for r in requests]))
        for i, (log, stream) in enumerate(zip(logs, requests, strict=True)):
            single = score_rows(fp64, pack([log], [[0]], which="sampled"), joined_features(stream))
            mine = rows.stream == i
            assert int(mine.sum()) == int(log.sampled.sum()) > 0
            for packed, alone in ((scores.logp, single.logp), (scores.entropy, single.entropy)):
                torch.testing.assert_close(packed[mine], alone, atol=FP64_BAR, rtol=0)
