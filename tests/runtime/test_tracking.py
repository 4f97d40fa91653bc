"""Tracking with a real MLflow: what arrives, what is left out, and that a dead tracker stops nothing."""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import asdict

import pytest

from conf.schema import MemoryConfig, RunConfig, TrackingConfig
from runtime.store.manifests import flat
from runtime.tracking.tracker import CLOSE_TIMEOUT_S, Tracker, _Store, look

pytestmark = pytest.mark.timeout(180)


def runs(uri, experiment="sightline"):
    """(run, client) of every run of the experiment, read back from the store."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id])


def history(client, run, name):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.slow
def test_a_clock_that_is_set_back_loses_no_step_and_ends_no_run(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    tracker = Tracker(TrackingConfig(), tmp_path / "run", "rl-seed0")
    for step in range(1, 7):
        now -= 3600
        tracker.metrics({"reward/total": step / 8}, step)
    tracker.close("FINISHED")
    client, (run,) = runs(tracker.uri)
    assert run.info.status == "FINISHED"
    assert history(client, run, "reward/total") == [(step, step / 8) for step in range(1, 7)]
    assert run.data.metrics["reward/total"] == 6 / 8, "the newest is that of the last step"
    assert tracker.failed is None


@pytest.mark.slow
def test_params_metrics_and_artifacts_arrive_and_what_was_not_measured_is_left_out(tmp_path):
    tracker = Tracker(TrackingConfig(), tmp_path / "run", "all-seed3")
    params = flat(asdict(RunConfig(memory=MemoryConfig("full"))))
    assert len(params) > 100, "more than one batch of the store's: as every run logs"
    tracker.params(params | {"long": "x" * 700})
    tracker.metrics({"reward/total": 0.25, "busy/workers": None, "swap/pause_s": math.nan, "train/loss": 0.0}, step=1)
    tracker.metrics({"reward/total": 0.5, "swap/pause_s": 0.125, "train/loss": -math.inf}, step=2)
    tracker.metrics({"busy/workers": None}, step=2)
    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    tracker.artifact(summary)
    tracker.close("FINISHED")
    assert tracker.failed is None

    assert tracker.uri == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    client, (run,) = runs(tracker.uri)
    assert run.info.run_name == "all-seed3"
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in params.items()} | {"long": "x" * 500}
    assert history(client, run, "reward/total") == [(1, 0.25), (2, 0.5)]
    assert history(client, run, "swap/pause_s") == [(2, 0.125)]
    assert history(client, run, "train/loss") == [(1, 0.0)], "a measured 0 is kept"
    assert "busy/workers" not in run.data.metrics
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["summary.json"]

    # A second run goes into the same experiment of the same file, and tells how it ended.
    again = Tracker(TrackingConfig(), tmp_path / "run", "eval-seed3")
    again.metrics({"reward/total": 0.75}, step=1)
    again.close("FAILED")
    _, both = runs(tracker.uri)
    assert {(run.info.run_name, run.info.status) for run in both} == {
        ("all-seed3", "FINISHED"),
        ("eval-seed3", "FAILED"),
    }


@pytest.mark.slow
def test_a_dead_tracker_is_reported_once_and_stops_and_raises_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    tracker = Tracker(TrackingConfig(uri="http://bob:S3CRET-a@127.0.0.1:9/x?api=S3CRET%40b"), tmp_path, "rl-seed0")
    began = time.monotonic()
    tracker.params({"seed": 0})
    while tracker.failed is None and time.monotonic() - began < 60:
        tracker.metrics({"reward/total": 1.0}, step=1)
        time.sleep(0.05)
    assert tracker.failed is not None
    assert "127.0.0.1" in tracker.failed
    assert "S3CRET" not in tracker.failed
    for step in range(1000):  # kept, and nothing is waited for
        tracker.metrics({"reward/total": 1.0}, step)
    tracker.artifact(tmp_path / "summary.json")
    assert time.monotonic() - began < 60
    closing = time.monotonic()
    tracker.close("FAILED")
    assert time.monotonic() - closing < CLOSE_TIMEOUT_S / 2
    said = [record for record in caplog.records if record.name == "sightline.tracking"]
    assert len(said) == 2
    assert "training goes on" in said[0].getMessage()
    assert "given up, the journal has it all" in said[1].getMessage()
    assert "S3CRET" not in said[0].getMessage() + said[1].getMessage()


@pytest.mark.slow
def test_what_was_logged_while_the_store_was_away_arrives_later_in_order_and_once(tmp_path, monkeypatch, caplog):
    import mlflow

    monkeypatch.setattr("runtime.tracking.tracker.RETRY_S", 0.1)
    whole, calls = mlflow.MlflowClient.log_batch, []

    def unsteady(client, run_id, **values):
        calls.append(values)
        if len(calls) in (2, 3):
            raise ConnectionError("nobody answers")
        whole(client, run_id, **values)
        if len(calls) == 5:  # written, but the answer is lost
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", unsteady)
    tracker = Tracker(TrackingConfig(), tmp_path / "run", "rl-seed0")
    for step in range(1, 7):
        tracker.metrics({"reward/total": float(step), "train/loss": 0.5}, step)
    give_up = time.monotonic() + 60
    while len(calls) < 8:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    tracker.close("FINISHED")
    assert tracker.failed is None
    client, (run,) = runs(tracker.uri)
    assert run.info.status == "FINISHED"
    assert history(client, run, "reward/total") == [(step, float(step)) for step in range(1, 7)]
    assert history(client, run, "train/loss") == [(step, 0.5) for step in range(1, 7)]
    said = [record.getMessage() for record in caplog.records if record.name == "sightline.tracking"]
    assert [text for text in said if "fails, training goes on" in text] == [text for text in said if "fails" in text]
    assert sum("works again" in text for text in said) == 2


@pytest.mark.slow
def test_another_attempt_continues_the_run_wherever_the_folder_is_and_whatever_became_of_its_note(tmp_path):
    first = Tracker(TrackingConfig(), tmp_path / "run", "all-seed3", resume=True)
    first.metrics({"train/loss": 1.0}, step=1)
    first.close("KILLED")
    (tmp_path / "run").rename(tmp_path / "moved")
    note = tmp_path / "moved" / "tracking.json"
    # Killed before its parameters arrived; then found as it is, torn by a full disk, and gone.
    for step, what in ((2, None), (3, ""), (4, "gone")):
        if what is not None:
            note.write_text("")
        if what == "gone":
            note.unlink()
        again = Tracker(TrackingConfig(), tmp_path / "moved", "all-seed3", resume=True, known=str(first.run_id))
        again.params({"seed": step})
        again.metrics({"train/loss": 1.0}, step=step - 1)
        again.metrics({"train/loss": 0.5}, step=step)
        again.close()
        assert again.failed is None
        assert again.run_id == first.run_id
    client, (run,) = runs(again.uri)
    assert run.data.params == {"seed": "2"}
    assert history(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_what_the_store_refuses_costs_itself_and_is_named_once(tmp_path, caplog, resumed):
    tracker = Tracker(TrackingConfig(), tmp_path, "rl-seed0", resume=True)
    if resumed:
        tracker.metrics({"reward/total": 0.0}, step=0)
        tracker.close()
        tracker = Tracker(TrackingConfig(), tmp_path, "rl-seed0", resume=True)
    tracker.params({"seed": 1, "reward.terms.a//b ?.weight": 2.0, "x" * 300: 3})
    tracker.metrics({"reward/total": 0.5}, step=1)
    for step in (2, 3):
        tracker.metrics({"train/loss": 0.1, "no ? name": 0.5, "a//b": 0.5, "x" * 300: 1.0, "reward/total": 0.75}, step)
    tracker.metrics({"no ? name": 0.5}, step=4)
    tracker.artifact(tmp_path / "not-there.json")
    tracker.metrics({"reward/total": 1.0}, step=5)
    tracker.close()
    assert tracker.failed is None
    client, (run,) = runs(tracker.uri)
    before = [(0, 0.0)] if resumed else []
    assert history(client, run, "reward/total") == [*before, (1, 0.5), (2, 0.75), (3, 0.75), (5, 1.0)]
    assert history(client, run, "train/loss") == [(2, 0.1), (3, 0.1)]
    assert run.info.status == "FINISHED"
    assert sorted(run.data.params.values()) == ["1", "2.0", "3"], "parameters with a user's words in their names, too"
    said = [record.getMessage() for record in caplog.records if record.name == "sightline.tracking"]
    assert len(said) == 4
    for name in ("'no ? name'", "'a//b'", f"'{'x' * 300}'", "not-there.json"):
        assert sum(name in line for line in said) == 1


def test_a_disabled_tracker_does_nothing(tmp_path):
    root = tmp_path / "run"
    tracker = Tracker(TrackingConfig(enabled=False), root, "all-seed0")
    tracker.params({"seed": 0})
    tracker.metrics({"reward/total": 1.0}, step=1)
    tracker.artifact(root / "summary.json")
    tracker.close()
    assert tracker.failed is None
    assert not tracker._thread.is_alive()
    assert tracker._queue.empty()
    assert not root.exists()


def test_whoever_only_looks_makes_no_store_and_says_whether_a_server_answers(tmp_path):
    found, where = look(TrackingConfig(), tmp_path)
    assert found
    assert str(tmp_path / "mlflow.db") in where
    found, where = look(TrackingConfig(uri=f"sqlite:///{tmp_path / 'own.db'}"), tmp_path)
    assert found
    assert list(tmp_path.iterdir()) == []
    found, where = look(TrackingConfig(uri="http://me:secret@127.0.0.1:9"), tmp_path)
    assert not found
    assert "does not answer" in where
    assert "secret" not in where
    assert look(TrackingConfig(enabled=False), tmp_path) == (True, "off (tracking.enabled=false)")


def test_what_was_charted_is_remembered_in_little_room(tmp_path):
    class Client:
        def log_batch(self, run, metrics):
            pass

    store = _Store(Client(), "run", False, lambda what, error: None)
    values = {f"metric/{i}": 0.5 for i in range(50)}
    store.metrics(values, 1, 0)
    tracemalloc.start()
    try:
        for step in range(2, 1002):
            store.metrics(values, step, 0)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 300_000
    assert all(store._logged[step] == set(values) for step in range(1, 1002))
