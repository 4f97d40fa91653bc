"""The endless benchmark in small: what an old stream holds is what a young one holds. Its times are measured, not tested."""

from __future__ import annotations

import pytest

from benchmarks.endless import MEMORIES, measure, missed


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MEMORIES))
def test_an_old_stream_holds_what_a_young_one_does(name, tmp_path):
    row = measure(name, 400, tmp_path, piece_tokens=300)
    assert missed(row, timed=False) == []
    assert row["turns"] == 400
    assert row["pieces"] >= 20
    assert row["turn_history_bytes"] <= 2 * 24 * 400, "24 bytes a turn, and room to grow"


def test_a_stream_that_grows_misses_its_bars():
    row = {
        "policy": "some",
        "kv_slots_min": 300,
        "kv_slots_max": 301,
        "query_slots_max": {"early": 11, "late": 33},
        "host_bytes_max": {"early": 1000, "late": 2001},
        "memory": {"early": {"rss": 1000, "objects": 100}, "late": {"rss": 1021, "objects": 103}},
        "ratio": 1.11,
        "log_tokens": 1000,
        "evicted_tokens": 500,
        "slots_back": False,
    }
    assert len(missed(row, timed=False)) == 5
    assert len(missed(row)) == 8
    assert "some: an old turn takes another time than a young one" in missed({**row, "ratio": float("nan")})
    even = {
        **row,
        "kv_slots_max": 300,
        "query_slots_max": {"early": 11, "late": 22},
        "host_bytes_max": {"early": 1000, "late": 2000},
        "memory": {"early": {"rss": 1000, "objects": 100}, "late": {"rss": 1020, "objects": 102}},
        "ratio": 0.91,
        "evicted_tokens": 501,
        "slots_back": True,
    }
    assert missed(even) == []
