"""The LM head in blocks of the vocabulary: values and gradients of the whole softmax, in the memory of a block."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.backbone.head import Asked, let_score
from tests.support.held_bytes import HeldBytes

pytestmark = pytest.mark.smoke


def head_of(vocab, hidden=6, dtype=torch.float64, seed=0):
    head = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * 2)
    let_score(head)
    return head


def given_states(count, hidden=6, dtype=torch.float64, seed=1):
    made = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def whole(head, hidden, asked):
    """The same by autograd, all logits at once."""
    logits = torch.nn.functional.linear(hidden, head.weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = (logits.to(wide) / asked.temperature).index_fill(-1, asked.banned, -torch.inf)
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp.masked_fill(logp.isneginf(), 0)).sum(-1)
    return logp.gather(-1, asked.targets[:, None])[:, 0], entropy


def gradients(made, hidden, weight, of_logp, of_entropy):
    loss = (made[0] * of_logp).sum()
    if of_entropy is not None:
        loss = loss + (made[1] * of_entropy).sum()
    return torch.autograd.grad(loss, (hidden, weight))


@settings(deadline=None)
@given(st.data())
def test_values_and_gradients_are_those_of_the_whole_softmax_whatever_the_block(data):
    vocab, count = data.draw(st.integers(2, 23)), data.draw(st.integers(0, 5))
    block = data.draw(st.integers(1, 30))
    banned = data.draw(st.lists(st.integers(0, vocab - 1), max_size=vocab - 1, unique=True))
    allowed = [i for i in range(vocab) if i not in banned]
    targets = data.draw(st.lists(st.sampled_from(allowed), min_size=count, max_size=count))
    temperature = data.draw(st.sampled_from([0.3, 1.0, 2.5]))
    wants = data.draw(st.booleans())
    asked = Asked(
        torch.tensor(targets, dtype=torch.long), torch.tensor(banned, dtype=torch.long), temperature, block, wants
    )
    head, hidden = head_of(vocab), given_states(count)
    found, wanted = head(hidden, asked), whole(head, hidden, asked)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert found[1].requires_grad == wants
    of_logp = torch.linspace(-1, 2, count, dtype=torch.float64)
    of_entropy = torch.linspace(1, -3, count, dtype=torch.float64) if wants else None
    mine, theirs = (gradients(made, hidden, head.weight, of_logp, of_entropy) for made in (found, wanted))
    for gradient, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)
    assert not mine[1][banned].any(), "a banned id is not learned about"


def test_an_entropy_alone_and_a_frozen_head_have_the_right_gradients():
    asked = Asked(torch.tensor([3, 1]), torch.tensor([0]), 0.7, 4, entropy_gradient=True)
    head, hidden = head_of(11), given_states(2)
    (mine,) = torch.autograd.grad(head(hidden, asked)[1].sum(), hidden)
    (theirs,) = torch.autograd.grad(whole(head, hidden, asked)[1].sum(), hidden)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    head.weight.requires_grad_(False)
    head(hidden, asked)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_logits_of_any_size_are_finite():
    asked = Asked(torch.tensor([0, 1, 2]), torch.tensor([], dtype=torch.long), 1.0, 2, entropy_gradient=True)
    head = head_of(5, dtype=torch.float32)
    hidden = (given_states(3, dtype=torch.float32) * 1e4).detach().requires_grad_()
    logp, entropy = head(hidden, asked)
    (logp.sum() + entropy.sum()).backward()
    for found in (logp, entropy, hidden.grad, head.weight.grad):
        assert found.isfinite().all()
    assert (entropy >= 0).all()
    logp, entropy = head(torch.zeros(3, 6), asked)
    assert logp.tolist() == pytest.approx([-1.6094379] * 3)
    assert entropy.tolist() == pytest.approx([1.6094379] * 3)


def test_half_precision_logits_are_rounded_as_the_engines_and_the_rest_is_not():
    head, hidden = head_of(40, hidden=64, dtype=torch.bfloat16), given_states(6, 64, torch.bfloat16)
    asked = Asked(torch.arange(6), torch.tensor([39]), 1.3, 16)
    found, wanted = head(hidden, asked), whole(head, hidden, asked)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=0)
    mine, theirs = (gradients(made, hidden, head.weight, torch.ones(6), None) for made in (found, wanted))
    for gradient, other in zip(mine, theirs, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, other, atol=0.05, rtol=0.02)


def test_a_model_that_is_copied_scores_with_its_own_weights_and_logits_are_as_before():
    head = head_of(9)
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.weight.zero_()
    hidden, asked = given_states(2), Asked(torch.tensor([1, 2]), torch.tensor([0]), 1.0)
    assert other(hidden, asked)[1].tolist() == pytest.approx([torch.tensor(8.0).log().item()] * 2)
    assert head(hidden, asked)[1].max() < 2
    assert head(hidden).equal(torch.nn.functional.linear(hidden, head.weight))


@pytest.mark.parametrize("wants", [False, True])
def test_the_memory_is_that_of_a_block(wants):
    vocab, count, block = 8192, 64, 512
    head, hidden = head_of(vocab, dtype=torch.float32), given_states(count, dtype=torch.float32)
    asked = Asked(torch.zeros(count, dtype=torch.long), torch.tensor([7]), 1.0, block, wants)
    head.weight.requires_grad_(False)
    held = HeldBytes()
    held.ignore([head.weight, hidden])
    with held:
        logp, entropy = head(hidden, asked)
        (logp.sum() + (entropy.sum() if wants else 0.0)).backward()
    # The logits of one block and one more of their kind, of sixteen.
    assert 2 * 4 * count * block <= held.peak < 2.2 * 4 * count * block
