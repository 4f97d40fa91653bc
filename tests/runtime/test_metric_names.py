"""Free text as the name of a metric: one name each, that trackers take, and `eval.best` that is sure to find it."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_length_limit, _validate_metric_name

from evals.best import best_metric, check_best
from evals.categories import category_name
from evals.summary import checkpoint_label
from rl.metrics import term_metric
from rl.stage import RL
from runtime.tracking.metric_names import MAX_BYTES, apart, metric_name, readable
from tests.support.configs import composed
from tests.support.starting import check_inputs

AWKWARD = (
    *("a//b", "..", ".", "/", "//", "/a", "a/", "a/../b", "a/./b", "./a", " ", " a ", "a ", "a:b", "a?b", "a_b", "%2F"),
    *("a_x002F_b", "_x002F_", "_x005F_x002F_", "_x4/", "_x002F", "_x0041_x0042_", "/x0041_", "__x002F_", "uav"),
    *("颜色", "形状", "é", "e\u0301", "\u212b", "\u00c5", "\ud55c", "\u1112\u1161\u11ab", "📷", "x_x1F4F7_", "\ufb01"),
    *("\x00", "\n", "\x1b[2J", "\u202e", "a" * 240, "a" * 300, "b" * 300, "颜" * 84, "颜" * 300, "📷" * 60),
    *("a" * 234 + "_x0123456789ABCDEF_", "all", "", "uncategorised", "all (category)", "uncategorised (category)"),
    *("all (category) (category)", "Now", "now"),
)
TEXT = st.one_of(
    st.text(max_size=20),
    st.text("ab_x0F2/. é", max_size=20),
    st.text("_x04F/", min_size=1, max_size=16),
    st.sampled_from(AWKWARD),
    st.text(min_size=200, max_size=400),
)


def takes(name: str) -> bool:
    _validate_metric_name(name)
    _validate_length_limit("Metric name", 250, name)
    return len(name.encode()) <= MAX_BYTES


def accuracy(category: str) -> str:
    return metric_name(f"eval/accuracy_{category_name(category)}")


@given(TEXT, st.sampled_from(["eval/accuracy_", "reward/", f"eval_{'c' * 109}/accuracy_", "x"]))
@settings(max_examples=600, deadline=None)
def test_every_text_becomes_a_name_that_a_tracker_takes_and_that_can_be_read_back(text, prefix):
    name = metric_name(prefix + text)
    assert takes(name)
    assert unicodedata.is_normalized("NFC", name)
    assert readable(name) == prefix + text or len((prefix + text).encode()) > MAX_BYTES / 8


@given(TEXT.filter(bool))
@settings(max_examples=300, deadline=None)
def test_also_without_anything_in_front(text):
    assert takes(metric_name(text))


@given(st.lists(TEXT, unique=True, min_size=2, max_size=8))
@example(list(AWKWARD))
@settings(max_examples=400, deadline=None)
def test_two_categories_never_share_a_name(categories):
    names = [accuracy(category) for category in categories]
    assert len(set(names)) == len(names)
    # Nor on a file system that composes accents, or takes them apart.
    for form in ("NFC", "NFD"):
        assert len({unicodedata.normalize(form, name) for name in names}) == len(names)
    assert len({category_name(category) for category in categories}) == len(categories)
    # What was turned into a name is not taken for what was called so.
    assert not {accuracy(name) for name in names} & set(names)


@pytest.mark.parametrize("plain", ["now", "Object Perception", "a/b", "v1.2-x", "do_xylem", "x_x00g0", "a" * 200])
def test_a_plain_name_stays_as_it_is(plain):
    assert metric_name(f"eval/accuracy_{plain}") == f"eval/accuracy_{plain}"


def test_letters_of_every_script_stay_and_the_rest_is_named_by_its_code_point():
    assert accuracy("颜色") == "eval/accuracy_颜色"
    assert accuracy("how?") == "eval/accuracy_how_x003F_"
    assert accuracy("a//b") == "eval/accuracy_a_x002F_/b"
    assert accuracy("📷") == "eval/accuracy__x1F4F7_"
    assert accuracy("e\u0301") == "eval/accuracy_e_x0301_"
    assert accuracy("") == "eval/accuracy_uncategorised"


@given(
    st.lists(st.one_of(st.sampled_from(["total", "total-term", "group_std", "x"]), st.text(max_size=6)), unique=True)
)
def test_a_reward_term_never_takes_the_place_of_our_own_metrics(terms):
    own = {f"reward/{name}" for name in ("total", "group_std", "failed_streams", "zero_std_groups")}
    names = [term_metric(term) for term in terms if term]
    assert not own & set(names)
    assert len(set(names)) == len(names)
    assert term_metric("timing") == "reward/timing"
    assert apart("total", ("total",), "-term") == "total-term"


def test_a_checkpoints_label_fits_into_file_names_and_stays_its_own():
    labels = [checkpoint_label(f"/models/{'m' * 250}{end}") for end in "ab"]
    assert labels[0] != labels[1]
    assert all(len(f"{label}.jsonl.partial") < 255 for label in labels)
    assert checkpoint_label("/models/" + "m" * 100) == "m" * 100


# --- eval.best --------------------------------------------------------------------------------------------------------

CATEGORIES = ("颜色", "a//b", "", "all", "how?", "b" * 300)


def best(given: str, categories=CATEGORIES, **settings) -> str:
    words = [f"eval.{key}={value}" for key, value in settings.items()]
    quoted = given.replace("'", "\\'")
    return best_metric(composed("eval.every=1", f"eval.best='{quoted}'", *words), categories)


def test_best_takes_a_category_as_the_rows_spell_it_or_as_the_chart_is_called():
    assert best("reward") == "eval/reward"
    assert best("accuracy_all") == "eval/accuracy_all", "the mean, not the category of that name"
    for category in CATEGORIES:
        name = category_name(category)
        assert best(f"accuracy_{name}") == accuracy(category)
        assert best(accuracy(category).removeprefix("eval/")) == accuracy(category)
    assert best("accuracy_café", ["cafe\u0301"]) == accuracy("cafe\u0301"), "typed composed"


def test_the_rows_spelling_goes_before_a_charts():
    for categories in (["a?", "a_x003F_"], ["a_x003F_", "a?"]):
        assert best("accuracy_a?", categories) == "eval/accuracy_a_x003F_"
        assert best("accuracy_a_x003F_", categories) == "eval/accuracy_a_x005F_x003F_"


@pytest.mark.parametrize("wrong", ["accuracy_nope", "accuracy_", "accuracy_a/b", "accuracy_颜", "accuracy_how"])
def test_a_name_that_no_evaluation_has_is_refused_with_those_that_there_are(wrong):
    with pytest.raises(ValueError, match=r"eval\.best='") as refused:
        best(wrong)
    for name in ("reward", "timing", "accuracy_all", "accuracy_颜色", "accuracy_a//b", "accuracy_uncategorised"):
        assert name in str(refused.value)
    with pytest.raises(ValueError, match="_x001B_") as refused:
        best(wrong, ["\x1b[2J"])
    assert "\x1b" not in str(refused.value), "it is printed on a terminal"


def write_rows(path, categories):
    with path.open("w") as file:
        for i, category in enumerate(categories):
            row = {"id": str(i), "video": "a.mp4", "start": 0, "end": 4, "category": category}
            row |= {"queries": [{"time": 1, "text": "?"}], "answers": [{"time": 2, "text": "b"}]}
            file.write(json.dumps(row) + "\n")


def start(config):
    """As launch.py does before anything starts."""
    RL.check(config, check_inputs(config))


def test_it_is_checked_before_anything_starts_against_the_rows_that_are_evaluated(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["one", "two", "two"])
    data = [f"data.train={tmp_path / 'rows.jsonl'}", f"data.heldout={tmp_path / 'rows.jsonl'}"]
    words = ["job=rl", *data, "eval.best=accuracy_two", f"run_root={tmp_path / 'run'}"]
    start(composed(*words, "eval.every=1"))
    start(composed(*words, "eval.every=1", "eval.tasks=2"))
    with pytest.raises(
        ValueError, match=r"eval\.best='accuracy_two'.*the first 1 held-out rows \(eval\.tasks\).*accuracy_one"
    ):
        start(composed(*words, "eval.every=1", "eval.tasks=1"))
    # Without evaluations while training nothing is kept as the best, whatever the name.
    start(composed(*words, "eval.tasks=1"))


def test_of_data_yet_to_be_generated_the_categories_are_known_too(tmp_path):
    words = ["eval.every=1", f"run_root={tmp_path / 'run'}"]
    start(composed(*words, "eval.best=accuracy_recall"))
    with pytest.raises(ValueError, match=r"did you mean accuracy_recall\?"):
        start(composed(*words, "eval.best=accuracy_recal"))
    check_best(composed("job=sft", *words, "eval.best=accuracy_recal"), None)
