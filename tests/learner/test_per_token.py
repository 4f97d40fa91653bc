"""Advantages per token: even ones are, bit for bit, one per stream spread in the engine; others reach the right tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.batching import RankWork, TrainItem
from learner.losses.base import TargetCounts
from learner.losses.config import LossConfig, PolicyGradientConfig, SupervisedConfig
from learner.losses.table import LOSSES, loss_of
from learner.messages import Runs
from streams.backbone.boundary import Boundary
from tests.support.learner import GRPO, SFT, even
from tests.support.policy_losses import former_loss
from tests.support.ranks import checkpoint, groups

CUTS = [(1, 1), (150, 300), (10**5, 10**6)]
"""(row_tokens, max_tokens): a stream in each micro-batch; several rows of several streams; all in one row."""


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Sampled groups of unequal lengths, so that packing does not keep their order."""
    return groups(checkpoint(tmp_path_factory.mktemp("model") / "tiny"), [2, 9, 1, 4], media="features", streams=3)


def cut(items, rows=150, most=300):
    """(work, its micro-batches)"""
    work = RankWork(items, "target", {}, row_tokens=rows, max_tokens=most, head_chunk=16)
    return work, [work.micro_batch(i, common) for i, common in enumerate(work.micro_batches)]


def loss_for(config, work):
    targets = sum(int(log.target.sum()) for log in work.logs)
    return loss_of(config)(config, TargetCounts(targets), None), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "most"), CUTS)
def test_even_advantages_are_bit_for_bit_one_per_stream_spread_to_its_targets(items, rows, most, kl_coef, dtype):
    rng = np.random.default_rng(5)
    per_stream = rng.normal(size=12)
    given = [even(item.payload, per_stream[3 * i : 3 * i + 3]) for i, item in enumerate(items)]
    # As they travel.
    given = [replace(i, advantages=tuple(Runs.of(a).expand() for a in i.advantages)) for i in given]
    config = replace(GRPO, kl_coef=kl_coef)
    work, batches = cut(given, rows, most)
    loss, targets = loss_for(config, work)
    assert loss.needs_reference == bool(kl_coef)
    for batch in batches:
        spread = per_stream[batch.rows.stream.numpy()]
        assert batch.advantage().dtype == spread.dtype == np.float64
        assert batch.advantage().tobytes() == spread.tobytes()
        behaviour = batch.column("behaviour_logp")
        start = torch.from_numpy(behaviour + rng.normal(size=len(behaviour)) * 0.4).to(dtype)
        reference = start + 0.1 if kl_coef else None
        logp, plain = (start.clone().requires_grad_() for _ in range(2))
        found = loss(logp, torch.zeros_like(logp), batch, reference)
        value, sums = former_loss(
            plain,
            torch.from_numpy(behaviour).to(plain),
            torch.from_numpy(spread).to(plain),
            normaliser=float(targets),
            clip_low=0.2,
            clip_high=0.2,
            reference=reference,
            kl_coef=kl_coef,
        )
        found.value.backward()
        value.backward()
        assert torch.equal(found.value, value)
        assert torch.equal(logp.grad, plain.grad)
        assert found.sums.keys() == sums.keys()
        assert all(torch.equal(found.sums[name], sums[name]) for name in sums)
        assert np.array_equal(found.differences, start.double().numpy() - behaviour)


def numbered(items):
    """Every target of every stream has an advantage of its own: its stream's number and its place among its targets."""
    made, number = [], 0
    for item in items:
        advantages = []
        for log in item.payload.logs:
            number += 1
            advantages.append(number + np.arange(int(log.target.sum())) / 1024)
        made.append(TrainItem(item.payload, tuple(advantages)))
    return made


def gradients(items, rows, most):
    """-d loss / d log-prob x targets at ratio 1, by (stream, index in its log): a token's own advantage."""
    work, batches = cut(items, rows, most)
    loss, targets = loss_for(GRPO, work)
    found = {}
    for batch in batches:
        logp = torch.from_numpy(batch.column("behaviour_logp")).requires_grad_()
        loss(logp, torch.zeros_like(logp), batch, None).value.backward()
        for s, index, slope in zip(batch.rows.stream, batch.rows.target_index, logp.grad, strict=True):
            key = (work.logs[int(s)].header.stream_id, int(index))
            assert key not in found
            found[key] = -float(slope) * targets
    return found


@pytest.mark.parametrize(("rows", "most"), CUTS)
def test_values_that_differ_within_a_stream_reach_their_own_tokens(items, rows, most):
    given = numbered(items)
    expected = {}
    for item in given:
        for log, advantages in zip(item.payload.logs, item.advantages, strict=True):
            # One by one from the log, whatever the engine does with arrays.
            places = [i for i in range(len(log)) if log.target[i]]
            expected |= {(log.header.stream_id, i): a for i, a in zip(places, advantages, strict=True)}
    found = gradients(given, rows, most)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-9)
    # One token off within the streams, and two streams of a group exchanged: both would be seen.
    rolled = [replace(item, advantages=tuple(np.roll(a, 1) for a in item.advantages)) for item in given]
    assert gradients(rolled, rows, most) != pytest.approx(expected, abs=1e-4)
    stream = {key: round(value) for key, value in found.items()}
    assert len(set(stream.values())) == 12, "every stream was told apart"


def test_targets_by_turn_are_in_the_order_of_the_logs_targets(items):
    for item in items:
        for log in item.payload.logs:
            by_turn = log.targets_by_turn
            assert len(by_turn) == log.num_turns
            assert sum(by_turn) == log.target.sum() > 0
            assert np.array_equal(np.repeat(np.arange(len(by_turn)), by_turn), log.turn[log.target])


def problem(items, config=GRPO, *, reference=False, boundary=Boundary.NONE):
    return loss_of(config).problem(config, cut(items)[0], has_reference=reference, boundary=boundary)


def test_advantages_that_do_not_fit_the_logs_are_refused_by_the_stream(items):
    given = numbered(items)
    assert problem(given) is None
    first, *others = given[-1].advantages
    short = replace(given[-1], advantages=(first[:-1], *others))
    log = short.payload.logs[0]
    assert problem([*given[:-1], short]) == (
        f"stream {log.header.stream_id}: {len(first) - 1} advantages but {len(first)} target tokens"
    )
    assert problem([*given[:-1], replace(short, advantages=tuple(others))]) == "12 streams but 11 advantages"
    assert problem(items, SFT) is None, "the cold start asks for none"


MEMBERS = [
    {"ratio": "turn", "aggregate": "turn_mean"},
    {"ratio": "stream", "aggregate": "stream_mean"},
    {"entropy_coef": 0.3, "entropy_floor": 2.0, "entropy_kinds": ("think", "decision"), "aggregate": "turn_mean"},
]


@pytest.mark.parametrize("member", MEMBERS)
def test_units_of_real_logs_are_whole_however_a_step_is_cut(items, member):
    rng = np.random.default_rng(6)
    config = replace(GRPO, **member)
    moved = [rng.normal(size=len(log)) * 0.4 for item in items for log in item.payload.logs]
    given = [even(item.payload, rng.normal(size=len(item.payload.logs))) for item in items]
    found = []
    for rows, most in CUTS:
        work, batches = cut(given, rows, most)
        counts = TargetCounts.of(work.logs, SimpleNamespace(silent=-1, response=-2))
        assert counts.streams == sum(bool(log.target.any()) for log in work.logs)
        assert counts.turns == sum(len(set(log.turn[log.target].tolist())) for log in work.logs)
        loss = loss_of(config)(config, counts, None)
        total = 0.0
        for batch in batches:
            at = zip(batch.rows.stream.tolist(), batch.rows.target_index.tolist(), strict=True)
            logp = batch.column("behaviour_logp") + np.array([moved[stream][index] for stream, index in at])
            entropy = torch.from_numpy(logp**2)
            total += loss(torch.from_numpy(logp), entropy, batch, None).value.item()
        found.append(total)
    assert found == pytest.approx([found[0]] * len(CUTS), abs=1e-12)
    assert found[0] != 0


def test_every_config_has_a_loss_and_an_unknown_one_is_named():
    assert set(LOSSES) == {PolicyGradientConfig, SupervisedConfig}

    class Other(LossConfig):
        pass

    with pytest.raises(ValueError, match=r"no loss takes a Other \(known: PolicyGradientConfig, SupervisedConfig\)"):
        loss_of(Other())


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PolicyGradientConfig(0.0, 0.2), r"algorithm\.clip_low=0\.0"),
        (lambda: PolicyGradientConfig(0.2, float("nan")), r"algorithm\.clip_high=nan"),
        (lambda: PolicyGradientConfig(0.2, 0.2, -1.0), r"algorithm\.kl_coef=-1\.0"),
        (lambda: SupervisedConfig(True, 0.0, 1.0), r"sft\.decision_weight_clamp=0\.0"),
        (lambda: SupervisedConfig(True, 1.0, float("inf")), r"sft\.answer_weight=inf"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(make, key):
    with pytest.raises(ValueError, match=key):
        make()
