"""The backbone beside exactness, for both families: the tower's attention and levels, gradients, loading, saving."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from learner.forward import encode_media
from rollout.decode.sampler import draw
from rollout.staging import StagedWeights
from streams.backbone.backbone import Backbone, to_array, to_tensor
from streams.backbone.boundary import Boundary
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.checkpoint.folder import check_rope_theta, token_side
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import WeightsUpdate
from streams.positions.mrope import QWEN2_5_VL_CONVENTION, QWEN3_VL_CONVENTION
from streams.scoring.logprobs import score_rows
from streams.scoring.packing import pack
from streams.writing.writer import TurnInput
from tests.support.streams import MODEL_TYPES, SPECS, chunk_record, loud_backbone, norms_in_input_dtype, request, run


def clips(side, *shapes, seed=0):
    """uint8 clips of (chunks, temporal patches, height, width), sides in video tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (n, 2 * t, h * side, w * side, 3), np.uint8) for n, t, h, w in shapes]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("backbone"), torch.float64, request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("qwen3"), torch.float64, "qwen3_vl")


class TestTower:
    def test_attention_over_spans_equals_transformers_loop_over_them(self, backbone, monkeypatch):
        """One SDPA call per length of span against one per span, spans of one length and of several."""
        side = token_side(backbone.source)
        alike, mixed = clips(side, (3, 1, 2, 2)), clips(side, (2, 1, 1, 2), (1, 2, 2, 2), (2, 1, 3, 1))
        with torch.no_grad():
            ours = [*backbone.encode_video(alike), *backbone.encode_video(mixed)]
            monkeypatch.setattr(backbone.model.config.vision_config, "_attn_implementation", "sdpa")
            theirs = [*backbone.encode_video(alike), *backbone.encode_video(mixed)]
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

    def test_a_frame_sees_no_other_frame(self, backbone):
        """Features of a chunk do not depend on what else is encoded in the same call."""
        side = token_side(backbone.source)
        several = clips(side, (3, 1, 2, 2), (2, 1, 1, 2))
        with torch.no_grad():
            together = backbone.encode_video(several)
            alone = [backbone.encode_video([clip[i : i + 1]])[0] for clip in several for i in range(len(clip))]
        torch.testing.assert_close(torch.cat([f.flatten(0, 1) for f in together]), torch.cat([f[0] for f in alone]))

    def test_features_hold_the_embedding_and_every_level_in_the_towers_order(self, qwen3):
        side = token_side(qwen3.source)
        (clip,) = clips(side, (2, 1, 2, 3))
        seen = {}
        tower = qwen3.model.model.visual
        modules = [tower.merger, *tower.deepstack_merger_list]
        hooks = [m.register_forward_hook(lambda m, _, out: seen.setdefault(id(m), out)) for m in modules]
        try:
            with torch.no_grad():
                features = qwen3.encode_video([clip])[0]
        finally:
            for hook in hooks:
                hook.remove()
        width = qwen3.model.config.text_config.hidden_size
        assert features.shape == (2, 6, qwen3.feature_width)
        assert qwen3.feature_width == width * (1 + len(tower.deepstack_merger_list)) == 3 * width
        for part, module in zip(features.flatten(0, 1).split(width, dim=-1), modules, strict=True):
            assert torch.equal(part, seen[id(module)])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_features_travel_bit_for_bit(self, dtype):
        rows = torch.randn(2, 4, 12).to(dtype)
        again = to_tensor(to_array(rows))
        assert again.dtype == dtype
        assert torch.equal(again, rows)


class TestGradients:
    def rows_and_media(self, backbone):
        side = token_side(backbone.source)
        media = [("frames", clip) for clip in clips(side, (4, 1, 2, 2), (3, 1, 1, 2))]
        with torch.no_grad():
            encoded = encode_media(backbone, media)
        requests = []
        for i, (_, clip) in enumerate(media):
            grid = (1, clip.shape[2] // side, clip.shape[3] // side)
            turns = tuple(TurnInput(chunk_record(t, grid)) for t in range(len(clip)))
            made = request(backbone, MemoryConfig("rcsm", 2), turns, f"g{i}")
            requests.append(replace(made, features=tuple(encoded[i])))
        return pack(run(backbone, requests), [[1], [0]]), media

    @pytest.mark.parametrize("mode", tuple(Boundary))
    def test_they_reach_the_whole_tower_and_every_level_unless_it_is_frozen(self, backbone, mode):
        rows, media = self.rows_and_media(backbone)
        backbone.freeze(mode)
        backbone.model.zero_grad()
        features = torch.cat([f.flatten(0, 1) for f in encode_media(backbone, media)])
        score_rows(backbone, rows, features).logp.sum().backward()
        tower = dict(backbone.model.model.visual.named_parameters())
        for name, p in tower.items():
            trains = mode == "none" or (mode == "tower" and "merger" in name)
            assert (p.grad is not None and p.grad.abs().max() > 0) == trains, name
            assert (f"model.visual.{name}" in backbone.trainable()) == trains
        assert backbone.embed(torch.tensor([0])).requires_grad
        backbone.freeze("none")

    def test_the_gradient_of_a_level_is_that_of_its_numbers(self, qwen3):
        """Against finite differences, for one number of the embedding and of each level: the row is split in place."""
        rows, media = self.rows_and_media(qwen3)
        with torch.no_grad():
            features = torch.cat([f.flatten(0, 1) for f in encode_media(qwen3, media)])
        features.requires_grad_(True)
        score_rows(qwen3, rows, features).logp.sum().backward()
        width, step = qwen3.model.config.text_config.hidden_size, 1e-6
        for column in (3, width + 3, 2 * width + 3):
            value = []
            for sign in (-1, 1):
                moved = features.detach().clone()
                moved[5, column] += sign * step
                with torch.no_grad():
                    value.append(float(score_rows(qwen3, rows, moved).logp.sum()))
            slope = (value[1] - value[0]) / (2 * step)
            assert features.grad[5, column].abs() > 1e-6
            assert float(features.grad[5, column]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


class Whole(TorchDispatchMode):
    """Counts operations that make a tensor of [rows, vocabulary] of their own: neither views nor in place."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = all(returned.alias_info is None for returned in func._schema.returns)
        if fresh and func is not torch.ops.aten._unsafe_view.default:
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.made += [(func.__name__, t.dtype) for t in tensors if t.numel() == self.numel]
        return out


class TestLogits:
    ROWS = 5

    @pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
    def given(self, request, qwen3):
        """A backbone in that dtype, hidden states, and what its head says of them in the dtype of the logits."""
        dtype = request.param
        other = copy.deepcopy(qwen3)
        other.model.lm_head.to(dtype)
        width = other.model.config.text_config.hidden_size
        hidden = torch.randn((self.ROWS, width), generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            head = other.model.lm_head(hidden)
        return other, hidden, head if dtype == torch.float64 else head.float()

    def test_they_are_widened_divided_and_banned_bit_for_bit(self, given):
        backbone, hidden, head = given
        scales = torch.tensor([0.3, 1.0, 3.0, 0.7, 1.7], dtype=torch.float64)
        with torch.no_grad():
            rows = backbone.logits(hidden, scales)
            for row, scale in enumerate(scales.tolist()):
                wanted = (head / scale).index_fill(-1, torch.tensor(backbone.layout.banned), -torch.inf)
                # The engine's rows of several temperatures, and the learner's one temperature for all.
                assert rows.dtype == wanted.dtype
                assert rows[row].equal(wanted[row])
                assert backbone.logits(hidden, scale).equal(wanted)

    def test_beside_product_and_softmax_all_rows_are_copied_once_and_once_to_be_summed(self, given):
        backbone, hidden, head = given
        with torch.no_grad(), Whole(head.numel()) as whole:
            logits = backbone.logits(hidden, torch.ones(self.ROWS, dtype=torch.float64))
        assert whole.made == [("mm.default", hidden.dtype), ("div.Tensor", head.dtype)]
        count = torch.arange(self.ROWS)
        with Whole(head.numel()) as whole:
            draw(logits, False, count, count)
        assert whole.made == [("_log_softmax.default", head.dtype), ("_to_copy.default", torch.float64)]

    def test_the_gradient_passes_through_the_ban_list_and_the_temperature(self, given):
        backbone, hidden, head = given
        weights = [hidden.clone().requires_grad_(), backbone.model.lm_head.weight.requires_grad_()]
        logp = torch.log_softmax(backbone.logits(weights[0], 0.7), dim=-1)
        allowed = torch.ones(head.shape[-1], dtype=torch.bool)
        allowed[list(backbone.layout.banned)] = False
        upstream = torch.randn(logp[:, allowed].shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad((logp[:, allowed] * upstream).sum(), weights)
        plain = torch.log_softmax((weights[0] @ weights[1].T).to(head.dtype)[:, allowed] / 0.7, dim=-1)
        wanted = torch.autograd.grad((plain * upstream).sum(), weights)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


class TestLoading:
    def test_each_family_records_its_own_position_convention(self, backbone):
        assert (
            backbone.position_convention
            == {
                "qwen2_5_vl": QWEN2_5_VL_CONVENTION,
                "qwen3_vl": QWEN3_VL_CONVENTION,
            }[backbone.name]
        )
        assert QWEN2_5_VL_CONVENTION != QWEN3_VL_CONVENTION

    @pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "text_config"])
    def test_a_rotary_base_is_found_wherever_releases_write_it(self, tmp_path, place):
        rope = {"rope_type": "default", "mrope_section": [6, 5, 5]}
        text = {"rope_theta": 5e6, "rope_scaling": rope}
        if place != "text_config":
            text = {place: rope | {"rope_theta": 5_000_000}}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text}))
        check_rope_theta(tmp_path)

    def test_a_qwen3_vl_config_without_rope_theta_is_refused_by_name(self, tmp_path):
        path = build_tiny(tmp_path / "tiny", QWEN3_SPEC)
        config = json.loads((path / "config.json").read_text())
        assert config["text_config"]["rope_parameters"].pop("rope_theta") == 5e6
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model\.path=.*no text_config\.rope_theta"):
            Backbone.load(path, LayoutConfig())

    def test_another_model_type_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
        with pytest.raises(ValueError, match=r"'qwen3' is not supported \(supported: qwen2_5_vl, qwen3_vl\)"):
            Backbone.load(tmp_path, LayoutConfig())

    @pytest.mark.parametrize("patch", [14, 16])
    def test_the_side_of_a_video_token_comes_from_the_checkpoint(self, tmp_path, patch):
        path = build_tiny(tmp_path, replace(QWEN3_SPEC, patch_size=patch))
        assert token_side(path) == 2 * patch == replace(QWEN3_SPEC, patch_size=patch).token_side
        assert Backbone.load(path, LayoutConfig()).image.patch_size == patch

    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_round_trip_changes_no_weight_and_keeps_the_tie(self, tmp_path, spec, tied):
        first = Backbone.load(build_tiny(tmp_path / "tiny", replace(spec, tie_embeddings=tied)), LayoutConfig())
        first.save(tmp_path / "copy", {})
        again = Backbone.load(tmp_path / "copy", LayoutConfig())
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "copy")
        for model in (again.model, plain):
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            theirs = model.state_dict()
            assert theirs.keys() == first.model.state_dict().keys()
            assert all(torch.equal(value, theirs[name]) for name, value in first.model.state_dict().items())
        assert again.layout.tokens == first.layout.tokens

    def test_an_export_is_whole_when_the_folder_it_was_loaded_from_is_gone(self, tmp_path):
        """A run that goes on from a checkpoint deletes it later (checkpoint.keep): the exports must not lose by that."""
        source = build_tiny(tmp_path / "tiny", TinySpec())
        (source / "video_preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
        backbone = Backbone.load(source, LayoutConfig())
        backbone.save(tmp_path / "before", {})
        shutil.rmtree(source)
        backbone.save(tmp_path / "after", {})
        before, after = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("before", "after"))
        assert before == after
        assert {"preprocessor_config.json", "video_preprocessor_config.json"} <= after.keys()
        assert Backbone.load(tmp_path / "after", LayoutConfig()).image == backbone.image

    def test_an_export_that_lost_its_processor_is_refused(self, tmp_path):
        Backbone.load(build_tiny(tmp_path / "tiny"), LayoutConfig()).save(tmp_path / "export", {})
        (tmp_path / "export" / "preprocessor_config.json").unlink()
        with pytest.raises(
            ValueError, match=r"trained with image_mean=\[0\.5, 0\.5, 0\.5\].*preprocessor_config\.json back"
        ):
            Backbone.load(tmp_path / "export", LayoutConfig())

    def test_a_damaged_processor_file_is_named(self, tmp_path):
        source = build_tiny(tmp_path / "tiny")
        (source / "preprocessor_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged"):
            Backbone.load(source, LayoutConfig())

    def test_image_statistics_are_read_from_the_one_file_of_transformers_5(self, tmp_path):
        source = build_tiny(tmp_path / "tiny")
        processor = json.loads((source / "preprocessor_config.json").read_text())
        (source / "preprocessor_config.json").unlink()
        together = {"image_processor": processor | {"image_mean": [0.1, 0.2, 0.3]}, "video_processor": None}
        (source / "processor_config.json").write_text(json.dumps(together))
        image = Backbone.load(source, LayoutConfig()).image
        assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.25, 0.25, 0.25))

    def test_tied_weights_are_published_once_and_arrive_in_both_places(self, tmp_path):
        path = build_tiny(tmp_path, replace(QWEN3_SPEC, tie_embeddings=True))
        learner, worker = Backbone.load(path, LayoutConfig()), Backbone.load(path, LayoutConfig())
        with torch.no_grad():
            for p in learner.model.parameters():
                p.add_(0.5)
        tensors = {name: p.detach().contiguous() for name, p in learner.trainable().items()}
        assert not [name for name in tensors if "lm_head" in name]
        buffer = np.concatenate([t.view(-1).view(torch.uint8).numpy() for t in tensors.values()])
        shapes = tuple(tuple(t.shape) for t in tensors.values())
        update = WeightsUpdate(1, tuple(tensors), shapes, "float32", buffer)
        StagedWeights.stage(update, worker).apply(worker)
        theirs = learner.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in worker.model.state_dict().items())
        assert worker.model.lm_head.weight is worker.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_type": "llava"}, r"model\.tiny\.model_type='llava' is not one of qwen2_5_vl, qwen3_vl"),
        ({"deepstack": (0,)}, r"model\.tiny\.deepstack=\[0\].*qwen2_5_vl has neither"),
        ({"head_dim": 16}, r"model\.tiny\.head_dim=16: qwen2_5_vl has neither"),
        ({"model_type": "qwen3_vl", "deepstack": (1, 0)}, "ascending vision layers"),
        ({"model_type": "qwen3_vl", "deepstack": (2,)}, r"below model\.tiny\.vision_depth=2"),
        ({"model_type": "qwen3_vl", "deepstack": (0, 1), "layers": 2}, r"model\.tiny\.layers=2 must be larger"),
    ],
)
def test_impossible_tiny_shapes_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        TinySpec(**wrong)
