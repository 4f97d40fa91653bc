"""What the benchmarks make of what they measured: nothing passes that measured nothing."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from benchmarks import block_mask, reading
from benchmarks.attention import Heads, disagreements, learner_row
from benchmarks.environment import ROOT, result_target
from benchmarks.smoke import main, result_of

GIB = 2**30


def phase(seconds, calls, peak):
    return {"seconds": seconds, "calls": calls, "peak": peak}


@pytest.fixture
def smoked(tmp_path):
    """A run_root as experiment=gpu_smoke leaves it, its numbers made up."""

    def process(estimated, peak, compiles, **phases):
        return {
            "device": "a GPU",
            "estimated_bytes": estimated * GIB,
            "peak_bytes": peak * GIB,
            "peak_over_estimate": peak / estimated,
            "compiles": compiles,
            "phases": phases,
        }

    usage = {
        "rl": {
            "processes": {
                "learner": process(60, 54, 5, forward=phase(3.0, 9, 40 * GIB), backward=phase(6.0, 9, 54 * GIB)),
                "rollout worker 0": process(30, 27, 1, swap=phase(0.3, 3, 27 * GIB)),
            },
            "mismatch_by_kind": {
                "think": {"tokens": 300, "mean": 2e-3, "max": 0.1, "k3": 1e-5},
                "end": {"tokens": 100, "mean": 6e-3, "max": 0.3, "k3": 5e-5},
            },
        }
    }
    steps = [{"step": i, "kind": "step", "values": {"step/wall_s": 10.0 * i, "train/compiles": 5.0}} for i in (1, 2, 3)]
    steps.insert(1, {"step": 1, "kind": "eval", "values": {"eval/reward": 1.0}})

    def write(usage=usage, steps=steps):
        (tmp_path / "stages").mkdir(exist_ok=True)
        (tmp_path / "usage.json").write_text(json.dumps(usage))
        (tmp_path / "stages" / "rl.steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        return tmp_path

    return write, usage, steps


@pytest.mark.smoke
def test_a_smoke_run_is_recorded_with_the_estimate_beside_the_truth(smoked):
    write, usage, _ = smoked
    found = result_of(write())
    assert found["passed"]
    assert found["compiles"] == 6
    assert found["processes"] == usage["rl"]["processes"]
    assert found["mismatch_by_kind"] == usage["rl"]["mismatch_by_kind"]
    assert found["mismatch"] == pytest.approx({"tokens": 400, "mean": 3e-3, "max": 0.3, "k3": 2e-5})
    assert [(step["step"], step["step/wall_s"]) for step in found["steps"]] == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert found["steps"][0]["swap/pause_s"] is None


@pytest.mark.smoke
def test_a_smoke_run_that_did_not_do_everything_does_not_pass(smoked):
    write, usage, steps = smoked
    assert not result_of(write(steps=steps[:-1]))["passed"]
    processes, by_kind = usage["rl"]["processes"], usage["rl"]["mismatch_by_kind"]
    assert not result_of(write(usage={"rl": {"processes": processes, "mismatch_by_kind": {}}}))["passed"]
    only = {"learner": processes["learner"]}
    assert not result_of(write(usage={"rl": {"processes": only, "mismatch_by_kind": by_kind}}))["passed"]


@pytest.mark.parametrize("left", [None, {}, {"sft": {"processes": {}, "mismatch_by_kind": {}}}])
def test_a_run_without_an_rl_stage_is_named(smoked, tmp_path, capsys, left):
    if left is not None:
        smoked[0](usage=left)
    with pytest.raises(ValueError, match=r"usage\.json has no stage rl"):
        result_of(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "usage.json has no stage rl" in capsys.readouterr().err


@pytest.mark.slow
def test_a_time_counts_only_if_the_kernels_agree():
    row = learner_row(512, "packed", "cpu", torch.float32, Heads(2, 1, 32), 1)
    assert 0 < row["relative_difference"] < 1e-4
    assert disagreements({"dtype": "float32", "learner": [row]}) == []
    (wrong,) = disagreements({"dtype": "float32", "learner": [row, row | {"relative_difference": float("nan")}]})
    assert "relative_difference nan is above 0.0001" in wrong
    paged = {"step": "decode", "relative_difference": 0.5}
    assert disagreements({"dtype": "bfloat16", "learner": [], "engine": [paged]}) == [
        "decode: relative_difference 5.0e-01 is above 0.02"
    ]


def test_a_block_mask_counts_as_faster_only_if_it_is_torchs_own(tmp_path, capsys):
    assert block_mask.main(["--tokens", "512,1024", "--repeats", "1", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["tokens"], row["policy"]) for row in found["rows"]] == [
        (tokens, policy) for tokens in (512, 1024) for policy in block_mask.POLICIES
    ]
    assert found["ok"]
    row = found["rows"][0] | {"tokens": block_mask.BAR_TOKENS, "speedup": block_mask.BAR}
    assert block_mask.missed(row) is None
    assert "49 times faster, less than 50" in block_mask.missed(row | {"speedup": 49})
    assert "differs" in block_mask.missed(row | {"equal": False})
    assert block_mask.main(["--tokens", "1000"]) == 2
    assert "--tokens 1000 is not a multiple of 128" in capsys.readouterr().err


def test_a_reader_counts_as_fast_only_if_its_pixels_are_the_former_ones(tmp_path):
    row = reading.measure(tmp_path, 56, 56, 10, 3, 1)
    assert row["equal"]
    assert min(row["first_ms"], row["again_ms"], row["former_ms"]) > 0
    fast = row | {"first_ratio": reading.BAR, "again_ratio": 0.5}
    assert reading.missed(fast) == []
    assert "first_ratio 1.2 is above 1.1" in reading.missed(fast | {"first_ratio": 1.2})[0]
    assert "pixels differ" in reading.missed(fast | {"equal": False})[0]


@pytest.mark.parametrize("name", ["attention", "block_mask", "consistency", "endless", "reading"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(name, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    given = ["--json", str(tmp_path / "file" / "x.json")]
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(given)
    assert stopped.value.code == 2
    assert f"--json: {given[1]} cannot be written (" in capsys.readouterr().err


COMMANDS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_says_how_it_is_called(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0
    assert f"usage: benchmarks.{name} [-h]" in capsys.readouterr().out


def test_asking_whether_a_result_can_be_written_leaves_what_was_there(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    assert [result_target(text) for text in (str(new), str(old), "-", "")] == [str(new), str(old), "-", ""]
    assert not new.exists()
    assert old.read_text() == "kept"
