"""Which scorer computes the rewards of which streams, and what happens to those that end one. Pure: it calls no actor.

A request's streams go out in calls, to whichever scorer is free, so the least loaded one is always the next. When a scorer
dies with a call, or has to be ended, one of the streams in it may be the cause: each of them is asked again by itself, so that
a second death names the stream, and the others lose nothing.

Invariants:
* every stream of a request gets exactly one result, whichever scorers die and when;
* a scorer has one call at a time, so a death is that call's, and a call's time is its own;
* a stream is asked again of another scorer where there is one, and given up if that one dies of it as well;
* a scorer that died before it began with a call costs no stream anything;
* given-up streams of MOST_GROUPS groups, with no result between them, end the run with the first cause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from rewards.compose import RewardResult
from streams.data.dataset import at_row
from streams.messages import RewardJob

MOST_GROUPS = 8
"""A group, or a held-out stream, that is given up costs its scorers' time only; so many in a row are not the groups' fault."""

Results = list[tuple[RewardResult, ...]]
"""For each job, one result per stream."""


class GivenUp:
    """The groups whose streams were given up since a scorer's last result. One for all desks of a session."""

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}

    def result(self) -> None:
        """Note that a scorer has replied: rewards can be computed."""
        self._groups.clear()

    def add(self, group: str, cause: str) -> None:
        """Note a stream that was given up. Raises RuntimeError after those of MOST_GROUPS groups."""
        self._groups.setdefault(group, cause)
        if len(self._groups) >= MOST_GROUPS:
            first = next(iter(self._groups.values()))
            raise RuntimeError(
                f"the rewards of {len(self._groups)} groups in a row ended every scorer that was to compute them; the first: "
                f"{first}. Nothing can be scored: fix the reward"
            )


@dataclass(eq=False)
class _Request:
    """what: whose rewards these are. handle: gets the results. left: streams without one."""

    jobs: tuple[RewardJob, ...]
    what: str
    handle: Callable[[Results], None]
    results: list[list[RewardResult | None]]
    left: int


@dataclass(frozen=True, eq=False)
class _Stream:
    """One stream of a request, by the indices of its job and of the stream in it."""

    request: _Request
    job: int
    index: int


@dataclass(frozen=True, eq=False)
class Call:
    """Streams that one scorer is to compute.

    Attributes:
        place: which scorer.
        alone: it is one stream that may be what ended a scorer before, asked again.
        avoid: the place of that scorer.
    """

    streams: tuple[_Stream, ...]
    place: int = -1
    alone: bool = False
    avoid: int | None = None

    @property
    def what(self) -> str:
        """Whose rewards these are, in words."""
        return self.streams[0].request.what

    @property
    def jobs(self) -> tuple[RewardJob, ...]:
        """The message: one job per stream, in the order of `streams`."""
        jobs = []
        for stream in self.streams:
            job = stream.request.jobs[stream.job]
            jobs.append(replace(job, turns=(job.turns[stream.index],)))
        return tuple(jobs)


class Desk:
    """Hands calls to `places` scorers. Whoever has it sends what `next` returns, and reports what became of it."""

    def __init__(
        self, places: int, per_call: int, give_up: Callable[[RewardJob, str], RewardResult], given_up: GivenUp
    ) -> None:
        """per_call: streams of a call, at most. give_up: returns the failed result of a job of one stream, with its cause."""
        self._places, self._per_call, self._give_up, self._given_up = places, per_call, give_up, given_up
        self._free = set(range(places))
        self._waiting: deque[Call] = deque()

    def ask(self, jobs: Sequence[RewardJob], what: str, handle: Callable[[Results], None]) -> None:
        """Have the rewards of `jobs` computed; what: whose they are. `handle` gets them when the last one is there."""
        streams_of = [len(job.turns) for job in jobs]
        results: list[list[RewardResult | None]] = [[None] * count for count in streams_of]
        request = _Request(tuple(jobs), what, handle, results, sum(streams_of))
        streams = [_Stream(request, job, index) for job, count in enumerate(streams_of) for index in range(count)]
        for begin in range(0, len(streams), self._per_call):
            self._waiting.append(Call(tuple(streams[begin : begin + self._per_call])))
        if not streams:
            handle([() for _ in jobs])

    def next(self, absent: Collection[int] = ()) -> Call | None:
        """Return a call to send now; None while no scorer is free for any that waits.

        absent: places that get none, unless these are all.
        """
        there = set(range(self._places)).difference(absent) or set(range(self._places))
        for number, call in enumerate(self._waiting):
            # With a single scorer it is the process that took the place of the one that died.
            places = [p for p in sorted(self._free & there) if p != call.avoid or len(there) == 1]
            if places:
                del self._waiting[number]
                self._free.remove(places[0])
                return replace(call, place=places[0])
        return None

    def answered(self, call: Call, results: Sequence[RewardResult]) -> None:
        """Note the results of a call, one per stream."""
        self._free.add(call.place)
        self._given_up.result()
        for stream, result in zip(call.streams, results, strict=True):
            self._settle(stream, result)

    def lost(self, call: Call, cause: str, *, begun: bool) -> None:
        """Note that the scorer died. begun: with the call; it may have been dead before. cause: words.

        Raises RuntimeError if nothing can be scored.
        """
        self._free.add(call.place)
        if not begun:
            self._waiting.appendleft(call)
            return
        if not call.alone:
            # At the end: who may end the next scorer as well must not keep the others waiting.
            self._waiting.extend(Call((stream,), alone=True, avoid=call.place) for stream in call.streams)
            return
        (stream,), (job,) = call.streams, call.jobs
        words = f"stream {job.task.id}: the second scorer died while it computed this reward: {cause}{at_row(job.task)}"
        self._settle(stream, self._give_up(job, words))
        self._given_up.add(job.group, words)

    def _settle(self, stream: _Stream, result: RewardResult) -> None:
        request = stream.request
        assert request.results[stream.job][stream.index] is None, "a stream has one result"
        request.results[stream.job][stream.index] = result
        request.left -= 1
        if not request.left:
            request.handle([tuple(r for r in row if r is not None) for row in request.results])
