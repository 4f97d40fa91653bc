"""What is frozen and what is kept: name patterns, the boundary before the mergers, bytes of clips."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.data import DataConfig
from conf.jobs import JobConfig
from conf.schema import ModelConfig, RunConfig
from learner.config import LearnerConfig
from learner.forward import encode_media
from runtime.planning.clip_cache import check_features, chunk_size
from runtime.planning.disk import OPTIMIZER_BYTES, checkpoint_size
from runtime.planning.footprint import BYTES
from streams.backbone import tower
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.boundary import Boundary
from streams.backbone.freezing import trained
from streams.backbone.tiny import build_tiny
from streams.checkpoint.model_shape import ModelGeometry
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.scoring.logprobs import score_rows
from streams.scoring.packing import pack
from streams.video.config import VideoConfig
from streams.writing.writer import TurnInput
from tests.support.geometries import THREE_B
from tests.support.streams import MODEL_TYPES, SPECS, chunk_record, loud_backbone, norms_in_input_dtype, request, run

NAMES = (
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.language_model.layers.11.mlp.up_proj.weight",
    "model.visual.patch_embed.proj.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "model.visual.merger.mlp.0.weight",
    "model.visual.deepstack_merger_list.1.linear_fc1.weight",
)


# ---- names ----


@pytest.mark.parametrize(
    ("mode", "patterns", "left"),
    [
        ("none", (), NAMES),
        ("tower", (), (*NAMES[:4], *NAMES[6:])),
        ("tower+merger", (), NAMES[:4]),
        ("tower", ("*merger*",), NAMES[:4]),
        ("none", ("model.language_model.layers.[0-9].*", "lm_head.*"), (NAMES[1], *NAMES[3:])),
        ("tower+merger", ("model.language_model.layers.*",), NAMES[:2]),
    ],
)
def test_a_mode_and_patterns_freeze_together(mode, patterns, left):
    assert trained(NAMES, mode, patterns) == list(left)


def test_a_pattern_without_a_match_is_refused_with_the_nearest_names():
    with pytest.raises(
        ValueError, match=r"learner\.freeze_names: the pattern 'model\.language_model\.embed' matches"
    ) as e:
        trained(NAMES, "none", ("lm_head*", "model.language_model.embed"))
    assert "nearest: model.language_model.embed_tokens.weight" in str(e.value)


def test_freezing_everything_is_refused():
    with pytest.raises(
        ValueError, match=r"learner\.freeze=tower\+merger with learner\.freeze_names=\['model\.l.* all 8"
    ):
        trained(NAMES, "tower+merger", ("model.language_model.*", "lm_head.*"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("mode", "patterns"), [*((mode, ()) for mode in Boundary), ("tower", ("lm_head.*",))])
def test_the_disk_estimate_counts_what_the_learner_trains(tmp_path, spec, mode, patterns):
    path = build_tiny(tmp_path, spec)
    backbone = Backbone.load(path, LayoutConfig())
    backbone.freeze(mode, patterns)
    total = sum(p.numel() for p in backbone.model.parameters())
    training = sum(p.numel() for p in backbone.trainable().values())
    size = checkpoint_size(ModelGeometry.read(path), LearnerConfig(freeze=mode, freeze_names=patterns))
    assert size.export == total * BYTES["float32"]
    assert size.resume == size.export + training * OPTIMIZER_BYTES
    assert 0 < training <= total
    assert (training < total) == (mode != "none")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_in_a_file_are_those_of_the_parameters(tmp_path, spec):
    path = build_tiny(tmp_path, spec)
    assert ModelGeometry.read(path).parameters == {
        name: p.numel() for name, p in Backbone.load(path, LayoutConfig()).model.named_parameters()
    }


def test_the_cold_start_may_freeze_other_names():
    learner = LearnerConfig(freeze_names=("lm_head.*",))
    assert learner.with_overrides({"freeze_names": ["*norm*"]}).freeze_names == ("*norm*",)
    assert learner.with_overrides({"freeze": "tower"}).freeze_names == ("lm_head.*",)


# ---- the boundary before the mergers ----


def clips(side, *shapes, seed=0):
    """uint8 clips of (chunks, temporal patches, height, width), sides in video tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (n, 2 * t, h * side, w * side, 3), np.uint8) for n, t, h, w in shapes]


# A window of the tower is 4 x 4 tokens: whole ones, cut ones, several clips in one call, two temporal patches.
SIZES = [
    [(1, 1, 1, 1)],
    [(3, 1, 2, 2)],
    [(2, 1, 4, 4)],
    [(1, 1, 8, 12)],
    [(2, 1, 5, 9), (1, 2, 3, 7)],
    [(1, 1, 13, 11), (4, 1, 1, 9)],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_kept_before_the_mergers_makes_the_towers_own_features_bit_for_bit(tmp_path, model_type, dtype):
    backbone = loud_backbone(tmp_path, dtype, model_type)
    visual = backbone.model.model.visual
    for shapes in SIZES:
        shown = clips(2 * backbone.image.patch_size, *shapes)
        with torch.no_grad():
            rows = tower.encode(tower.without_mergers(visual), backbone.image, shown, dtype)
            for row, ours, plain in zip(rows, backbone.merge(rows), backbone.encode_video(shown), strict=True):
                assert (row.shape[:2], row.shape[2]) == (plain.shape[:2], backbone.pre_merger_width)
                assert row.dtype == plain.dtype == dtype
                assert torch.equal(ours, plain)
    assert type(visual.merger).__name__.endswith("PatchMerger"), "the tower itself keeps its mergers"


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("backbone"), torch.float64, request.param)


def rows_before_mergers(backbone, shown):
    return [backbone.encoding(clip, pre_merger=True).finish() for clip in shown]


def rows_of(backbone, shown):
    """Packed rows of one stream per clip, sampled on its features."""
    with torch.no_grad():
        encoded = backbone.encode_video(shown)
    requests = []
    for i, clip in enumerate(shown):
        side = 2 * backbone.image.patch_size
        grid = (1, clip.shape[2] // side, clip.shape[3] // side)
        turns = tuple(TurnInput(chunk_record(t, grid)) for t in range(len(clip)))
        made = request(backbone, MemoryConfig("rcsm", 2), turns, f"g{i}")
        requests.append(replace(made, features=tuple(encoded[i])))
    return pack(run(backbone, requests), [[1], [0]])


def merger_gradients(backbone, rows, media):
    backbone.model.zero_grad()
    features = torch.cat([f.flatten(0, 1) for f in encode_media(backbone, media)])
    score_rows(backbone, rows, features).logp.sum().backward()
    return {n: p.grad.clone() for n, p in backbone.trainable().items() if "merger" in n}


def test_gradients_of_the_mergers_do_not_depend_on_what_is_shipped(backbone):
    shown = clips(2 * backbone.image.patch_size, (3, 1, 2, 3), (2, 1, 5, 2))
    rows = rows_of(backbone, shown)
    backbone.freeze("tower")
    kept = [("pre_merger", to_array(row)) for row in rows_before_mergers(backbone, shown)]
    frames = [("frames", clip) for clip in shown]
    wanted = merger_gradients(backbone, rows, frames)
    assert len(wanted) == len([n for n, _ in backbone.model.named_parameters() if "merger" in n])
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    for media in (kept, [frames[0], kept[1]]):
        found = merger_gradients(backbone, rows, media)
        assert max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items()) < 1e-12
    backbone.freeze("none")


def test_a_frozen_tower_keeps_no_activations_for_the_backward(backbone):
    shown = clips(2 * backbone.image.patch_size, (2, 1, 3, 3))
    with torch.no_grad():
        rows = rows_before_mergers(backbone, shown)

    def kept(make):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            assert make()[0].requires_grad
        return sum(sizes)

    whole = kept(lambda: backbone.encode_video(shown))
    backbone.freeze("tower")
    frozen, mergers = kept(lambda: backbone.encode_video(shown)), kept(lambda: backbone.merge(rows))
    backbone.freeze("none")
    # Besides what the mergers keep: where Qwen2.5-VL put each of the 18 tokens.
    assert mergers <= frozen <= mergers + 18
    assert frozen < whole / 2


def test_rows_of_another_backbone_are_refused(backbone):
    with pytest.raises(ValueError, match=rf"pre-merger rows of width 9, but {backbone.name} takes \d+"):
        backbone.merge([torch.zeros(1, 1, 9, dtype=torch.float64)])


# ---- bytes ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_estimate_is_the_real_size_where_frames_fill_the_pixel_budget(tmp_path, spec, dtype):
    path = build_tiny(tmp_path, spec)
    backbone = Backbone.load(path, LayoutConfig(), dtype=getattr(torch, dtype))
    side, turns = 2 * backbone.image.patch_size, 3
    (clip,) = clips(side, (turns, 2, 3, 5))
    video = VideoConfig(frames_per_chunk=4, max_pixels=15 * side**2)
    real = {
        "frames": clip.nbytes,
        "pre_merger": backbone.encoding(clip, pre_merger=True).finish().nbytes,
        "features": backbone.encode_video([clip])[0].nbytes,
    }
    geometry = ModelGeometry.read(path)
    for kind, nbytes in real.items():
        assert chunk_size(geometry, kind, dtype, video).nbytes * turns == nbytes, kind


def run_config(cache_mb, freeze, stages=("sft", "rl"), **data):
    return RunConfig(
        job=JobConfig("all", list(stages)),
        model=ModelConfig(dtype="bfloat16"),
        memory=MemoryConfig("full"),
        learner=LearnerConfig(freeze=freeze),
        data=DataConfig(cache_mb=cache_mb, video=VideoConfig(max_pixels=192 * 28 * 28), **data),
    )


def test_what_clips_weigh_is_said_at_the_start_of_a_stage():
    line = check_features(run_config(512, "tower"), THREE_B, "rl", 120)
    assert "clips of rl travel as pre_merger (learner.freeze=tower)" in line
    assert "192 tokens x 5120 x 2 bytes = 1.9 MiB, the longest clip (120 turns) 0.22 GiB" in line
    assert "data.cache_mb=512 holds 2 such clips on each worker" in line
    assert "2048 x 2 bytes = 0.8 MiB" in check_features(run_config(512, "tower+merger"), THREE_B, "rl", 120)
    assert "clips of sft travel as frames: a chunk of at most 301,056 pixels x 3 x 1 bytes" in check_features(
        run_config(512, "tower"), THREE_B, "sft", 120
    )


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_budget_below_one_clip_is_refused_before_the_cold_start_with_two_ways_out(stage):
    with pytest.raises(ValueError, match=r"data\.cache_mb=224 holds 0 such clips") as error:
        check_features(run_config(224, "tower"), THREE_B, stage, 120)
    assert "120 turns" in str(error.value)
    assert "set data.cache_mb to 225 or more" in str(error.value)
    assert "data.video.max_pixels" in str(error.value)
    # 120 x 192 x 5120 x 2 bytes are 225 MiB to the byte: as much is enough.
    assert "holds 1 such clips" in check_features(run_config(225, "tower"), THREE_B, "rl", 120)


def test_frames_need_no_budget():
    assert "holds 0 such clips" in check_features(run_config(1, "none"), THREE_B, "rl", 120)
    assert "holds 0 such clips" in check_features(run_config(1, "tower", stages=("sft",)), THREE_B, "sft", 120)
