"""Which kernel runs where: `auto` never fails, a forced kernel that cannot run says why."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from learner.config import LearnerConfig
from rollout.attention.flashinfer_paged import find_ninja
from rollout.config import RolloutConfig
from streams.backbone.config import ModelConfig
from streams.backbone.kernel_choice import (
    FLASHINFER_HEAD_DIMS,
    choose_learner_attention,
    choose_rollout_attention,
    choose_vision_attention,
    has_module,
)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Both kernel packages and a compiler can be found, whether or not this machine has them."""
    for name in ("flashinfer", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("FLASHINFER_NVCC", raising=False)
    return tmp_path


def test_the_fast_kernels_are_chosen_where_they_run(installed):
    assert choose_learner_attention("auto", "cuda").name == "flex"
    assert choose_vision_attention("auto", "cuda", "bfloat16").name == "flash_attn"
    for head_dim in FLASHINFER_HEAD_DIMS:
        assert choose_rollout_attention("auto", "cuda", "bfloat16", head_dim).name == "flashinfer"
        assert choose_rollout_attention("flashinfer", "cuda", "float16", head_dim).name == "flashinfer"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "why"),
    [
        ("cpu", "bfloat16", 128, "no CUDA, the device is cpu"),
        ("cuda", "float32", 128, "float32 is not one of bfloat16, float16"),
        ("cuda", "bfloat16", 80, "heads of 80 are not among 64, 128, 256"),
    ],
)
def test_flashinfer_gives_way_to_torch_and_says_why(installed, device, dtype, head_dim, why):
    choice = choose_rollout_attention("auto", device, dtype, head_dim)
    assert str(choice) == f"torch ({why})"
    with pytest.raises(ValueError, match=re.escape(f"rollout.attention=flashinfer cannot run here: {why}")):
        choose_rollout_attention("flashinfer", device, dtype, head_dim)


def test_flashinfer_without_a_compiler_gives_way_unless_its_kernels_came_compiled(installed, monkeypatch):
    """It would be found out in the first step of the first group, by every worker."""
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    choice = choose_rollout_attention("auto", "cuda", "bfloat16", 128)
    assert choice.name == "torch"
    assert choice.why.startswith("flashinfer compiles its kernels and there is no /nowhere/bin/nvcc: install")
    assert choose_rollout_attention("flashinfer", "cuda", "bfloat16", 128).name == "flashinfer"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(installed / "cuda" / "bin"))
    assert choose_rollout_attention("auto", "cuda", "bfloat16", 128).name == "flashinfer"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    (installed / "flashinfer_jit_cache").mkdir()
    (installed / "flashinfer_jit_cache" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert choose_rollout_attention("auto", "cuda", "bfloat16", 128).name == "flashinfer"


@pytest.mark.skipif(not Path(sys.executable).with_name("ninja").is_file(), reason="ninja is not beside the interpreter")
def test_ninja_is_found_in_a_virtual_environment_that_nobody_activated(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") is None
    find_ninja()
    assert shutil.which("ninja")
    before = os.environ["PATH"]
    assert before.startswith(str(tmp_path))
    find_ninja()
    assert os.environ["PATH"] == before


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [("cpu", "bfloat16", "no CUDA, the device is cpu"), ("cuda", "float32", "float32 is not one of bfloat16, float16")],
)
def test_flash_attn_gives_way_to_sdpa_and_says_why(installed, device, dtype, why):
    assert str(choose_vision_attention("auto", device, dtype)) == f"sdpa ({why})"
    with pytest.raises(ValueError, match=re.escape(f"model.vision_attention=flash_attn cannot run here: {why}")):
        choose_vision_attention("flash_attn", device, dtype)


@pytest.mark.skipif(has_module("flashinfer") or has_module("flash_attn"), reason="a kernel package is installed")
def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"the package flashinfer-python is not installed; use rollout.attention=auto"):
        choose_rollout_attention("flashinfer", "cuda", "bfloat16", 128)
    with pytest.raises(ValueError, match=r"the package flash-attn is not installed; use model.vision_attention=auto"):
        choose_vision_attention("flash_attn", "cuda", "bfloat16")
    assert choose_rollout_attention("auto", "cuda", "bfloat16", 128).name == "torch"


def test_flex_cannot_train_on_the_cpu():
    assert choose_learner_attention("auto", "cpu").name == "sdpa"
    with pytest.raises(
        ValueError, match=r"learner.attention=flex cannot run here: FlexAttention has no backward on CPU"
    ):
        choose_learner_attention("flex", "cpu")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: LearnerConfig(attention="fast"), "learner.attention='fast'"),
        (lambda: RolloutConfig(attention="fast"), "rollout.attention='fast'"),
        (lambda: ModelConfig(vision_attention="fast"), "model.vision_attention='fast'"),
    ],
)
def test_an_unknown_kernel_is_refused_by_the_config(make, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        make()


def test_a_switch_is_overridden_by_a_switch_only():
    config = LearnerConfig().with_overrides({"activation_checkpointing": True})
    assert config.activation_checkpointing
    with pytest.raises(ValueError, match="activation_checkpointing=1 must be a bool"):
        LearnerConfig().with_overrides({"activation_checkpointing": 1})
    with pytest.raises(ValueError, match="lr=True must be a float"):
        LearnerConfig().with_overrides({"lr": True})
