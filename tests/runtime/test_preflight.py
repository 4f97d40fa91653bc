"""What the preflight makes of what the nodes report, and what a node reports of itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.data import DataConfig
from conf.schema import ClusterConfig, ModelConfig, RunConfig
from runtime.placing.nodes import (
    DRIVER_FILE,
    PACKAGES,
    NeededPath,
    NodeReport,
    ProbeRequest,
    code_digest,
    installed_versions,
    probe,
    reply_file,
    stamp,
)
from runtime.placing.preflight import (
    PreflightError,
    check_checkpoint_names,
    check_nodes,
    needed_paths,
    sample_videos,
)
from streams.memory import MemoryConfig
from streams.support.files import PACKAGES as OUR_PACKAGES
from tests.support.project import ROOT

DRIVER = NodeReport("driver", {"python": "3.11.7", "torch": "2.13.0"}, "abc", "/code")


def like_driver(node):
    return replace(DRIVER, node=node)


# ---- judging ----


@given(st.lists(st.text(min_size=1, max_size=5), max_size=4))
def test_nodes_that_see_what_the_driver_sees_are_no_problem(names):
    assert check_nodes([like_driver(name) for name in names], DRIVER) == []


@given(st.sets(st.sampled_from(["python", "torch", "code", "shared", "missing"])), st.booleans())
def test_every_difference_of_a_node_is_named_with_the_node_and_none_else(wrong, other_node_too):
    report = like_driver("bad")
    if wrong & {"python", "torch"}:
        report = replace(report, versions={p: "9" if p in wrong else v for p, v in DRIVER.versions.items()})
    if "code" in wrong:
        report = replace(report, code="xyz")
    if "shared" in wrong:
        report = replace(report, shared="there is no folder /run there")
    if "missing" in wrong:
        report = replace(report, missing=(("model.path", "/m: No such file"),))
    reports = [like_driver("good"), report] + ([replace(report, node="worse")] if other_node_too else [])
    problems = check_nodes(reports, DRIVER)
    assert len(problems) == len(wrong)
    for problem in problems:
        assert problem.startswith("2 nodes (bad, worse): " if other_node_too else "node bad: ")


def test_a_package_that_a_node_lacks_is_a_difference():
    (problem,) = check_nodes([replace(DRIVER, node="n", versions={"python": "3.11.7"})], DRIVER)
    assert "node n: torch is not installed there, 2.13.0 on the driver: install the same version" in problem


def test_many_missing_videos_become_one_line():
    report = replace(DRIVER, node="n", missing=tuple(("data.train, a video", f"/v{i}.mp4: gone") for i in range(9)))
    (problem,) = check_nodes([report], DRIVER)
    assert "/v0.mp4: gone; /v1.mp4: gone; /v2.mp4: gone; and 6 more" in problem


def test_all_problems_are_in_one_message():
    error = PreflightError(["first: do this", "second: do that"])
    assert str(error).splitlines() == [
        "the cluster is not ready for this run, 2 problems:",
        "  1. first: do this",
        "  2. second: do that",
    ]


# ---- what a node reports ----


@pytest.fixture
def request_of(tmp_path):
    """The preflight's folder as the driver leaves it, and a request about it."""
    folder = tmp_path / "run" / ".preflight-1"
    folder.mkdir(parents=True)
    (folder / DRIVER_FILE).write_text("nonce")
    return ProbeRequest(str(folder), "nonce")


def test_a_node_that_shares_run_root_reads_and_answers(request_of):
    report = probe("n", request_of)
    assert (report.shared, report.missing) == ("", ())
    assert (Path(request_of.folder) / reply_file("n")).read_text() == "nonce"
    assert report.versions == installed_versions()
    assert report.code == code_digest({package: ROOT / package for package in OUR_PACKAGES})
    assert report.code_path == str(ROOT)
    assert check_nodes([report], replace(report, node="driver")) == []


def test_another_folder_of_the_same_name_is_noticed(request_of):
    request_of = replace(request_of, wait_s=0.0)
    (Path(request_of.folder) / DRIVER_FILE).write_text("of an earlier run")
    assert "is not the driver's" in probe("n", request_of).shared
    (Path(request_of.folder) / DRIVER_FILE).unlink()
    assert "No such file" in probe("n", request_of).shared


def test_a_node_without_run_root_says_so(tmp_path):
    request = ProbeRequest(str(tmp_path / "nowhere" / ".preflight-1"), "nonce", wait_s=0.0)
    assert probe("n", request).shared == f"there is no folder {tmp_path / 'nowhere'} there"


def test_a_file_that_appears_late_is_waited_for(request_of):
    file = Path(request_of.folder) / DRIVER_FILE
    file.unlink()
    late = subprocess.Popen(["sh", "-c", f"sleep 0.5; printf nonce > {file}"])
    assert probe("n", request_of).shared == ""
    late.wait()


def test_files_and_folders_that_are_missing_or_differ_are_named(tmp_path, request_of):
    video, model = tmp_path / "a.mp4", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    video.write_bytes(b"1234")
    needed = tuple(NeededPath(key, str(path), stamp(str(path))) for key, path in (("video", video), ("model", model)))
    request = replace(request_of, needed=needed)
    assert probe("n", request).missing == ()
    video.write_bytes(b"12")
    (model / "config.json").unlink()
    (key, size), (other, count) = probe("n", request).missing
    assert (key, other) == ("video", "model")
    assert "(2 bytes there, 4 bytes on the driver)" in size
    assert "folder of 0 files" in count
    video.unlink()
    assert "No such file" in probe("n", request).missing[0][1]


def test_the_digest_changes_with_the_code_and_with_nothing_else(tmp_path):
    (tmp_path / "streams").mkdir()
    file = tmp_path / "streams" / "a.py"
    file.write_text("A = 1\n")
    folders = {"streams": tmp_path / "streams"}
    first = code_digest(folders)
    (tmp_path / "streams" / "note.txt").write_text("x")
    (tmp_path / "other.py").write_text("x")
    assert code_digest(folders) == first
    # The folder that holds the packages differs between a checkout, an installed wheel and what Ray unpacks.
    moved = shutil.copytree(tmp_path / "streams", tmp_path / "elsewhere" / "streams")
    assert code_digest({"streams": moved}) == first
    file.write_text("A = 2\n")
    assert code_digest(folders) != first
    assert code_digest({"streams": moved, "rl": tmp_path / "streams"}) != code_digest({"streams": moved})


def test_a_node_answers_without_importing_a_package():
    """Otherwise a node that lacks torch could not say so, and one that has it would take seconds."""
    code = "import runtime.placing.nodes, sys; print([m for m in ('torch', 'numpy', 'ray', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(installed_versions()) == {"python", *PACKAGES}


# ---- what is asked ----


def rows(folder, names):
    path = folder / "rows.jsonl"
    row = {"end": 3, "queries": [{"time": 0, "text": "now?"}], "answers": [{"time": 1, "text": "red"}]}
    path.write_text("".join(json.dumps({"id": n, "video": n, **row}) + "\n" for n in names))
    return path


def test_videos_are_sampled_over_the_whole_file_and_those_that_nobody_has_are_left_out(tmp_path):
    names = [f"{i}.mp4" for i in range(100)]
    for name in names[:99]:
        (tmp_path / name).write_bytes(b"v")
    file = rows(tmp_path, names)
    sampled = sample_videos(DataConfig(), file, count=5)
    assert [path.name for path in sampled] == ["0.mp4", "25.mp4", "50.mp4", "74.mp4"]
    with open(file, "a") as lines:
        lines.write("{broken\n")
    assert sample_videos(DataConfig(), file, count=2) == [tmp_path / "0.mp4"]


def test_every_node_must_see_task_files_videos_and_checkpoints(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "a.mp4").write_bytes(b"v")
    file = str(rows(tmp_path, ["a.mp4", "gone.mp4"]))
    config = RunConfig(
        run_root=str(tmp_path / "run"),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=file, heldout=file),
        cluster=ClusterConfig(address="auto"),
    )
    found = [(need.key, Path(need.path).name) for need in needed_paths(config)]
    assert found == [
        ("model.path", "model"),
        ("data.train", "rows.jsonl"),
        ("data.train, a video", "a.mp4"),
        ("data.heldout", "rows.jsonl"),
        ("data.heldout, a video", "a.mp4"),
    ]


def test_a_relative_checkpoint_and_a_hub_id_are_refused_where_others_would_not_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("model")
    full = MemoryConfig("full")
    relative = RunConfig(model=ModelConfig(path="model"), memory=full)
    hub = RunConfig(model=ModelConfig(path="owner/name"), memory=full)
    assert "model.path=model is relative" in check_checkpoint_names(relative, 1)[0]
    assert check_checkpoint_names(hub, 1) == []
    assert "the other 2 do not see it" in check_checkpoint_names(hub, 3)[0]
