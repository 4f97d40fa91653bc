"""The version ledger: how many versions are alive, who fetches which, and who may work, over random orders of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.versions import VersionLedger

pytestmark = pytest.mark.smoke


def alive(ledger: VersionLedger) -> set[int]:
    """Published versions that somebody may still read: the newest, and those under way."""
    return {ledger.published, *ledger.fetching.values()}


@given(st.integers(1, 5), st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_in_any_order_of_events_two_versions_live_and_only_the_newest_is_fetched(workers, max_lag, data):
    ledger = VersionLedger(workers, max_lag)
    assert ledger.running == dict.fromkeys(range(workers), 0)
    lost: set[int] = set()
    for _ in range(data.draw(st.integers(1, 60), label="events")):
        action = data.draw(st.sampled_from(["publish", "fetch", "swap", "swap", "lose", "restore"]))
        before = dict(ledger.running)
        under_way = dict(ledger.fetching)
        if action == "publish":
            stale = any(version < ledger.published for version in ledger.fetching.values())
            assert ledger.may_publish() is not stale
            if not stale:
                ledger.publish(ledger.published + 1)
        elif action == "fetch":
            due = ledger.next_fetches()
            assert all(ledger.fetching[worker] == ledger.published for worker in due)
            assert due == [w for w in sorted(before) if w not in under_way and before[w] < ledger.published]
            assert under_way.items() <= ledger.fetching.items(), "a fetch under way is left alone"
        elif action == "lose":
            worker = data.draw(st.integers(0, workers - 1), label="lost")
            ledger.lose(worker)
            lost.add(worker)
            before.pop(worker, None)
            assert not ledger.may_work(worker, ledger.published)
        elif action == "restore":
            if lost:
                ledger.restore(worker := lost.pop(), data.draw(st.integers(0, ledger.published), label="version"))
                assert worker not in ledger.fetching
        elif ledger.fetching:
            worker = data.draw(st.sampled_from(sorted(ledger.fetching)), label="worker")
            version = ledger.fetching[worker]
            ledger.swapped(worker, version)
            assert worker not in ledger.fetching
            assert ledger.running[worker] == version
        assert len(alive(ledger)) <= 2
        assert all(ledger.running[w] >= before[w] for w in before), "no worker goes back"
        assert all(ledger.running[w] < version for w, version in ledger.fetching.items())
        for worker, running in ledger.running.items():
            assert ledger.may_work(worker, ledger.published) is (ledger.published - running <= max_lag)
        assert ledger.settled is all(version == ledger.published for version in ledger.running.values())


def test_a_worker_beyond_the_lag_gets_no_task_until_it_has_swapped():
    ledger = VersionLedger(workers=2, max_lag=1)
    ledger.publish(1)
    assert ledger.next_fetches() == [0, 1]
    ledger.swapped(0, 1)
    assert ledger.may_work(1, learner_version=1)
    assert not ledger.may_work(1, learner_version=2)
    assert ledger.may_work(0, learner_version=2)
    ledger.swapped(1, 1)
    assert ledger.may_work(1, learner_version=2)


def test_a_worker_that_fetches_is_not_sent_for_the_next_version_before_it_has_swapped():
    ledger = VersionLedger(workers=2, max_lag=1)
    ledger.publish(1)
    ledger.next_fetches()
    ledger.swapped(0, 1)
    ledger.publish(2)
    assert ledger.next_fetches() == [0]
    assert ledger.fetching == {0: 2, 1: 1}
    ledger.swapped(1, 1)
    # Straight to the newest one.
    assert ledger.next_fetches() == [1]
    assert ledger.fetching == {0: 2, 1: 2}


def test_a_third_living_version_is_refused():
    ledger = VersionLedger(workers=1, max_lag=3)
    ledger.publish(1)
    ledger.next_fetches()
    ledger.publish(2)
    assert alive(ledger) == {1, 2}
    assert not ledger.may_publish()
    with pytest.raises(AssertionError, match="a third version would be alive"):
        ledger.publish(3)
    ledger.swapped(0, 1)
    ledger.publish(3)
    assert alive(ledger) == {3}


def test_versions_only_grow():
    ledger = VersionLedger(workers=1, max_lag=0)
    ledger.publish(4)
    for version in (4, 3):
        with pytest.raises(AssertionError, match="versions only grow"):
            ledger.publish(version)
