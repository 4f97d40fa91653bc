"""Rollout workers and scorers that die while a stage runs: another process takes their place.

Neither has anything that cannot be made again: a worker loads the stage's checkpoint and fetches the newest weights, and what
it had under way is asked for again by those who asked before (a scorer's: `runtime.scoring`). A learner's death ends the
stage's attempt (`runtime.recovery.restarts`).

Invariants:
* a process is replaced once, however many calls it leaves without a reply, and ended before it is;
* one that dies MOST_DEATHS times in a row before it has done anything ends the run, with the cause of the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rollout.setup import WorkerInfo, WorkerSetup
from runtime.cluster.events import ActorDeath, InVain, first_line
from runtime.cluster.session import Session


def deaths_in_words(deaths: dict[str, int]) -> str:
    """Return what to add to a stage's last line; empty if nobody died."""
    if not deaths:
        return ""
    named = ", ".join(f"{name} {count}" for name, count in sorted(deaths.items()))
    return f"; {sum(deaths.values())} processes died and were replaced ({named})"


class Revival:
    """The actors of one stage that may come and go.

    Attributes:
        deaths: how many processes were replaced, by the actor's short name.
        loading: workers whose new process is not ready yet.
    """

    def __init__(
        self,
        session: Session,
        expect: Callable[..., None],
        say: Callable[[str], None],
        newest: Callable[[WorkerSetup], WorkerSetup],
        deaths: Counter[str],
    ) -> None:
        """expect: `Events.expect` of the stage. say: tells the user, a line each.

        newest: returns the setup with a checkpoint of the stage that is still there. deaths: those until now, by the actor's
        short name.
        """
        self._session, self._expect, self._say, self._newest = session, expect, say, newest
        self._gone: set[str] = set()  # ids of the processes that are known to be dead
        self._in_vain = InVain()
        self._lost: list[Callable[[int], object]] = []
        self._back: list[Callable[[int, int], None]] = []
        self.deaths = deaths
        self.loading: set[int] = set()

    def watch(self, lost: Callable[[int], object], back: Callable[[int, int], None]) -> None:
        """Have others told: lost(worker) when its process has died, back(worker, version) when another one has loaded."""
        self._lost.append(lost)
        self._back.append(back)

    def alive(self, name: str) -> None:
        """Note that a worker has done something."""
        self._in_vain.alive(name)

    def died(self, death: ActorDeath) -> None:
        """Replace the process. Raises RuntimeError for an actor that cannot be, and for one that dies over and over."""
        book, error, scorers = self._session.book, death.error, self._session.crew.scorers
        name = book.name_of(error)
        if not name.startswith("rollout-") and name not in scorers.names:
            raise RuntimeError(f"an actor died during {death.what}: {book.explain(error)}") from error
        if error.actor_id in self._gone:
            return
        self._gone.add(str(error.actor_id))
        words = book.explain(error)
        self.deaths[name] += 1
        if name in scorers.names:
            scorers.died(name, words, death)
        else:
            self._in_vain.died(name, words, death)
        self._say(f"{first_line(words)}; another process takes its place, its work is done again")
        if name in scorers.names:
            return
        worker = int(name.removeprefix("rollout-"))
        self.loading.add(worker)
        for tell in self._lost:
            tell(worker)
        self._session.crew.replace_worker(worker)
        self._load(worker)

    def _load(self, worker: int) -> None:
        crew = self._session.crew
        assert crew.setup is not None, "a stage runs"
        setup = self._newest(crew.setup)
        self._expect(
            crew.workers[worker].setup.remote(setup),
            f"rollout-{worker} to load {setup.checkpoint} in place of one that died",
            lambda info: self._loaded(worker, setup.version, info),
            lambda error: self._failed(worker, setup, error),
        )

    def _failed(self, worker: int, setup: WorkerSetup, error: Exception) -> None:
        if Path(setup.checkpoint).is_dir():
            raise error
        # Newer ones took its place while the worker was about to read it.
        self._load(worker)

    def _loaded(self, worker: int, version: int, info: WorkerInfo) -> None:
        self.loading.discard(worker)
        self._say(f"rollout-{worker} is there again (pid {info.pid}, node {info.node})")
        for tell in self._back:
            tell(worker, version)
