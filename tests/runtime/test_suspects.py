"""Work that ends its workers is found and given up, and nothing else is, in any order of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.recovery.suspects import MOST_ALONE, Suspects


@given(st.integers(1, 3), st.integers(1, 8), st.data())
@settings(max_examples=200, deadline=None)
def test_what_ends_its_workers_is_condemned_and_nothing_else_whoever_dies_meanwhile(workers, count, data):
    names = [f"0/{i}" for i in range(count)]
    poison = data.draw(st.sets(st.sampled_from(names)), label="poison")
    suspects = Suspects()
    open_, over, given_up = list(names), [], []
    there: dict[int, list[str]] = {worker: [] for worker in range(workers)}
    outside, inside = 0, 0
    while open_ or any(there.values()):
        # The oldest goes first, as in a dispatcher, to any worker that may take it.
        free = [w for w in there if open_ and suspects.may_take(w, open_[0])]
        busy = [w for w in there if there[w]]
        assert free or busy, "somebody can always go on"
        if free and (not busy or data.draw(st.booleans(), label="send")):
            worker = data.draw(st.sampled_from(free))
            suspects.sent(worker, open_[0])
            there[worker].append(open_.pop(0))
            continue
        worker = data.draw(st.sampled_from(busy))
        fatal = poison & set(there[worker])
        if not fatal and outside < 6 and data.draw(st.integers(0, 3), label="outside") == 0:
            outside += 1
            suspects.died(worker, None)
        elif fatal:
            inside += 1
            suspects.died(worker, "it crashed")
        else:
            name = there[worker].pop(data.draw(st.integers(0, len(there[worker]) - 1)))
            suspects.over(worker, name)
            over.append(name)
            continue
        for name in there[worker]:
            if suspects.condemned(name) is None:
                open_.append(name)
            else:
                given_up.append(name)
        open_.sort()
        there[worker] = []
    assert sorted(over) == sorted(set(names) - poison), "everything sound is done once"
    assert sorted(given_up) == sorted(poison)
    assert inside <= (MOST_ALONE + 1) * len(poison), "each ends at most one beside others"


def test_a_death_that_turns_out_to_be_for_lack_of_memory_counts_after_all():
    suspects = Suspects()
    for _ in range(MOST_ALONE):
        suspects.sent(0, "a")
        suspects.died(0, None)
        assert suspects.condemned("a") is None
        suspects.blame_last(0, "out of memory")
        suspects.blame_last(0, "out of memory")  # it is counted once
    assert suspects.condemned("a") == "it ended the workers that had it alone, 2 times: out of memory"
