"""The exact allocator and the clustering, against brute force."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.budget import Squeeze, Uniform, allocate, entries, kmeans_1d, squeeze_ratios

shares = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=12)


@settings(deadline=None)
@given(shares=shares, total=st.integers(0, 500), base=st.sampled_from([0.0, 0.3, 7.0, 1000.0]))
def test_sums_exactly_within_bounds(shares, total, base):
    weights, floors, caps = zip(*shares)
    floors = [min(f, c) for f, c in zip(floors, caps)]
    out = allocate(total, weights, base=base, floor=floors, cap=caps)
    assert sum(out) == min(max(total, sum(floors)), sum(caps))
    assert all(f <= x <= c for f, x, c in zip(floors, out, caps))


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12), total=st.integers(0, 500))
def test_unbounded_shares_round_their_quota(weights, total):
    out = allocate(total, weights)
    quota = [total * w / sum(weights) for w in weights]
    assert all(math.floor(q - 1e-6) <= x <= math.ceil(q + 1e-6) for q, x in zip(quota, out))


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=8), total=st.integers(0, 300))
def test_more_weight_never_means_less(weights, total):
    out = allocate(total, weights, cap=[total] * len(weights))
    pairs = sorted(zip(weights, out))
    assert all(a[1] <= b[1] + 1 for a, b in itertools.pairwise(pairs))


def test_surplus_of_capped_shares_goes_to_the_others():
    assert allocate(12, [10, 1, 1], cap=[4, 100, 100]) == [4, 4, 4]
    assert allocate(10, [1, 1, 2], cap=[9, 9, 3]) == [4, 3, 3]


def test_base_comes_before_the_weights():
    assert allocate(120, [10, 30, 60], base=10) == [19, 37, 64]
    assert allocate(120, [10, 30, 60], base=10, cap=[50, 50, 50]) == [23, 47, 50]
    assert allocate(9, [1, 0, 0], base=100) == [3, 3, 3]


def test_ties_go_to_the_smaller_index():
    assert allocate(5, [1, 1, 1]) == [2, 2, 1]


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [math.nan, 1.0], [math.inf]])
def test_refuses_weights(weights):
    with pytest.raises(ValueError, match="allocate: weights must be finite and not negative, got"):
        allocate(4, weights)


def test_refuses_lengths():
    with pytest.raises(ValueError, match="allocate: floor and cap must have 2 entries"):
        allocate(4, [1, 1], cap=[1, 2, 3])


def within(values, groups):
    total = 0.0
    for group in set(groups):
        members = [v for v, g in zip(values, groups) if g == group]
        mean = sum(members) / len(members)
        total += sum((v - mean) ** 2 for v in members)
    return total


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 30).map(lambda x: x / 30), min_size=3, max_size=8))
def test_kmeans_is_the_optimum(values):
    groups = kmeans_1d(values, 3)
    if len(set(values)) < 3:
        assert groups is None
        return
    assert sorted(set(groups)) == [0, 1, 2]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [groups[i] for i in order] == sorted(groups)  # clusters are intervals, numbered by centre
    best = min(
        within([values[i] for i in order], [0] * a + [1] * (b - a) + [2] * (len(values) - b))
        for a in range(1, len(values) - 1)
        for b in range(a + 1, len(values))
    )
    assert within(values, groups) == pytest.approx(best, abs=1e-12)


def test_squeeze_worked_example():
    cosines = [0.50, 0.60, 0.80, 0.82, 0.84, 0.97, 0.98, 0.99]
    groups = kmeans_1d(cosines, 3)
    assert groups == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [int(100 * r) for r in squeeze_ratios(groups, 8, 0.4, 0.15)] == [55] * 5 + [15] * 3


@settings(deadline=None, max_examples=50)
@given(
    cosines=st.lists(st.floats(0.1, 1), min_size=3, max_size=12),
    keep=st.sampled_from([0.05, 0.1, 0.4, 0.9, 37]),
    p=st.floats(0.05, 1),
    length=st.integers(1, 500),
)
def test_squeeze_meets_its_total_and_its_bound(cosines, keep, p, length):
    stage, layers = Squeeze(keep, p=p), len(cosines)
    settled = [row[0] for row in stage.settle(torch.tensor(cosines, dtype=torch.float64)[:, None], [length], floor=0)]
    wanted = min(layers * entries(keep, length), layers * length)
    settled = [min(target, length) for target in settled]  # a target may exceed its row, which may grow to it
    assert sum(settled) == wanted
    (bound,) = stage.first(SimpleNamespace(num_layers=layers, lengths=[length]), None)
    # one entry of rounding aside, the early cut never dropped what the final budget keeps
    assert max(settled) <= max(bound, math.ceil(wanted / layers))


@settings(deadline=None, max_examples=100)
@given(
    cosines=st.lists(st.sampled_from([0.2, 0.5, 0.8, 0.81, 0.9, 0.95, 0.99]), min_size=3, max_size=9),
    keep=st.sampled_from([0.05, 0.3, 0.9, 37]),
    p=st.floats(0.05, 1),
    length=st.integers(1, 300),
    allocation=st.sampled_from(["exact", "official"]),
)
def test_squeeze_bounds_come_down_to_the_budgets(cosines, keep, p, length, allocation):
    """Whatever the layers to come show, a measured layer gets no more than its bound, which never rises."""
    stage, layers = Squeeze(keep, p=p, allocation=allocation), len(cosines)
    measured = torch.tensor(cosines, dtype=torch.float64)[:, None]
    (first,) = stage.first(SimpleNamespace(num_layers=layers, lengths=[length]), None)
    before = [first] * layers
    for count in range(1, layers + 1):
        rows = stage.settle(measured[:count], [length], floor=0, layers=layers)
        now = [min(n, length) for [n] in rows]
        assert len(now) == count
        assert all(new <= old for new, old in zip(now, before))
        before = now + [first] * (layers - count)


def test_squeeze_bounds_free_most_of_the_first_layers():
    """32 layers at 10 %: no layer can be bounded before the third; from then on the bounds fall below the prompt."""
    stage = Squeeze(0.1)
    cosines = torch.linspace(0.5, 0.99, 32, dtype=torch.float64)[:, None]
    held = [sum(n for [n] in stage.settle(cosines[:k], [10_000], floor=0, layers=32)) for k in range(1, 32)]
    assert held[0] == 10_000
    assert max(held) < 0.35 * 32 * 10_000


def test_squeeze_is_per_row():
    importance = [[0.5, 0.99], [0.6, 0.98], [0.8, 0.8], [0.82, 0.82], [0.98, 0.6], [0.99, 0.5]]
    first, second = zip(*Squeeze(0.2).settle(torch.tensor(importance), [100, 100], floor=0))
    assert sum(first) == sum(second) == 6 * 20
    assert [x < 20 for x in first] == [x < 20 for x in reversed(second)] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, math.nan, math.inf])
def test_refuses_budgets(budget):
    with pytest.raises(ValueError, match="entries: budget must be"):
        Uniform(budget)


@pytest.mark.parametrize("budget", ["0.1", None, True])
def test_refuses_budget_types(budget):
    with pytest.raises(TypeError, match="entries: budget must be an int"):
        Uniform(budget)


def test_share_truncates():
    assert [entries(0.1, n) for n in (1, 9, 10, 19, 20)] == [1, 1, 1, 1, 2]
