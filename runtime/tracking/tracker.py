"""Tracking: writes parameters, metrics and artifacts to MLflow from a thread of its own.

Metrics of a step are logged in one batch; docs/metrics.md lists their names.

Invariants:
* a failing tracker (named boundary) is reported once, until it works again, and never stops or slows training;
* what it cannot take is kept, and delivered in order when it works again; at the end it is tried once more;
* a metric, parameter or artifact that MLflow refuses is left out, and no other;
* a resumed run continues its own MLflow run;
* a metric has at most one value per step;
* steps reach the charts only when a checkpoint has them;
* a password in `tracking.uri` is used to connect, and never shown.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from conf.schema import TrackingConfig
from runtime.store.journal import JournalLine
from runtime.tracking.metric_names import metric_name
from streams.support.redact import public_setting, public_uri, public_words

log = logging.getLogger("sightline.tracking")
CLOSE_TIMEOUT_S = 60.0
RUN_FILE = "tracking.json"
RETRY_S = 15.0
"""How long to leave a store alone that could not take something; MLflow's client has tried for half a minute by then."""
_EPOCH = time.time() - time.monotonic()
"""Makes times of day of a clock that nobody sets back: MLflow returns a metric's history in the order of these times."""
LOOK_S = 10
"""Seconds that a server may take to answer whoever only asks whether it is there."""
AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's error codes for a store that does not answer."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's error codes for an entry that it does not accept, as opposed to a store that cannot be written."""


class Tracker:
    """Writes to MLflow in the background.

    Args:
        config: the settings.
        root: the run_root.
        run_name: name of a new MLflow run.
        resume: continue the MLflow run that `run_root/tracking.json` names, if there is one.
        remember: write that file.
        known: the run to continue if that file is lost (a checkpoint names it, too).
    """

    def __init__(
        self,
        config: TrackingConfig,
        root: Path,
        run_name: str,
        *,
        resume: bool = False,
        remember: bool = True,
        known: str = "",
    ) -> None:
        self.enabled = config.enabled
        self._address = config.uri or f"sqlite:///{(root / 'mlflow.db').resolve()}"
        self.uri = public_uri(self._address)
        self.failed: str | None = None
        self.refused: set[str] = set()
        self.run_id: str | None = None
        self._config, self._root, self._name = config, root, run_name
        self._resume, self._remember, self._known = resume, remember, known
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        if self.enabled:
            root.mkdir(parents=True, exist_ok=True)
            self._thread.start()

    @property
    def _store(self) -> str:
        """What RUN_FILE calls the store. The default one moves with its run_root."""
        return public_uri(self._config.uri) or "mlflow.db"

    def params(self, values: dict[str, Any]) -> None:
        self._put("params", {metric_name(key): public_setting(key, value)[:500] for key, value in values.items()})

    def metrics(self, values: dict[str, float | None], step: int) -> None:
        """Log finite values; None and NaN (nothing to measure) are left out, never logged as 0."""
        self._put("metrics", (_finite(values), step, int((_EPOCH + time.monotonic()) * 1000)))

    def commit(self, lines: list[JournalLine]) -> None:
        """Log steps that a checkpoint now holds."""
        for line in lines:
            self.metrics(line.values, line.step)

    def artifact(self, path: Path) -> None:
        self._put("artifact", path)

    def close(self, status: str = "FINISHED") -> None:
        if not self.enabled or not self._thread.is_alive():
            return
        self._put("end", status)
        self._queue.put(None)
        self._closing.set()
        self._thread.join(timeout=CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("tracking: %s did not take everything within %g s", self.uri, CLOSE_TIMEOUT_S)

    def _put(self, kind: str, value: Any) -> None:
        if self.enabled:
            self._queue.put((kind, value))

    def _work(self) -> None:
        store: _Store | None = None
        while (entry := self._queue.get()) is not None:
            while True:
                last = self._closing.is_set()
                try:
                    store = store or self._open()
                    store.write(*entry)
                except Exception as error:  # noqa: BLE001 - named boundary: the tracker
                    # What has reached it nobody knows: it is asked when it is there again.
                    store = None
                    self._away(error)
                    if last:
                        log.warning("tracking to %s: given up, the journal has it all", self.uri)
                        return
                    self._closing.wait(RETRY_S)
                else:
                    if self.failed is not None:
                        log.warning("tracking to %s works again", self.uri)
                        self.failed = None
                    break

    def _away(self, error: Exception) -> None:
        if self.failed is None:
            self.failed = public_words(f"{type(error).__name__}: {error}", self._address)
            log.warning(
                "tracking to %s fails, training goes on, what is logged meanwhile is kept: %s",
                self.uri,
                self.failed.splitlines()[0],
            )

    def _open(self) -> _Store:
        """Connect, and return the MLflow run of this invocation."""
        # 4 attempts outlast half a minute without a server; MLflow's default of 7 takes minutes and as many warnings.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        # The SQLite store announces every migration of an empty database.
        import mlflow

        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.ERROR)
        client = mlflow.MlflowClient(tracking_uri=self._address)
        run, continued = self._open_run(client)
        return _Store(client, run, continued, self._refused)

    def _refused(self, what: str, error: Exception) -> None:
        """Report, once, an entry that the store refused."""
        if what not in self.refused:
            self.refused.add(what)
            log.warning(
                "tracking: %s is left out, %s refused it: %s",
                what,
                self.uri,
                public_words(_first_line(error), self._address),
            )

    def _open_run(self, client: Any) -> tuple[str, bool]:
        """Return (id, whether it is continued) of the MLflow run to write to."""
        from mlflow.exceptions import MlflowException

        if known := self.run_id or (self._before() if self._resume else ""):
            try:
                client.update_run(known, status="RUNNING")
            except MlflowException as error:
                if error.error_code in AWAY:
                    raise
                log.warning(
                    "tracking: %s does not know run %s any more: %s",
                    self.uri,
                    known,
                    public_words(str(error), self._address),
                )
            else:
                self.run_id = known
                self._keep(known)
                return known, True
        experiment = client.get_experiment_by_name(self._config.experiment)
        if experiment is None:
            location = None if self._config.uri else (self._root / "mlflow-artifacts").resolve().as_uri()
            experiment_id = client.create_experiment(self._config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        self.run_id = str(client.create_run(experiment_id, run_name=self._name).info.run_id)
        self._keep(self.run_id)
        return self.run_id, False

    def _before(self) -> str:
        """Return the MLflow run of the previous attempt; '' if there was none, or if it wrote to another store."""
        try:
            known = json.loads((self._root / RUN_FILE).read_text())
            return str(known["run_id"]) if public_uri(known["uri"]) in (self._store, self.uri) else ""
        except FileNotFoundError:
            return self._known
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("tracking: %s is damaged: %s", self._root / RUN_FILE, error)
            return self._known

    def _keep(self, run_id: str) -> None:
        if self._remember:
            file = self._root / RUN_FILE
            aside = file.with_name(file.name + ".partial")
            aside.write_text(json.dumps({"uri": self._store, "run_id": run_id}) + "\n")
            os.replace(aside, file)


def look(config: TrackingConfig, root: Path) -> tuple[bool, str]:
    """Return whether a run would find its store, and where it is, in words. It makes no run, nor a database."""
    if not config.enabled:
        return True, "off (tracking.enabled=false)"
    if not config.uri:
        return True, f"a database under run_root: {(root / 'mlflow.db').resolve()}"
    shown = public_uri(config.uri)
    if not config.uri.startswith("http"):
        return True, f"{shown}, not asked: opening it would create it"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(LOOK_S))
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        import mlflow

        found = mlflow.MlflowClient(tracking_uri=config.uri).get_experiment_by_name(config.experiment)
    except Exception as error:  # noqa: BLE001 - named boundary: the tracker
        words = public_words(_first_line(error), config.uri)
        return False, f"{shown} does not answer, a run would start without it and try again: {words}"
    return True, f"{shown} answers, {'it has' if found else 'it has not yet'} the experiment {config.experiment!r}"


class _Store:
    """One MLflow run, written from the tracker's thread. refused(what, error): called for an entry that the store refuses.

    Any other failure (no server, a full disk) is raised: nothing more can be tracked then.
    """

    def __init__(self, client: Any, run: str, continued: bool, refused: Callable[[str, Exception], None]) -> None:
        self._client, self._run, self._continued, self._refused = client, run, continued, refused
        self._logged: dict[int, frozenset[str]] = {}
        """By step, the metrics that the run has of it. Most steps have the same, so one set serves them all."""
        self._sets: dict[frozenset[str], frozenset[str]] = {}
        self._asked: set[str] = set()
        self._left_out: set[str] = set()

    def write(self, kind: str, value: Any) -> None:
        """Write one entry of the queue."""
        if kind == "params":
            self.params(value)
        elif kind == "metrics":
            self.metrics(*value)
        elif kind == "artifact":
            self.artifact(value)
        else:
            self._client.set_terminated(self._run, status=value)

    def params(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        # MLflow refuses to change a parameter: those of the first attempt stay, if it logged any.
        if self._continued and self._client.get_run(self._run).data.params:
            return
        params = [Param(key, value) for key, value in values.items()]
        self._each("parameter", params, lambda some: self._client.log_batch(self._run, params=some))

    def metrics(self, values: dict[str, float], step: int, stamp: int) -> None:
        """Log the values of one step, without those that the run already has."""
        from mlflow.entities import Metric

        self._ask(values)
        known = self._logged.get(step, frozenset())
        names = [name for name in values if name not in self._left_out and name not in known]
        new = [Metric(name, values[name], stamp, step) for name in names]
        self._each("metric", new, lambda some: self._client.log_batch(self._run, metrics=some))
        self._note(step, names)

    def artifact(self, path: Path) -> None:
        try:
            self._client.log_artifact(self._run, str(path))
        except OSError as error:  # the file is not there any more, or cannot be read
            self._refused(f"artifact {path.name}", error)

    def _each(self, what: str, entries: list[Any], write: Callable[[list[Any]], None]) -> None:
        """Write all entries at once; if one is refused, one by one, so that the others are written.

        MLflow checks every entry of a batch before it writes the first, so none is written twice.
        """
        from mlflow.exceptions import MlflowException

        try:
            write(entries)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
        else:
            return
        for entry in entries:
            try:
                write([entry])
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                self._left_out.add(entry.key)
                self._refused(f"{what} {entry.key!r}", error)

    def _ask(self, names: Iterable[str]) -> None:
        """Ask the store which steps of these metrics it has, once per metric of a continued run."""
        if not self._continued:
            return
        for name in [name for name in names if name not in self._asked]:
            self._asked.add(name)
            for metric in self._client.get_metric_history(self._run, name):
                self._note(int(metric.step), (name,))

    def _note(self, step: int, names: Iterable[str]) -> None:
        known = self._logged.get(step, frozenset()).union(names)
        self._logged[step] = self._sets.setdefault(known, known)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
