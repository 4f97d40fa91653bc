"""One run at a time in a run_root: a kernel lock where there is one, a lease on the lock file everywhere else.

`run_root/.lock` contains the holder (host, boot, pid, start, command, a token of this very attempt); empty = free. The
holder touches the file every BEAT_S. A release empties it and never removes it.

To acquire: (1) take the kernel's lock (`flock`); blocked = busy. (2) Read the holder H. If it is on another machine, or if
there are no kernel locks, watch the file for STALE_S: touched or rewritten = busy, emptied or untouched = go on. (3) Write
oneself. (4) Without kernel locks, wait CLAIM_S and read again: another's token = busy.

Invariants:
* on one machine, a killed holder is replaced at once and a living one never;
* elsewhere, a holder that beats is never replaced, and one that has not for STALE_S is;
* a holder that was replaced all the same notices within one beat, and `check` then stops its run.

Proof. Kernel locks, one machine: `flock` admits one process and ends with it. A holder of the same boot that is named in
the file while we have the lock is dead, so nothing is waited for.

Kernel locks, several machines: the lock may have been lost while its holder lives (a server that restarted), so it is not
trusted alone. A living holder touches the file BEAT_S < STALE_S apart, so step 2 sees it. Among those that pass step 2
the lock admits one.

No kernel locks: let A and B both pass step 2, and A write before B. B's last look at the file came before A's write, or B
would have seen A's token or a new mtime (busy). B writes at most POLL_S after that look, hence less than CLAIM_S after
A's write, and step 4 shows A the token of B: A is busy. The last writer alone keeps its token, so one is left. This
assumes that no process stalls for CLAIM_S - POLL_S between its look and its write, and that a write is visible to others
by then.

Where an assumption fails (a process frozen for STALE_S or in the wrong moment), two may run: the beat of the one that is no
longer named in the file reads the other's token, and it stops at its next `check`. It does not empty the file, which is the
other's.

No clocks are compared: staleness is a change of mtime, timed by the waiter's own monotonic clock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from streams.support.redact import redact

BEAT_S = 5.0
STALE_S = 30.0
"""Seconds without a beat after which a holder that the kernel cannot vouch for counts as dead."""
CLAIM_S = 2.0
"""Seconds between a claim and the check that nobody wrote after it, where kernel locks do not work."""
POLL_S = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger("sightline.runlock")


class RunRootBusyError(ValueError):
    """Raised where another run works in the run_root."""


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock. machine: id of the host's boot, as host names repeat. token: unique per attempt."""

    host: str
    machine: str
    pid: int
    started: str
    command: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        command = redact(" ".join(sys.argv))[:300]
        return cls(socket.gethostname(), _machine(), os.getpid(), started, command, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, started {self.started} ({self.command})"


class RunLock:
    """The lock of one run_root: `with RunLock(root): ...`. Raises RunRootBusyError that names the holder, if there is one.

    taken_over: the holder that ended without releasing the lock; None if it was free.
    """

    def __init__(self, root: Path, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.path = root / ".lock"
        self.holder = Holder.this_process()
        self.taken_over: Holder | None = None
        self._beat_s, self._stale_s = beat_s, stale_s
        self._lost = False
        self._done = threading.Event()
        self._descriptor: int | None = None
        self._beats = threading.Thread(target=self._beat, name="runlock", daemon=True)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not inherited by children: one that outlives the driver must not keep the lock.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"run_root={self.path.parent} cannot be written ({error.strerror}): choose another, or mend it",
            ) from error
        try:
            locks_work = self._lock()
            previous = _read(self.path)
            if previous is not None and not (locks_work and previous.machine == self.holder.machine):
                self._wait_until_stale(previous)
            self._write()
            if not locks_work:
                self._await_claim()
        except BaseException:
            self._close()
            raise
        self.taken_over = previous
        if previous is not None:
            log.warning(
                "run_root %s: taking over from a run that ended without saying so, %s", self.path.parent, previous
            )
        self._beats.start()
        return self

    def look(self) -> Holder | None:
        """Take nothing. Returns a holder that ended without saying so. Raises RunRootBusyError if another run works there.

        The kernel is not asked: whoever starts in that moment would find the lock taken.
        """
        previous = _read(self.path)
        if previous is not None:
            self._wait_until_stale(previous)
        return previous

    def release(self) -> None:
        """Free the lock; the file stays, empty: removing it would race with whoever opens it."""
        if self._descriptor is None:
            return
        self._done.set()
        if self._beats.is_alive():
            self._beats.join(timeout=self._beat_s + 1)
        if not self._lost:
            os.ftruncate(self._descriptor, 0)
        self._close()

    def check(self) -> None:
        """Raise RuntimeError if another run has taken the lock over, as after a long freeze of this process."""
        if self._lost:
            raise RuntimeError(
                f"another run took over {self.path.parent} while this one did not respond ({_read(self.path)}): stopping, "
                "so that they do not overwrite each other"
            )

    def _lock(self) -> bool:
        """Take the kernel's lock; False if this file system has none. Raises RunRootBusyError if another process has it."""
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy(_read(self.path)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _wait_until_stale(self, previous: Holder) -> None:
        """Return once `previous` has not beaten for stale_s, or has released. Raises RunRootBusyError at a sign of life."""
        seen, since = self._last_beat(), time.monotonic()
        log.warning(
            "run_root %s: was held by %s; waiting up to %g s for a sign of life",
            self.path.parent,
            previous,
            self._stale_s,
        )
        while time.monotonic() - since < self._stale_s:
            time.sleep(min(POLL_S, self._stale_s))
            if _read(self.path) is None:
                return
            if self._last_beat() != seen:
                raise self._busy(_read(self.path))

    def _await_claim(self) -> None:
        """Raise RunRootBusyError if another run wrote after this one: the last writer wins."""
        time.sleep(min(CLAIM_S, self._stale_s))
        current = _read(self.path)
        if current != self.holder:
            raise self._busy(current)

    def _busy(self, holder: Holder | None) -> RunRootBusyError:
        return RunRootBusyError(
            f"run_root={self.path.parent} is in use by another run: {holder or 'one that has just started'}. Wait for it "
            "to end, stop it, or choose another run_root"
        )

    def _write(self) -> None:
        assert self._descriptor is not None
        text = json.dumps(asdict(self.holder)).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s):
            if self._descriptor is None:
                return
            try:
                # By path: the file that a new holder would look at, even if somebody replaced it.
                current = _read(self.path)
                if current is not None and current != self.holder:
                    self._lost = True
                    log.error("run_root %s: the lock was taken over by %s", self.path.parent, current)
                    return
                os.utime(self.path)
            except OSError as error:
                log.warning("run_root %s: could not renew the lock: %s", self.path.parent, error)

    def _last_beat(self) -> int:
        # Opened, not only stat: a network file system answers a plain stat from its cache.
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(path: Path) -> Holder | None:
    """Return the holder that the file names; None if it is empty or contains something else."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
