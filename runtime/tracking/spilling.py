"""Counts what Ray's object stores write to disk for want of room, and warns once.

The source is each node's page of metrics (`MetricsExportPort` in `ray.nodes()`), which Ray documents. Nothing is asked of the
actors, and a page that cannot be read is left out: a run does not depend on it.

Invariants:
* looking never holds the run up: it is done in a thread of its own, now and then.
"""

from __future__ import annotations

import logging
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable

import ray
from ray.exceptions import RayError

from runtime.planning.footprint import gib

EVERY_S = 30.0
ANSWER_S = 2.0
SPILLED = re.compile(r'^ray_spill_manager_objects_bytes\{[^}]*State="Spilled"[^}]*\} (\S+)$', re.MULTILINE)

log = logging.getLogger("sightline.cluster")


class SpillWatch:
    """Looks until it is closed. spilled: the most bytes that lay on disk at once, as far as was seen."""

    def __init__(self, pages: Callable[[], Iterable[str]] | None = None, every_s: float = EVERY_S) -> None:
        """pages: returns the pages of metrics of all nodes."""
        self.spilled = 0
        self._pages, self._every_s = pages or _pages, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="spill watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more. Call it before Ray is shut down."""
        self._over.set()
        self._thread.join(timeout=2 * ANSWER_S)

    def _work(self) -> None:
        while not self._over.wait(self._every_s):
            self.look()

    def look(self) -> None:
        """Read all pages once."""
        spilled = sum(map(spilled_bytes, self._pages()))
        if spilled and not self.spilled:
            log.warning(
                "Ray has no room left in its object store and writes objects to disk, %s so far: the run goes on, but more "
                "slowly. The start says what the store must hold, and how to give it more or need less",
                gib(spilled),
            )
        self.spilled = max(self.spilled, spilled)


def spilled_bytes(page: str) -> int:
    """Return how many bytes of objects a node has on disk, by its page of metrics."""
    return int(sum(float(value) for value in SPILLED.findall(page)))


def _pages() -> list[str]:
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]
    except (RayError, RuntimeError, ConnectionError):  # Ray is gone, or going
        return []
    pages = []
    for node in nodes:
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(address, timeout=ANSWER_S) as answer:
                pages.append(answer.read().decode(errors="replace"))
        except OSError as error:
            log.debug("%s cannot be read: %s", address, error)
    return pages
