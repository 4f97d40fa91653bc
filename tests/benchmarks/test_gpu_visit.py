"""A visit to a GPU brings back what it found, whatever cuts it off; and times are medians of what runs on a device."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from benchmarks import attention, gpu, parts, smoke, timing
from benchmarks.environment import ROOT, hardware_apart, write_result
from benchmarks.gpu import Part, Visit, run_benchmark, run_tests, visit_gpu
from benchmarks.parts import run_part
from benchmarks.smoke import run_smoke


def script(text):
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_lines_are_handed_on_while_the_part_still_runs(tmp_path, capfd):
    came = []
    done = run_part(
        script("import time; print('one'); time.sleep(1.0); print('two'); raise SystemExit(3)"),
        tmp_path,
        60.0,
        lambda line: came.append((line, time.monotonic())),
    )
    assert (done.status, done.cut_off, done.last) == (3, False, ("one", "two"))
    assert [line for line, _ in came] == ["one", "two"]
    assert came[1][1] - came[0][1] > 0.5
    assert capfd.readouterr().out.splitlines() == ["one", "two"]


def test_a_part_out_of_time_may_write_its_report_and_is_then_ended(tmp_path, monkeypatch):
    polite = (
        "import time\ntry:\n    print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('report')"
    )
    done = run_part(script(polite), tmp_path, 3.0)
    assert (done.cut_off, done.last) == (True, ("up", "report"))
    monkeypatch.setattr(parts, "INTERRUPT_S", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    done = run_part(script(deaf), tmp_path, 3.0)
    assert (done.cut_off, done.status, done.last) == (True, -9, ("up",))
    assert done.seconds < 30


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose benchmarks and launch.py are scripts of the test."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(smoke, "ROOT", tmp_path)
    monkeypatch.setattr(smoke, "RUN_ROOT", tmp_path / "run")
    monkeypatch.setattr(smoke, "WRITE_EVERY_S", 0.0)
    # A pytest inside starts in a second, also on a busy machine.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


def test_outcomes_of_tests_are_written_one_by_one_and_kept_when_cut_off(project):
    (project / "tests").mkdir()
    (project / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    test = """
        import json, pathlib, time, pytest
        pytestmark = pytest.mark.cuda

        def test_first(): pass

        def test_wrong(): assert 1 == 2

        def test_long():
            for _ in range(100):
                path = pathlib.Path("found.json")
                if path.exists() and json.loads(path.read_text())["counts"] == {"passed": 1, "failed": 1}:
                    pathlib.Path("seen").touch()
                    break
                time.sleep(0.1)
            time.sleep(60)
    """
    (project / "tests" / "test_a.py").write_text(textwrap.dedent(test))
    path = project / "found.json"
    assert not run_tests(path, 20.0, Visit())
    found = json.loads(path.read_text())
    assert (project / "seen").exists()
    assert (found["passed"], found["complete"], found["cut_off"]) == (False, False, True)
    assert found["outcomes"] == {"tests/test_a.py::test_first": "PASSED", "tests/test_a.py::test_wrong": "FAILED"}
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert {"gpu", "cpu_cores"} <= set(found["hardware"])


def test_tests_that_all_pass_pass_and_none_do_not(project):
    (project / "tests").mkdir()
    (project / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    file, path = project / "tests" / "test_a.py", project / "found.json"
    file.write_text("import pytest\n@pytest.mark.cuda\ndef test_a(): pass\n")
    assert run_tests(path, 60.0, Visit())
    assert json.loads(path.read_text())["complete"]
    file.write_text("import pytest\n@pytest.mark.cuda\n@pytest.mark.skip(reason='none')\ndef test_a(): pass\n")
    assert not run_tests(path, 60.0, Visit())


def test_rows_that_a_benchmark_wrote_survive_its_end(project):
    (project / "benchmarks").mkdir()
    cut = "import sys, pathlib, json\np = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
    cut += "assert '--quick' in sys.argv and not p.exists()\n"
    cut += "p.write_text(json.dumps({'rows': [1, 2]}))\nraise OSError('gone')\n"
    (project / "benchmarks" / "__init__.py").touch()
    (project / "benchmarks" / "made_up.py").write_text(cut)
    path = project / "found.json"
    path.write_text("{}")
    assert not run_benchmark("made_up")(path, 60.0, Visit(quick=True))
    found = json.loads(path.read_text())
    assert (found["rows"], found["passed"], found["status"]) == ([1, 2], False, 1)
    assert found["error"][-1] == "OSError: gone"


LAUNCH = """
    import json, pathlib, sys, time
    root = pathlib.Path(next(w for w in sys.argv if w.startswith("run_root=")).split("=", 1)[1])
    (root / "stages").mkdir(parents=True, exist_ok=True)
    assert not (root / "stages" / "rl.steps.jsonl").exists()
    print("memory choice: weights.staging=host")
    line = {"step": 1, "kind": "step", "values": {"step/wall_s": 2.5}}
    (root / "stages" / "rl.steps.jsonl").write_text(json.dumps(line) + "\\n")
    print("step 1", flush=True)
    time.sleep(1)
    found = json.loads(pathlib.Path("found.json").read_text())
    assert found["steps"][0]["step/wall_s"] == 2.5 and not found["passed"], found
    print("seen", flush=True)
    time.sleep(60)
"""


def test_a_smoke_run_that_is_cut_off_keeps_its_steps_and_what_was_chosen(project):
    (project / "launch.py").write_text(textwrap.dedent(LAUNCH))
    (project / "run" / "stages").mkdir(parents=True)
    (project / "run" / "stages" / "rl.steps.jsonl").write_text("an earlier run's")
    path = project / "found.json"
    assert not run_smoke(path, ("a=1",), limit_s=8.0)
    found = json.loads(path.read_text())
    assert "seen" in found["error"]
    assert (found["passed"], found["complete"], found["cut_off"]) == (False, False, True)
    assert [step["step/wall_s"] for step in found["steps"]] == [2.5]
    assert found["memory"] == ["memory choice: weights.staging=host"]
    assert found["command"][-1] == "a=1"


def test_every_part_has_a_limit_below_the_whole_and_what_is_left_out_says_so(tmp_path):
    limits = {}

    def part(name, share, least, takes=0.0):
        def run(path, limit, visit):
            limits[name] = limit
            time.sleep(takes)
            write_result(path, {"passed": True})
            return True

        return Part(run, share, least)

    seconds = 3 * parts.INTERRUPT_S + gpu.TO_WRITE_S + 70
    made = {"a": part("a", 0.3, 5.0, takes=2.0), "b": part("b", 1.0, 5.0), "c": part("c", 0.1, 5.0)}
    assert not visit_gpu(["a", "b", "c"], seconds, Visit(), made, tmp_path)
    assert limits["a"] == pytest.approx(0.3 * seconds - parts.INTERRUPT_S, abs=1.0)
    # All that is left but what the last one needs.
    assert limits["b"] == pytest.approx(seconds - gpu.TO_WRITE_S - 2.0 - 2 * parts.INTERRUPT_S - 5.0, abs=2.0)
    assert "c" not in limits
    assert json.loads((tmp_path / "gpu_c.json").read_text())["note"] == "left out: 0 s left, it needs 5"
    assert json.loads((tmp_path / "gpu_b.json").read_text())["passed"]
    assert sum(part.share for part in gpu.PARTS.values()) > 1 > max(part.share for part in gpu.PARTS.values())
    for part in gpu.PARTS.values():
        assert part.least_s < part.share * gpu.SECONDS - parts.INTERRUPT_S


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_benchmark_that_is_killed_keeps_the_rows_that_it_had(tmp_path):
    """The real one, in a process of its own, and a kill that nobody can catch."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.attention", "--device", "cpu", "--quick", "--json", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
    found = json.loads(path.read_text())
    assert not found["complete"]
    assert found["learner"][0]["flex_forward_ms"] > 0
    assert "cpu_cores" in found["hardware"]


def test_words_are_parts_or_settings_of_the_smoke_run(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu, "visit_gpu", lambda names, seconds, visit, *_: asked.append((names, seconds, visit)) or True
    )
    assert gpu.main(["smoke", "learner.offload=cpu", "--seconds", "570", "algorithm.steps=2", "tests", "--quick"]) == 0
    assert gpu.main([]) == 0
    assert asked == [
        (["smoke", "tests"], 570.0, Visit(("learner.offload=cpu", "algorithm.steps=2"), quick=True)),
        (["smoke", "tests", "rollout", "attention"], 720.0, Visit()),
    ]
    assert gpu.main(["everything"]) == 2
    assert "'everything' is not one of smoke, tests, rollout, attention" in capsys.readouterr().err
    assert gpu.main(["tests", "a=1"]) == 2
    assert "a=1 is for the smoke run" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["smoke"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_attention_saves_every_row_as_soon_as_it_is_there(monkeypatch):
    monkeypatch.setattr(attention, "TOKENS", (512, 1024))
    made = iter(range(100))
    monkeypatch.setattr(attention, "learner_row", lambda *given: {"row": next(made)})
    saved = []
    found = attention.measure("cpu", True, saved.append)
    assert [(len(s["learner"]), s["complete"]) for s in saved[-1:]] == [(4, False)]
    assert len(saved) == 4
    assert found["complete"]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_forward_of_the_engine_is_timed_through_its_own_backends(rows):
    heads = attention.Heads(4, 2, 16)
    found = attention.paged_step("step", rows, 3, 32, heads, 2, "cpu", ("torch",))
    assert (found["segments"], found["rows"], found["live"]) == (3, rows, 32)
    assert min(found["torch_plan_ms"], found["torch_layer_ms"]) > 0


def test_pages_hold_the_keys_and_values_of_the_blocks_in_another_order(monkeypatch):
    """Without FlashInfer: what it would be given is read back by hand."""
    seen = {}

    class Reader:
        def __init__(self, pool):
            self.pool = pool

        def segments(self, segments):
            rows = [self.pool.keys(0)[torch.from_numpy(segment.slots)] for segment in segments]
            seen[self.pool.paged] = torch.stack(rows)
            return lambda layer, q, scaling: torch.ones(1)

    monkeypatch.setattr(attention, "make_backend", lambda name, pool, groups: Reader(pool))
    attention.paged_step("prefill", 2, 3, 8, attention.Heads(4, 2, 16), 1, "cpu")
    assert torch.equal(seen[True], seen[False])
    assert seen[True].shape == (3, 8, 2, 16)
    assert seen[True].std() > 0.5


def test_a_result_that_is_written_over_is_whole_at_any_time(tmp_path):
    path = tmp_path / "new" / "found.json"
    write_result(path, {"a": 1})
    write_result(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["found.json"]
    assert hardware_apart() is hardware_apart()


# ---- times -----------------------------------------------------------------------------------------------------


def test_times_are_medians_after_warm_up_and_calls_take_turns():
    order, slow = [], iter([0.05, 0.05, 0.002, 0.05, 0.002, 0.002, 0.002])

    def uneven():
        order.append("uneven")
        time.sleep(next(slow))

    def other():
        order.append("other")

    found = timing.medians_ms({"uneven": uneven, "other": other}, "cpu", 5)
    assert 2.0 <= found["uneven"] < 20.0
    assert found["other"] < 5.0
    assert order[2 * timing.WARM_UP :] == ["uneven", "other"] * 5
    with pytest.raises(ValueError, match="repeats=0"):
        timing.medians_ms({}, "cpu", 0)


def test_short_calls_are_measured_many_at_once():
    assert [timing.calls_at_once(ms) for ms in (5.0, 1.0, 0.3, 0.0)] == [1, 1, 4, timing.MOST_CALLS]


def test_on_a_gpu_events_bracket_the_calls_and_nothing_waits_between_them(monkeypatch):
    """The events are made up, as is their clock: that they are used right is all that a CPU can show."""
    told, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")
            self.at = clock[0]

        def synchronize(self):
            told.append("wait for event")

        def elapsed_time(self, later):
            return later.at - self.at

    def call():
        told.append("call")
        clock[0] += 0.4

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    assert timing.medians_ms({"call": call}, "cuda", 2)["call"] == pytest.approx(0.4)
    once = ["wait", "record", "call", "call", "call", "record", "wait for event"]
    assert told == ["call"] * timing.WARM_UP + ["wait", "record", "call", "record", "wait for event"] + once * 2
