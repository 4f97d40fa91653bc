"""Files of a checkpoint that are missing, damaged or beside the point: named, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.model_shape import ModelGeometry
from streams.checkpoint.weights import check_weights
from streams.layout.layout import LayoutConfig
from tests.support.weights import INDEX, LFS, WHOLE, Payload, sharded

# ---- files that are not whole ----


@dataclass(frozen=True)
class Damage:
    """What is done to a file, and what the error must say besides its name."""

    do: Callable[[Path], object]
    said: str


DAMAGES = {
    "pointer": Damage(
        lambda file: file.write_text(LFS), "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    ),
    "truncated": Damage(lambda file: file.write_bytes(file.read_bytes()[:-5]), "is truncated or damaged"),
    "half": Damage(
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "is truncated or damaged"
    ),
    "header cut": Damage(lambda file: file.write_bytes(file.read_bytes()[:100]), "is damaged, or no safetensors file"),
    "empty": Damage(lambda file: file.write_bytes(b""), "is empty (0 bytes)"),
    "longer": Damage(lambda file: file.write_bytes(file.read_bytes() + b"more"), "is truncated or damaged"),
    "html": Damage(
        lambda file: file.write_text("<!DOCTYPE html><html>404</html>"), "is damaged, or no safetensors file"
    ),
    "zeros": Damage(lambda file: file.write_bytes(bytes(4096)), "is damaged, or no safetensors file"),
    "huge header": Damage(lambda file: file.write_bytes(b"\xff" * 4096), "is damaged, or no safetensors file"),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_named_with_what_to_do(folder_of, damage, shards):
    folder, file = folder_of(), WHOLE
    if shards:
        folder, (_, file) = sharded(folder)
    DAMAGES[damage].do(folder / file)
    for load in (ModelGeometry.read, lambda path: Backbone.load(path, LayoutConfig())):
        with pytest.raises(ValueError, match="download") as caught:
            load(folder)
        assert f"{folder / file} {DAMAGES[damage].said}" in str(caught.value)
        assert len(str(caught.value)) < 600


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_bytes_make_a_file_fail_otherwise_than_by_its_name(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        build_tiny(folder, TinySpec(hidden=32, layers=1, mlp=16, vision_hidden=16, vision_mlp=16, vision_depth=1))
    whole = (folder / WHOLE).read_bytes()
    cut = data.draw(st.integers(0, 4000))
    (folder / "broken").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, folder / "broken" / name)
    (folder / "broken" / WHOLE).write_bytes(
        data.draw(st.sampled_from([whole[:cut], data.draw(st.binary(max_size=99))]))
    )
    with pytest.raises(ValueError, match=r"broken/model\.safetensors"):
        check_weights(folder / "broken")


def test_shards_are_read_through_their_index(folder_of, checkpoints):
    folder, names = sharded(folder_of(), parts=3)
    save_file({"left": torch.zeros(99, 99)}, folder / "model-00004-of-00004.safetensors")
    assert ModelGeometry.read(folder).total == ModelGeometry.read(checkpoints["qwen2_5_vl"]).total
    assert "files that are not loaded (model-00004-of-00004.safetensors)" in check_weights(folder).warnings[0]
    Backbone.load(folder, LayoutConfig())
    (folder / names[1]).unlink()
    with pytest.raises(
        ValueError, match=rf"1 of the 3 files that .*index\.json names are missing: {names[1]}\. Download"
    ):
        Backbone.load(folder, LayoutConfig())


def test_an_index_that_names_what_its_files_lack_is_refused(folder_of):
    folder, (first, second) = sharded(folder_of())
    tensors = load_file(folder / first)
    gone = "lm_head.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / first, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"index\.json says that {first} hold {gone}, which they do not: download"):
        check_weights(folder)
    save_file(load_file(folder / second) | {gone: tensors[gone]}, folder / second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"says that {first} hold {gone}"):
        check_weights(folder)


def test_a_tensor_in_two_shards_is_refused(folder_of):
    folder, (first, second) = sharded(folder_of())
    more = load_file(folder / second) | {"lm_head.weight": torch.zeros(640, 64)}
    save_file(more, folder / second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"both {first} and {second} hold lm_head\.weight: keep it in one of them"):
        Backbone.load(folder, LayoutConfig())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', LFS]
)
def test_an_index_that_cannot_be_read_is_named(folder_of, text):
    folder, _ = sharded(folder_of())
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is .*download"):
        check_weights(folder)


def test_shards_without_their_index_and_adapters_without_their_base_are_named(folder_of):
    folder, (first, _) = sharded(folder_of())
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds {first}, .*but neither model\.safetensors nor .*index\.json"):
        check_weights(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights"):
        check_weights(folder)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    for _ in ("with config.json", "without"):
        with pytest.raises((FileNotFoundError, ValueError), match=r"holds an adapter .*merge it into its base model"):
            check_weights(folder)
        (folder / "config.json").unlink(missing_ok=True)


def test_no_pickle_in_a_folder_is_ever_loaded(folder_of, tmp_path):
    """Alone it is refused; beside safetensors it is not looked at, nor is an adapter's."""
    folder, made = folder_of(), tmp_path / "made"
    whole = (folder / WHOLE).read_bytes()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.ckpt"):
        torch.save(Payload(made), folder / name)
    assert len(Backbone.load(folder, LayoutConfig()).trainable()) > 0
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ValueError, match="holds an adapter"):
        Backbone.load(folder, LayoutConfig())
    for name in ("adapter_config.json", "adapter_model.bin", WHOLE):
        (folder / name).unlink()
    for load in (check_weights, ModelGeometry.read, lambda folder: Backbone.load(folder, LayoutConfig())):
        with pytest.raises(
            (FileNotFoundError, ValueError), match=r"model\.ckpt, pytorch_model\.bin: such files can run code"
        ):
            load(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or no safetensors file"):
        Backbone.load(folder, LayoutConfig())
    assert not made.exists()
    (folder / WHOLE).write_bytes(whole)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert made.exists(), "the pickle does what it should not be let do"


# ---- the files beside the weights ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LFS, r"config\.json is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        ("", r"config\.json is damaged .*download it again"),
        ("[]", r"config\.json is damaged .*download it again"),
        ('{"model_type": "llama"}', r"model type 'llama' is not supported \(supported: qwen2_5_vl, qwen3_vl\)"),
        ('{"model_type": "qwen3_vl", "vision_config": {}}', r"config\.json has no text_config or no vision_config"),
        (
            '{"model_type": "qwen2_5_vl", "vision_config": {"patch_size": "big"}}',
            r"config\.json: its sizes cannot be used",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_named(folder_of, text, said):
    folder = folder_of()
    (folder / "config.json").write_text(text)
    for load in (ModelGeometry.read, lambda path: Backbone.load(path, LayoutConfig())):
        with pytest.raises(ValueError, match=said):
            load(folder)


def test_shards_may_lie_in_a_folder_below(folder_of):
    folder, names = sharded(folder_of())
    (folder / "parts").mkdir()
    for name in names:
        (folder / name).rename(folder / "parts" / name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: f"parts/{name}" for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert check_weights(folder).warnings == ()
    Backbone.load(folder, LayoutConfig())
    del index["metadata"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged \(KeyError\('metadata'\)\)"):
        Backbone.load(folder, LayoutConfig())


def test_a_folder_without_a_tokenizer_is_refused_and_other_forms_of_one_load(folder_of):
    folder = folder_of()
    loaded = Backbone.load(folder, LayoutConfig())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").rename(folder / "aside")
    with pytest.raises(
        ValueError, match=r"has no tokenizer \(neither tokenizer\.json nor vocab\.json with merges\.txt\)"
    ):
        Backbone.load(folder, LayoutConfig())
    (folder / "tokenizer.json").write_text(LFS)
    with pytest.raises(ValueError, match=r"tokenizer\.json is a Git LFS pointer"):
        Backbone.load(folder, LayoutConfig())
    (folder / "aside").rename(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()
    assert Backbone.load(folder, LayoutConfig()).layout.banned == loaded.layout.banned
    assert model["vocab"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[]", "<!DOCTYPE html><html>404</html>", '{"a": "\udcff"}'])
def test_a_small_file_that_is_damaged_is_named_before_anything_loads(folder_of, name, content):
    folder = folder_of()
    (folder / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"{folder / name} is damaged \(\d+ bytes; .*download it again"):
        check_weights(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "generation_config.json"])
def test_a_small_file_of_which_only_the_pointer_is_there_is_named(folder_of, name):
    folder = folder_of()
    (folder / name).write_text(LFS)
    with pytest.raises(ValueError, match=rf"{folder / name} is a Git LFS pointer"):
        Backbone.load(folder, LayoutConfig())


def test_a_pointer_that_nothing_loads_is_no_reason_to_refuse(folder_of):
    folder = folder_of()
    for name in ("trainer_state.json", "training_args.bin", "README.md"):
        (folder / name).write_text(LFS)
    assert Backbone.load(folder, LayoutConfig()).layout.banned


def test_a_tokenizer_of_a_larger_model_is_refused(folder_of):
    folder = folder_of()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(640 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    full = Backbone.load(folder, LayoutConfig())
    assert full.model.lm_head.weight.shape[0] == 768, "room for the layout's own tokens is made"
    tokenizer.add_tokens(["<one_more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"its tokenizer has 641 tokens, but the weights have rows for 640"):
        Backbone.load(folder, LayoutConfig())


def test_a_folder_without_processor_files_says_which_statistics_are_used(folder_of):
    folder = folder_of("qwen3_vl")
    (folder / "preprocessor_config.json").unlink()
    (warning,) = check_weights(folder).warnings
    assert (
        "no preprocessor_config.json: frames are normalised as qwen3_vl does by default (image_mean=[0.5, 0.5, 0.5]"
        in warning
    )
    assert Backbone.load(folder, LayoutConfig()).image.mean == (0.5, 0.5, 0.5)


def test_a_folder_without_generation_settings_is_whole(folder_of):
    folder = folder_of()
    (folder / "generation_config.json").unlink()
    assert check_weights(folder).warnings == ()
