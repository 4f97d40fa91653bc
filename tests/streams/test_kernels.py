"""Which kernel runs where: `auto` never fails, a forced kernel that cannot run says why."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys

import pytest

from learner.config import LearnerConfig
from rollout.attention.flashinfer_paged import prepare_compiler
from rollout.config import RolloutConfig
from streams.backbone import kernel_choice
from streams.backbone.config import ModelConfig
from streams.backbone.kernel_choice import (
    FLASHINFER_HEAD_DIMS,
    choose_cuda_graphs,
    choose_decode_attention,
    choose_fused_kernels,
    choose_learner_attention,
    choose_rollout_attention,
    choose_vision_attention,
    has_module,
    missing_for_flashinfer,
)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Both kernel packages and a compiler can be found, whether or not this machine has them."""
    for name in ("flashinfer", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for tool in ("cuda/bin/nvcc", "bin/ninja"):
        program(tmp_path / tool)
    for library in ("cuda/lib64/libcudart.so", "cuda/lib64/stubs/libcuda.so"):
        (tmp_path / library).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / library).touch()
    # Nothing that this machine has may count.
    for name in ("FLASHINFER_NVCC", "CUDA_PATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "bin" / "python"))
    monkeypatch.setattr(kernel_choice, "DEFAULT_CUDA", str(tmp_path / "usr" / "local" / "cuda"))
    monkeypatch.setattr(kernel_choice, "LINKER_FOLDERS", (str(tmp_path / "usr" / "lib" / "*-linux-gnu"),))
    return tmp_path


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


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


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("cuda/bin/nvcc", "no nvcc ({root}/cuda/bin/nvcc"),
        ("bin/ninja", "no ninja (pip install ninja)"),
        ("cuda/lib64/stubs/libcuda.so", "no libcuda.so to link with"),
        ("cuda/lib64/libcudart.so", "no libcudart.so to link with"),
    ],
)
def test_flashinfer_gives_way_where_its_kernels_cannot_be_compiled_and_names_what_is_missing(installed, gone, named):
    """It would be found out in the first step of the first group, by every worker."""
    assert missing_for_flashinfer() == ""
    (installed / gone).unlink()
    choice = choose_rollout_attention("auto", "cuda", "bfloat16", 128)
    assert choice.name == "torch"
    assert named.format(root=installed) in choice.why
    assert choice.why.count("no ") == 1
    # By name it is the worker's to refuse: the driver's machine may lack a compiler.
    assert choose_rollout_attention("flashinfer", "cuda", "bfloat16", 128).name == "flashinfer"
    with pytest.raises(ValueError, match=re.escape(named.format(root=installed))):
        prepare_compiler()


def test_everything_that_flashinfer_lacks_is_named_at_once(installed):
    for gone in ("cuda/bin/nvcc", "bin/ninja", "cuda/lib64/stubs/libcuda.so", "cuda/lib64/libcudart.so"):
        (installed / gone).unlink()
    assert [word for word in ("nvcc", "ninja", "libcuda", "libcudart") if f"no {word}" in missing_for_flashinfer()] == [
        "nvcc",
        "ninja",
        "libcuda",
        "libcudart",
    ]


def test_the_driver_alone_brings_nothing_to_link_with_but_a_folder_of_library_path_does(installed, monkeypatch):
    (installed / "cuda/lib64/stubs/libcuda.so").unlink()
    system = installed / "usr/lib/x86_64-linux-gnu"
    system.mkdir(parents=True)
    (system / "libcuda.so.1").touch()
    assert "no libcuda.so to link with" in missing_for_flashinfer()
    (installed / "links").mkdir()
    (installed / "links" / "libcuda.so").symlink_to(system / "libcuda.so.1")
    monkeypatch.setenv("LIBRARY_PATH", f":{installed / 'links'}")
    assert missing_for_flashinfer() == ""
    monkeypatch.delenv("LIBRARY_PATH")
    (system / "libcuda.so").touch()
    assert missing_for_flashinfer() == ""


def test_the_toolkit_is_looked_for_where_flashinfer_looks(installed, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    assert f"no nvcc ({installed}/usr/local/cuda/bin/nvcc" in missing_for_flashinfer()
    monkeypatch.setenv("PATH", f"{installed}/bin:{installed}/cuda/bin")
    assert missing_for_flashinfer() == ""
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "no nvcc (/nowhere/bin/nvcc" in missing_for_flashinfer()
    monkeypatch.setenv("CUDA_HOME", str(installed / "cuda"))
    monkeypatch.setenv("FLASHINFER_NVCC", "/nowhere/nvcc")
    assert "no nvcc (/nowhere/nvcc" in missing_for_flashinfer()


@pytest.mark.parametrize("how", ["package", "folder"])
def test_kernels_that_came_compiled_need_no_compiler(installed, monkeypatch, how):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert choose_rollout_attention("auto", "cuda", "bfloat16", 128).name == "torch"
    if how == "package":
        (installed / "flashinfer_jit_cache").mkdir()
        (installed / "flashinfer_jit_cache" / "__init__.py").touch()
    else:
        kernel = installed / "flashinfer" / "data" / "aot" / "batch_prefill"
        kernel.mkdir(parents=True)
        (kernel / "batch_prefill.so").touch()
    importlib.invalidate_caches()
    assert choose_rollout_attention("auto", "cuda", "bfloat16", 128).name == "flashinfer"
    prepare_compiler()


def test_ninja_is_found_in_a_virtual_environment_that_nobody_activated(installed, monkeypatch):
    (installed / "bin/ninja").unlink()
    program(installed / "python/bin/ninja")
    assert shutil.which("ninja") is None
    assert missing_for_flashinfer() == ""
    prepare_compiler()
    assert shutil.which("ninja") == str(installed / "python/bin/ninja")
    before = os.environ["PATH"]
    assert before.startswith(str(installed / "bin"))
    prepare_compiler()
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


@pytest.fixture
def triton(tmp_path, monkeypatch):
    """A package of that name can be found, and does not interpret."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("prefill", ["torch", "flashinfer"])
def test_triton_decodes_on_cuda_whatever_begins_the_turns(triton, prefill):
    assert str(choose_decode_attention("auto", "cuda", prefill)) == "triton (auto)"
    assert str(choose_decode_attention("triton", "cuda", prefill)) == "triton (rollout.attention=triton)"
    assert str(choose_decode_attention(prefill, "cuda", prefill)) == f"{prefill} (rollout.attention={prefill})"
    assert str(choose_decode_attention("auto", "cpu", prefill)) == f"{prefill} (no CUDA, the device is cpu)"


def test_triton_begins_turns_with_what_auto_takes(installed):
    for device, head_dim in (("cuda", 128), ("cuda", 80), ("cpu", 128)):
        found = choose_rollout_attention("triton", device, "bfloat16", head_dim)
        assert found == choose_rollout_attention("auto", device, "bfloat16", head_dim)


def test_triton_decodes_on_a_cpu_in_its_interpreter_and_by_name_only(triton, monkeypatch):
    why = "rollout.attention=triton cannot run here: no CUDA, the device is cpu; use rollout.attention=auto"
    with pytest.raises(ValueError, match=re.escape(why)):
        choose_decode_attention("triton", "cpu", "torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_decode_attention("triton", "cpu", "torch").name == "triton"
    assert choose_decode_attention("auto", "cpu", "torch").name == "torch"


def test_a_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(kernel_choice, "has_module", lambda name: name != "triton")
    assert str(choose_decode_attention("auto", "cuda", "torch")) == "torch (the package triton is not installed)"
    with pytest.raises(ValueError, match=r"the package triton is not installed; use rollout.attention=auto"):
        choose_decode_attention("triton", "cuda", "torch")


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "said"),
    [
        ("auto", "cuda", "bfloat16", "triton (auto)"),
        ("auto", "cuda", "float32", "torch (float32 is not one of bfloat16, float16)"),
        ("auto", "cuda", "float64", "off (float64 is for proofs, which are about the modules of transformers)"),
        ("auto", "cpu", "bfloat16", "torch (no CUDA, the device is cpu)"),
        ("auto", "cpu", "float64", "off (float64 is for proofs, which are about the modules of transformers)"),
        ("torch", "cuda", "bfloat16", "torch (model.fused_kernels=torch)"),
        ("off", "cuda", "bfloat16", "off (model.fused_kernels=off)"),
        ("triton", "cuda", "float32", "triton (model.fused_kernels=triton)"),
    ],
)
def test_norms_rotation_and_gated_units_are_fused_in_half_precision_on_cuda(triton, asked, device, dtype, said):
    assert str(choose_fused_kernels(asked, device, dtype)) == said


def test_fused_kernels_by_name_say_what_is_missing(triton, monkeypatch):
    said = "model.fused_kernels=triton cannot run here: {}; use model.fused_kernels=auto or model.fused_kernels=torch"
    with pytest.raises(ValueError, match=re.escape(said.format("no CUDA, the device is cpu"))):
        choose_fused_kernels("triton", "cpu", "bfloat16")
    for name in ("triton", "torch"):
        with pytest.raises(ValueError, match=rf"{name} cannot run here: float64 .*; use model.fused_kernels=off"):
            choose_fused_kernels(name, "cuda", "float64")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_fused_kernels("triton", "cpu", "float32").name == "triton"
    assert choose_fused_kernels("auto", "cpu", "bfloat16").name == "torch"
    monkeypatch.setattr(kernel_choice, "has_module", lambda name: name != "triton")
    with pytest.raises(ValueError, match=re.escape(said.format("the package triton is not installed"))):
        choose_fused_kernels("triton", "cuda", "bfloat16")
    assert str(choose_fused_kernels("auto", "cuda", "bfloat16")) == "torch (the package triton is not installed)"


@pytest.mark.parametrize(
    ("asked", "device", "decode", "said"),
    [
        ("auto", "cuda", "triton", "graphs (auto)"),
        ("off", "cuda", "triton", "eager (rollout.cuda_graphs=off)"),
        ("auto", "cpu", "triton", "eager (no CUDA, the device is cpu)"),
        ("auto", "cuda", "flashinfer", "eager (flashinfer reads lengths back to the host in every step)"),
        ("auto", "cuda", "torch", "eager (torch reads lengths back to the host in every step)"),
    ],
)
def test_decode_steps_are_graphs_where_nothing_is_read_back(asked, device, decode, said):
    assert str(choose_cuda_graphs(asked, device, decode)) == said


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
        (lambda: RolloutConfig(cuda_graphs="on"), "rollout.cuda_graphs='on'"),
        (lambda: ModelConfig(vision_attention="fast"), "model.vision_attention='fast'"),
        (lambda: ModelConfig(fused_kernels="liger"), "model.fused_kernels='liger'"),
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
