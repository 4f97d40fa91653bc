"""Passwords in addresses: what is shown in their place, wherever an address is shown."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.support.redact import public_setting, public_uri, public_words, redact, stored_setting

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://bob:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("https://hunter2@host", "https://***@host"),
        ("https://:hunter2@host/", "https://***@host/"),
        ("http://bob:a@hunter2@host/x", "http://***@host/x"),
        ("http://bob@corp.com:hunter2@host/x@y", "http://***@host/x@y"),
        ("http://bob:hunter2/3@host/x", "http://***@host/x"),
        ("postgresql://bob:1/hunter2@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg2://bob:hunter2@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("mysql://host/db?user=bob&password=hunter2", "mysql://host/db?user=***&password=***"),
        ("http://host/?token=hunter2&a=1#x", "http://host/?token=***&a=***#x"),
        ("databricks://profile:hunter2@host", "databricks://***@host"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////data/a@b/c:d@e.db", "sqlite:////data/a@b/c:d@e.db"),
        ("mlflow.db", "mlflow.db"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_what_lets_one_in(address, shown):
    assert public_uri(address) == shown
    assert public_uri(shown) == shown
    assert SECRET not in redact(f"could not reach '{address}': refused\nagain")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("launch.py tracking.uri=http://a:hunter2@h:1 seed=3", "launch.py tracking.uri=http://***@h:1 seed=3"),
        ("MLFLOW_TRACKING_PASSWORD=hunter2 launch.py", "MLFLOW_TRACKING_PASSWORD=*** launch.py"),
        ("GET /x?access_token=hunter2&page=2", "GET /x?access_token=***&page=2"),
        ("+reward.terms.judge.api_key=hunter2", "+reward.terms.judge.api_key=***"),
        ("tracking.uri=http://h:1/x?api=hunter2&n=3 seed=3", "tracking.uri=http://h:1/x?api=***&n=*** seed=3"),
        ("tracking.uri='sqlite:///x.db?key=hunter2' seed=3", "tracking.uri='sqlite:///x.db?key=***' seed=3"),
        ("http://h/#access_token=hunter2", "http://h/#access_token=***"),
        ("what is 3=x? see http://h/x and y=4", "what is 3=x? see http://h/x and y=4"),
        ("compass=3 layout.max_new_tokens=30 rl 3/4", "compass=3 layout.max_new_tokens=30 rl 3/4"),
        ("see http://h:80, mail a@b", "see http://h:80, mail a@b"),
        ("eval of clip 12: what is 3=x@y?", "eval of clip 12: what is 3=x@y?"),
    ],
)
def test_free_text_loses_its_secrets_and_nothing_else(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize("given", ["hunter2", "hunter%402", "hunter+2"])
def test_an_address_in_pieces_keeps_the_values_of_its_parameters_to_itself(given):
    uri = f"http://host:1/x?api={given}&n=3"
    for shown in (given, given.replace("%40", "@"), given.replace("+", " ")):
        said = public_words(f"no answer (url: /x?n=3&api={shown}/api/2.0, {uri}/api)", uri)
        assert "hunter" not in said
        assert said.startswith("no answer (url: /x?n=***&api=***")
    assert public_words("n=4 hunter2", uri) == "n=4 hunter2"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=6, max_size=20)


@given(WORDS, st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]))
def test_no_password_of_a_valid_address_is_ever_shown(word, scheme):
    secret = f"S3CRET{quote(word, safe='')}"
    for address in (
        f"{scheme}://bob:{secret}@host:5000/db",
        f"{scheme}://{secret}@host",
        f"{scheme}://h/x?key={secret}",
    ):
        assert "S3CRET" not in public_uri(address)
        assert "S3CRET" not in redact(f"error: {address} is away")


def test_settings_that_are_named_like_secrets_are_masked_and_others_stored_as_they_are():
    assert public_setting("tracking.uri", "http://a:b@h/?c=d") == "http://***@h/?c=***"
    assert public_setting("reward.terms.judge.api_key", "hunter2") == "***"
    assert public_setting("reward.terms.judge.api_key", "") == ""
    assert public_setting("layout.max_new_tokens", 30) == "30"
    assert public_setting("data.ignore_fields", ["a"]) == "['a']"
    assert public_setting("seed", 0) == "0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("reward:\n  terms:\n    judge:\n      api_key: hunter2\n      words: 6", "      api_key: ***\n      words: 6"),
        ("reward.terms.judge={target: 'a:B', api_key: hunter2, words: 6}", "api_key: ***, words: 6}"),
        ('{"password":"hunter2","a":1}', '{"password":***,"a":1}'),
        ("{'access_token': 'hunter2'}", "{'access_token': ***}"),
        ("the control token: '<x>', a pass: 3 of 4", "the control token: '<x>', a pass: 3 of 4"),
    ],
)
def test_an_entry_of_a_mapping_that_is_named_like_a_secret_is_masked(text, shown):
    assert redact(text).endswith(shown)
    assert SECRET not in redact(text)


def test_secrets_of_the_environment_are_masked_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_AbCdEfGh")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hf_AbCdEfGh/and+more=")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "short")
    monkeypatch.setenv("PWD", "/home/somebody")
    said = redact("401 (hf_AbCdEfGh), Bearer hf_AbCdEfGh/and+more=; short of /home/somebody")
    assert said == "401 (***), Bearer ***; short of /home/somebody"


def test_a_stored_setting_keeps_its_type():
    assert stored_setting("reward.terms.judge.api_key", SECRET) == "***"
    assert stored_setting("reward.terms.judge.api_key", "") == ""
    assert stored_setting("layout.max_new_tokens", 30) == 30
    assert stored_setting("a.flag", True) is True
    assert stored_setting("a.none", None) is None
    nested = {"x": [f"http://bob:{SECRET}@h/", 3], "api_key": SECRET, "y": ("a", {"token": SECRET})}
    assert stored_setting("memory.args", nested) == {
        "x": ["http://***@h/", 3],
        "api_key": "***",
        "y": ("a", {"token": "***"}),
    }
