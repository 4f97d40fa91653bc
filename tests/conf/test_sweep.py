"""The folders of a sweep's jobs."""

from __future__ import annotations

from conf.sweep import LONGEST, sweep_root


def root(typed: list[str], own: list[str], params: dict[str, str] | None = None) -> str:
    return sweep_root("outputs/run", typed, params or {}, own)


def test_a_job_is_named_by_what_the_sweep_varies_and_by_nothing_else():
    typed = ["-m", "seed=1,2", "learner.lr=1e-4,3e-4", "sft.steps=5"]
    assert root(typed, ["seed=2", "learner.lr=1e-4", "sft.steps=5"]) == "outputs/run/learner.lr-0.0001+seed-2"
    # More values, or the words in another order: the same folder.
    other = ["learner.lr=3e-4,1e-4,1e-5", "-m", "seed=range(1,9)"]
    assert root(other, ["learner.lr=1e-4", "seed=2"]) == "outputs/run/learner.lr-0.0001+seed-2"


def test_groups_added_keys_and_a_sweepers_own_settings_count():
    assert root(["memory=rcsm,full"], ["memory=full"]) == "outputs/run/memory-full"
    assert root(["+memory.args.turns=1,2"], ["+memory.args.turns=2"]) == "outputs/run/memory.args.turns-2"
    assert root([], ["seed=3"], {"seed": "3,4"}) == "outputs/run/seed-3"


def test_a_sweep_over_run_root_itself_is_left_alone():
    assert root(["run_root=a,b", "seed=1,2"], ["run_root=a", "seed=1"]) == "outputs/run"


def test_what_makes_no_plain_name_gets_a_digest_and_stays_apart():
    typed = ["layout.system_prompt='a/b','a:b'"]
    first, second = (root(typed, [f"layout.system_prompt='{text}'"]) for text in ("a/b", "a:b"))
    assert first != second
    assert first.startswith("outputs/run/layout.system_prompt-")
    assert first.count("/") == 2
    long = root(["model.path=x,y"], [f"model.path={'x' * 300}"])
    assert len(long) < LONGEST + 40


def test_no_password_is_part_of_a_name():
    typed = ["tracking.uri='http://u:one@a','http://u:two@a'"]
    first, second = (root(typed, [f"tracking.uri='http://u:{word}@a'"]) for word in ("one", "two"))
    assert "one" not in first
    assert first != second
