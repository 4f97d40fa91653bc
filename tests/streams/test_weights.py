"""A checkpoint that lacks weights is refused before anything loads; what is right loads, and the memory estimate counts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

from conf.schema import RunConfig
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_config, build_tokenizer
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.families import FAMILIES, QWEN2_5_VL
from streams.checkpoint.model_shape import ModelGeometry
from streams.checkpoint.weights import (
    EMBEDDING,
    HEAD,
    ModelConfigFile,
    check_weights,
    expected_shapes,
    summary,
)
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from tests.support.starting import check_inputs
from tests.support.weights import SPECS, WHOLE, configured, rewrite, sharded, without

# ---- what is expected is what transformers' modules have ----


@st.composite
def specs(draw):
    qwen3 = draw(st.booleans())
    depth, layers = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return TinySpec(
        model_type="qwen3_vl" if qwen3 else "qwen2_5_vl",
        hidden=32 * draw(st.integers(1, 3)),
        layers=layers,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        mlp=draw(st.integers(1, 99)),
        vision_depth=depth,
        vision_hidden=16 * draw(st.integers(1, 3)),
        vision_mlp=draw(st.integers(1, 99)),
        vocab_rows=draw(st.integers(600, 900)),
        tie_embeddings=draw(st.booleans()),
        head_dim=draw(st.sampled_from([0, 16, 48])) if qwen3 else 0,
        patch_size=draw(st.sampled_from([14, 16])),
        deepstack=tuple(range(draw(st.integers(0, min(depth, layers - 1))))) if qwen3 else (),
    )


TOKENIZERS = {name: build_tokenizer(name) for name in ("qwen2_5_vl", "qwen3_vl")}


def modules_of(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs(), bias=st.booleans())
def test_names_and_shapes_are_those_of_the_modules(tmp_path, spec, bias):
    config = build_config(spec, TOKENIZERS[spec.model_type])
    if spec.model_type == "qwen3_vl":
        config.text_config.attention_bias = bias
    config.save_pretrained(tmp_path)
    read, model = ModelConfigFile.read(tmp_path), modules_of(config)
    assert expected_shapes(read) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert read.tied == spec.tie_embeddings


@pytest.mark.parametrize(("family", "config"), [("qwen2_5_vl", Qwen2_5_VLConfig), ("qwen3_vl", Qwen3VLConfig)])
def test_a_key_that_is_left_out_is_what_transformers_takes_for_it(family, config):
    whole = config(text_config={"bos_token_id": 1}, vision_config={"initializer_range": 0.1})
    for part, values in FAMILIES[family].defaults.items():
        theirs = {key: getattr(getattr(whole, part), key) for key in values}
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()} == values


@pytest.mark.parametrize("root", [None, True, False])
@pytest.mark.parametrize("text", [None, True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_whether_heads_are_tied_is_read_as_transformers_reads_it(checkpoints, folder_of, family, root, text):
    folder = folder_of(family)
    raw = json.loads((folder / "config.json").read_text())
    for place, value in ((raw, root), (raw["text_config"], text)):
        place.pop("tie_word_embeddings", None)
        if value is not None:
            place["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(folder).tie_word_embeddings
    assert ModelConfigFile.read(folder).tied == theirs


# ---- the check and transformers agree, whatever is done to the files ----

RENAMED = {
    "as saved": lambda name: name,
    "of transformers 4.5x": lambda name: QWEN2_5_VL.parameter_name(name),
    "of the first release": lambda name: name.replace("model.language_model.", "model.").replace(
        "model.visual.", "visual."
    ),
    "of a bare model": lambda name: QWEN2_5_VL.parameter_name(name).removeprefix("model."),
    "wrapped once more": lambda name: f"model.{QWEN2_5_VL.parameter_name(name)}",
    "of a parallel wrapper": lambda name: f"module.{name}",
    "of an adapter's wrapper": lambda name: f"base_model.model.{name}",
    "of another text model": lambda name: QWEN2_5_VL.parameter_name(name).replace("language_model", "text_model"),
}


@pytest.mark.parametrize("drop", ["", "lm_head", "embed_tokens", "layers.1.", "merger", "norm.weight", "blocks.0.attn"])
@pytest.mark.parametrize("renamed", RENAMED)
@pytest.mark.parametrize("name", SPECS)
def test_what_is_accepted_is_what_transformers_loads_whole(folder_of, name, renamed, drop):
    folder = folder_of(name)
    rename = RENAMED[renamed]
    rewrite(folder, lambda held: {rename(k): v for k, v in held.items() if not (drop and drop in k)} or held)
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    lacking = sorted(report["missing_keys"])
    if not lacking:
        assert bool(check_weights(folder).warnings) == bool(report["unexpected_keys"])
        assert Backbone.load(folder, LayoutConfig()).source == folder
        return
    with pytest.raises(
        ValueError, match=rf"{folder}.*: {len(lacking)} of \d+ weights are missing|are missing"
    ) as caught:
        check_weights(folder)
    assert f"{len(lacking)} of " in str(caught.value)
    assert summary(lacking, expected_shapes(ModelConfigFile.read(folder))) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lm_head",), "1 of 69 weights are missing: lm_head.weight; tie_word_embeddings=true"),
        (("visual",), "30 of 69 weights are missing: model.visual (30 tensors)."),
        (("layers.1.",), "12 of 69 weights are missing: model.language_model.layers.1 (12 tensors)."),
        (("layers.0.", "layers.1."), "24 of 69 weights are missing: model.language_model.layers.{0-1} (12 tensors)."),
        (("q_proj.bias",), "3 of 69 weights are missing: model.language_model.layers.{0-2}.self_attn.q_proj.bias."),
        (("model.norm.",), "1 of 69 weights are missing: model.language_model.norm.weight."),
        (("merger",), "5 of 69 weights are missing: model.visual.merger (5 tensors)."),
    ],
)
def test_what_is_missing_is_listed_by_module(folder_of, words, said):
    folder = without(folder_of(), *words)
    with pytest.raises(ValueError, match="the weights are not those that its") as caught:
        Backbone.load(folder, LayoutConfig())
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "download the checkpoint again" in str(caught.value)
    with pytest.raises(ValueError, match="are missing"):
        ModelGeometry.read(folder)


def test_a_deepstack_merger_that_is_missing_is_named(folder_of):
    folder = without(folder_of("qwen3_vl"), "deepstack_merger_list.1.")
    with pytest.raises(ValueError, match=r"6 of \d+ weights are missing: model\.visual\.deepstack_merger_list\.1 \(6"):
        Backbone.load(folder, LayoutConfig())


@pytest.mark.parametrize("name", ["qwen2_5_vl tied", "qwen3_vl tied"])
@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
def test_of_tied_weights_either_one_is_enough(folder_of, name, stored):
    folder = folder_of(name)
    whole = ModelGeometry.read(folder).total

    def only(held):
        table = next(v for k, v in held.items() if "embed_tokens" in k)
        return {k: v for k, v in held.items() if "embed_tokens" not in k} | {stored: table}

    loaded = Backbone.load(rewrite(folder, only), LayoutConfig()).model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert ModelGeometry.read(folder).total == whole == sum(p.numel() for p in loaded.parameters())
    with pytest.raises(ValueError, match=r"are missing: lm_head\.weight, model\.language_model\.embed_tokens\.weight"):
        check_weights(without(folder, "embed_tokens", "lm_head"))


def test_a_tied_head_that_differs_from_its_embedding_is_refused(folder_of):
    folder = rewrite(
        folder_of("qwen2_5_vl tied"),
        lambda held: held | {HEAD: next(v for k, v in held.items() if "embed_tokens" in k) + 1},
    )
    with pytest.raises(
        ValueError, match="tie_word_embeddings=true, but the files hold a head that is not the embedding"
    ):
        Backbone.load(folder, LayoutConfig())


# ---- shapes, dtypes, surplus ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config__vocab_size": 600}, r"lm_head\.weight, model\.language_model\.embed_tokens\.weight \[640, 64\]"),
        ({"text_config__vocab_size": 700}, r"\[640, 64\] instead of \[700, 64\]"),
        (
            {"text_config__intermediate_size": 64},
            r"layers\.\{0-2\}\.mlp\.down_proj\.weight \[64, 96\] instead of \[64, 64\]",
        ),
        ({"text_config__num_key_value_heads": 1}, r"self_attn\.k_proj\.weight.* \[32, 64\] instead of \[16, 64\]"),
        (
            {"vision_config__patch_size": 16},
            r"patch_embed\.proj\.weight \[64, 3, 2, 14, 14\] instead of \[64, 3, 2, 16, 16\]",
        ),
        ({"text_config__num_hidden_layers": 5}, r"24 of 93 weights are missing: .*layers\.\{3-4\} \(12 tensors\)"),
        ({"vision_config__depth": 3}, r"12 of 81 weights are missing: model\.visual\.blocks\.2 \(12 tensors\)"),
    ],
)
def test_sizes_that_are_not_those_of_the_config_are_refused_with_both(folder_of, changes, said):
    with pytest.raises(ValueError, match=said):
        Backbone.load(configured(folder_of(), **changes), LayoutConfig())


def test_layers_beyond_the_config_are_left_out_with_a_warning_and_not_counted(folder_of):
    folder = configured(folder_of(), text_config__num_hidden_layers=2, text_config__layer_types=None)
    (warning,) = check_weights(folder).warnings
    assert "12 tensors that the model of config.json does not have (model.language_model.layers.2." in warning
    loaded = Backbone.load(folder, LayoutConfig()).model
    assert ModelGeometry.read(folder).total == sum(p.numel() for p in loaded.parameters())


def test_strange_tensors_and_files_are_named_in_one_warning_and_not_counted(folder_of):
    folder = folder_of()
    total = ModelGeometry.read(folder).total
    rewrite(folder, lambda held: held | {"value_head.weight": torch.zeros(1, 64), "rotary_emb.inv_freq": torch.ones(4)})
    save_file({"base_model.model.layers.0.lora_A.weight": torch.zeros(999, 999)}, folder / "adapter_model.safetensors")
    save_file({"exp_avg": torch.zeros(9)}, folder / "optimizer.safetensors")
    torch.save({}, folder / "optimizer.pt")
    (warning,) = check_weights(folder).warnings
    assert "1 tensors that the model of config.json does not have (value_head.weight)" in warning
    assert "files that are not loaded (adapter_model.safetensors, optimizer.pt, optimizer.safetensors)" in warning
    assert "merge it first" in warning
    assert "inv_freq" not in warning
    assert ModelGeometry.read(folder).total == total
    assert Backbone.load(folder, LayoutConfig()).model.lm_head.weight.shape == (640, 64)


def test_a_whole_file_is_loaded_and_counted_before_the_index_beside_it(folder_of, checkpoints):
    folder, shards = sharded(folder_of())
    shutil.copy(checkpoints["qwen2_5_vl"] / WHOLE, folder / WHOLE)
    assert all(name in check_weights(folder).warnings[0] for name in shards)
    assert ModelGeometry.read(folder).total == ModelGeometry.read(checkpoints["qwen2_5_vl"]).total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_dtypes_load(folder_of, dtype):
    folder = rewrite(folder_of(), lambda held: {k: v.to(dtype) for k, v in held.items()})
    assert check_weights(folder).warnings == ()
    assert Backbone.load(folder, LayoutConfig(), dtype=torch.float32).dtype == torch.float32


def test_quantised_checkpoints_are_refused(folder_of):
    folder = rewrite(
        folder_of(),
        lambda held: {
            k: v.to(torch.float8_e4m3fn) if "down_proj" in k and "model.layers" in k else v for k, v in held.items()
        },
    )
    with pytest.raises(
        ValueError, match=r"3 weights are quantised \(F8_E4M3\): .*layers\.\{0-2\}\.mlp\.down_proj\.weight"
    ):
        Backbone.load(folder, LayoutConfig())
    configured(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"quantization_config \(fp8\): quantised weights cannot be trained"):
        check_weights(folder)


def test_two_tensors_for_one_weight_are_refused(folder_of):
    folder = rewrite(folder_of(), lambda held: held | {QWEN2_5_VL.parameter_name("model.norm.weight"): torch.zeros(64)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight .*both hold the weight|both hold the weight"):
        check_weights(folder)


# ---- the driver ----


@pytest.mark.parametrize("key", ["model.path", "algorithm.init", "algorithm.reference", "eval.checkpoint"])
def test_a_run_that_names_such_a_folder_ends_before_ray_starts_with_the_key(folder_of, tmp_path, key):
    folder = without(folder_of(), "lm_head")
    config = RunConfig(run_root=str(tmp_path / "run"), memory=MemoryConfig("full"))
    section, name = key.split(".")
    changed = replace(config, **{section: replace(getattr(config, section), **{name: str(folder)})})
    with pytest.raises(ValueError, match=rf"{key}: {folder}: .*missing: lm_head\.weight"):
        check_inputs(changed)


def test_the_check_loads_neither_torch_nor_transformers(checkpoints):
    code = (
        "import sys; from pathlib import Path; from streams.checkpoint.weights import check_weights; "
        f"check_weights(Path({str(checkpoints['qwen3_vl'])!r})); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_for_people():
    layers = [f"model.layers.{i}.{part}" for i in range(5) for part in ("a.weight", "a.bias", "b.weight")]
    assert summary(layers, layers) == "model.layers (15 tensors)"
    assert summary([n for n in layers if "layers.3" in n], layers) == "model.layers.3 (3 tensors)"
    assert summary([n for n in layers if "b." in n and "layers.3" not in n], layers) == "model.layers.{0-2,4}.b.weight"
    assert summary(f"x{i}.y" for i in range(20)).endswith(" and 12 more")
