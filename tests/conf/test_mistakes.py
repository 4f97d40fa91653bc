"""A command line that Hydra cannot compose: one line that names what was typed, the key, and what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conf.mistakes import explain
from launch import plain_words
from tests.support.configs import composed
from tests.support.project import ROOT


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "job=foo",
            "job=foo: there is no such option; job is one of all, data, doctor, eval, gpu_smoke, rl, sft, sft_eval, watch",
        ),
        ("memory=rscm", "memory=rscm: there is no such option (did you mean rcsm?); memory is one of full, "),
        ("experiment=quickstrat", "(did you mean quickstart?)"),
        ("memory=4", "memory=4: a group takes the name of an option"),
        ("algorithm.grop_size=2", "algorithm.grop_size=2: there is no such key (did you mean algorithm.group_size?)"),
        ("algorithm.clip=2", "; algorithm has name, mode, steps, "),
        ("algorithm={speed: 1}", "names a key that algorithm does not have; it has name, mode, steps, "),
        ("window=3", "(did you mean memory.window or data.synthetic.window?)"),
        (
            "memory.args={window: 3}",
            "memory.args has no such name yet; with a plus in front it is added: +memory.args={wi",
        ),
        (
            "memory.args.turns=3",
            "memory.args has no such name yet; with a plus in front it is added: +memory.args.turns=3",
        ),
        ("query=hi", "query=hi: there is no such key; query= goes with job=watch"),
        ("data.train=a b(c", "data.train=a b(c: cannot be read"),
        ("seed=1=2", "seed=1=2: cannot be read"),
        ("job", "job: cannot be read (missing EQUAL"),
        ("+algorithm.steps=4", "Either remove + prefix: 'algorithm.steps=4'"),
        ("reward=weighted,quickstart", "Ambiguous value for argument 'reward=weighted,quickstart'"),
    ],
)
def test_it_is_said_in_one_line_what_is_wrong_and_what_there_is(word, message):
    with pytest.raises(Exception) as raised:  # noqa: PT011  (whatever Hydra raises)
        composed(word)
    said = explain(raised.value, [word])
    assert message in said
    assert "\n" not in said


AWKWARD = (
    *("a", "${x}", "\\${x}", "\\\\${x}", "a'b", "a\\'b", "\\", "x\\\\", '\\d \\"', "'", "''", "${a}'\\", "${", "}${"),
    *("$${x}", "${oc.env:HOME}", "two\nlines", "é 📷", "a,b=c", "", "null", "[a", "{b}", "3", "~+", "#"),
)


@pytest.mark.parametrize("text", AWKWARD)
def test_a_query_and_a_path_arrive_as_they_were_typed(text):
    config = composed(*plain_words(["job=watch", f"query={text}", f"video={text}", f"model={text}"]))
    assert (config.watch.query, config.watch.video, config.model.path) == (text, text, text)


@pytest.mark.parametrize("form", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_options_of_a_folder_of_ones_own_are_options(tmp_path, form):
    for group, name in (("model", "mine"), ("memory", "answers")):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text("window: 3\n")
    given = [word.format(tmp_path) for word in form]
    assert plain_words([*given, "model=mine"]) == [*given, "model=mine"]
    assert plain_words(["model=mine"]) == ["model.path='mine'"], "without the folder it is a path"
    with pytest.raises(Exception) as raised:  # noqa: PT011  (whatever Hydra raises)
        composed("memory=answer")
    assert "(did you mean answers?); memory is one of answers, full, " in explain(
        raised.value, [*given, "memory=answer"]
    )


@pytest.mark.slow
def test_the_command_ends_with_status_2_and_one_line():
    words = [sys.executable, "launch.py", "algorithm.grop_size=2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("configuration error: algorithm.grop_size=2: there is no such key")
    assert len(done.stderr.splitlines()) == 1
