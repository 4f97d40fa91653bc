"""The sampler, and the byte budget of a worker's caches: what is drawn, and what a cache may hold."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.decode import sampler
from rollout.decode.sampler import draw, stream_seed
from streams.support.byte_cache import ByteBudgetCache

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.integers(0, 2**31)
LARGEST = 1 - 2.0**-53


def signed(values) -> torch.Tensor:
    """int64 with the bits of uint64."""
    return torch.from_numpy(np.asarray(values, np.uint64).view(np.int64))


def uniforms(seeds, indices) -> np.ndarray:
    return sampler.uniforms(signed(seeds), signed(indices)).numpy()


def pick(logits, greedy, seeds, indices) -> tuple[np.ndarray, np.ndarray]:
    ids, logps = draw(logits, torch.from_numpy(greedy), signed(seeds), signed(indices))
    return ids.numpy(), logps.numpy()


def draws(logits, n, seed=7):
    """n draws from one row of logits, each with its own token index."""
    rows = torch.as_tensor(logits).expand(n, -1)
    return pick(rows, np.zeros(n, bool), np.full(n, seed, np.uint64), np.arange(n))


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_is_drawn_from_its_own_logits_which_stay_as_they_are(dtype):
    logits = torch.randn((3, 50), generator=torch.Generator().manual_seed(0), dtype=dtype)
    given, seeds, indices = logits.clone(), signed([1, 2, 3]), signed([4, 5, 6])
    ids, logps = draw(logits, False, seeds, indices)
    assert logits.equal(given)
    for row in range(3):
        one = slice(row, row + 1)
        alone = draw(logits[one], False, seeds[one], indices[one])
        assert ids[one].equal(alone[0])
        assert logps[one].equal(alone[1])
        assert logps[row].item() == logits[row].log_softmax(0)[ids[row]].item()


# --- uniforms ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(SEEDS, INDICES), min_size=1, max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_uniform_depends_on_seed_and_index_only_not_on_its_batch(pairs, random):
    seeds = np.array([seed for seed, _ in pairs], np.uint64)
    indices = np.array([index for _, index in pairs], np.int64)
    together = uniforms(seeds, indices)
    assert together.dtype == np.float64
    assert ((together >= 0) & (together < 1)).all()
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert np.array_equal(uniforms(seeds[order], indices[order]), together[order])
    alone = [uniforms(seeds[i : i + 1], indices[i : i + 1])[0] for i in range(len(pairs))]
    assert np.array_equal(together, alone)


@given(st.lists(st.tuples(SEEDS, INDICES), min_size=1, max_size=20))
def test_uniforms_are_those_of_unsigned_arithmetic(pairs):
    """SplitMix64's finaliser on Python integers, which have no sign bit to repeat."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    wanted = [(mix(mix(seed) ^ index) >> 11) * 2.0**-53 for seed, index in pairs]
    assert uniforms([seed for seed, _ in pairs], [index for _, index in pairs]).tolist() == wanted


@pytest.mark.parametrize("along", ["indices", "seeds"])
def test_uniforms_are_uniform_and_uncorrelated_along_indices_and_along_seeds(along):
    n = 40_000
    count, fixed = np.arange(n), np.full(n, 5)
    seeds, indices = (fixed, count) if along == "indices" else (count, fixed)
    u = uniforms(seeds.astype(np.uint64), indices)
    counts = np.bincount((u * 64).astype(int), minlength=64)
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert chi_square(counts, np.full(64, 1 / 64)) < 63 + 5 * 11.3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(n)
    assert len(np.unique(u)) == n


def test_the_largest_uniform_stays_below_one(monkeypatch):
    monkeypatch.setattr(sampler, "_mix", lambda x: torch.full_like(x, -1))
    assert uniforms(np.zeros(1, np.uint64), np.zeros(1, np.int64))[0] == LARGEST
    assert LARGEST < 1


def test_a_streams_seed_depends_on_the_run_and_on_its_identity_and_fits_a_signed_integer():
    seeds = {
        stream_seed(run, f"{epoch}/t{task}/{g}")
        for run in (0, 1)
        for epoch in (0, 1)
        for task in range(9)
        for g in range(8)
    }
    assert len(seeds) == 2 * 2 * 9 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(3, "0/a/1") == stream_seed(3, "0/a/1")


# --- draw -------------------------------------------------------------------------------------------------------------


def test_frequencies_approach_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -2.0, 0.7, 1.9])
    ids, _ = draws(logits, 40_000)
    p = torch.softmax(logits.double(), -1).numpy()
    # 7 degrees of freedom: 24.3 is exceeded once in a thousand; the draws are fixed.
    assert chi_square(np.bincount(ids, minlength=8), p) < 24.3


def test_frequencies_approach_the_softmax_of_the_ids_that_are_not_banned():
    logits = torch.tensor([-torch.inf, 0.5, -torch.inf, 1.5, -0.5, -torch.inf])
    ids, _ = draws(logits, 20_000, seed=11)
    counts = np.bincount(ids, minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    # 2 degrees of freedom: 13.8 once in a thousand.
    assert chi_square(counts[[1, 3, 4]], torch.softmax(logits.double(), -1).numpy()[[1, 3, 4]]) < 13.8


ROW = st.lists(st.one_of(st.none(), st.floats(-40, 40, width=32)), min_size=2, max_size=40).filter(
    lambda row: any(value is not None for value in row)
)


@given(ROW, st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-52, LARGEST]))
@settings(max_examples=300, deadline=None)
def test_a_banned_id_is_never_drawn_at_the_edges_of_the_unit_interval(row, u):
    logits = torch.tensor([[-torch.inf if value is None else value for value in row]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "uniforms", lambda seeds, indices: torch.full((len(seeds),), u, dtype=torch.float64))
        ids, logp = pick(logits, np.zeros(1, bool), np.zeros(1, np.uint64), np.zeros(1, np.int64))
    assert 0 <= ids[0] < len(row)
    assert row[ids[0]] is not None
    assert np.isfinite(logp[0])


def test_the_inverse_cdf_gives_each_id_its_own_interval(monkeypatch):
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    for u, expected in ((0.0, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.76, 2), (LARGEST, 2)):
        monkeypatch.setattr(
            sampler, "uniforms", lambda seeds, indices, u=u: torch.full((len(seeds),), u, dtype=torch.float64)
        )
        ids, _ = pick(logits, np.zeros(1, bool), np.zeros(1, np.uint64), np.zeros(1, np.int64))
        assert ids[0] == expected


@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_each_row_is_drawn_as_if_it_were_alone_greedy_rows_by_argmax_all_with_their_log_prob(n, vocabulary, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (n, vocabulary)).astype(np.float32))
    logits[torch.from_numpy(rng.random((n, vocabulary)) < 0.3)] = -torch.inf
    logits[:, int(rng.integers(vocabulary))] = 1.0
    greedy = rng.random(n) < 0.5
    seeds = rng.integers(0, 2**63, n).astype(np.uint64)
    indices = rng.integers(0, 10_000, n)
    ids, logp = pick(logits, greedy, seeds, indices)
    assert ids.dtype == np.int64
    assert logp.dtype == np.float64
    assert np.array_equal(ids[greedy], logits.argmax(-1).numpy()[greedy])
    expected = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(ids)[:, None])[:, 0]
    assert np.array_equal(logp, expected.double().numpy())
    order = rng.permutation(n)
    shuffled, _ = pick(logits[torch.from_numpy(order)], greedy[order], seeds[order], indices[order])
    assert np.array_equal(shuffled, ids[order])
    for i in range(n):
        one = slice(i, i + 1)
        alone, _ = pick(logits[one], greedy[one], seeds[one], indices[one])
        assert alone[0] == ids[i]


def test_greedy_takes_the_first_of_equal_logits():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    ids, _ = pick(logits, np.ones(1, bool), np.zeros(1, np.uint64), np.zeros(1, np.int64))
    assert ids[0] == 1


# --- the byte budget --------------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "get", "clear"]), st.sampled_from("abcdef"), st.integers(0, 14)),
    max_size=60,
)


@given(st.integers(0, 20), OPERATIONS)
@settings(max_examples=250, deadline=None)
def test_the_cache_is_never_above_its_budget_and_forgets_the_least_recently_used(budget, operations):
    cache: ByteBudgetCache[int] = ByteBudgetCache(budget)
    model: OrderedDict[str, tuple[int, int]] = OrderedDict()
    for i, (operation, key, nbytes) in enumerate(operations):
        if operation == "clear":
            cache.clear()
            model.clear()
        elif operation == "get":
            assert cache.get(key) == model.get(key, (None, 0))[0]
            if key in model:
                model.move_to_end(key)
        else:
            cache.put(key, i, nbytes)
            model.pop(key, None)
            if nbytes <= budget:
                model[key] = (i, nbytes)
                while sum(size for _, size in model.values()) > budget:
                    model.popitem(last=False)
        assert cache.used == sum(size for _, size in model.values()) <= budget
        assert len(cache) == len(model)
    # From the oldest to the newest, so that reading does not change the order that is compared.
    assert [cache.get(key) for key in model] == [value for value, _ in model.values()]


def test_what_was_read_outlives_what_was_not():
    cache: ByteBudgetCache[str] = ByteBudgetCache(2)
    cache.put("a", "A", 1)
    cache.put("b", "B", 1)
    assert cache.get("a") == "A"
    cache.put("c", "C", 1)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("A", None, "C")


def test_a_value_above_the_budget_is_not_kept_and_costs_the_others_nothing():
    cache: ByteBudgetCache[str] = ByteBudgetCache(4)
    cache.put("a", "A", 3)
    cache.put("big", "B", 5)
    assert cache.get("big") is None
    assert cache.get("a") == "A"
    cache.put("a", "too large now", 5)
    assert cache.get("a") is None, "the old value must not pass for the new one"
