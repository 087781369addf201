"""Head budgets: sums, bounds, and who wins, against a sort of all heads' scores."""

from __future__ import annotations

import pytest
import torch

from kvcompress.heads import AdaptiveHeads, counts_in_global_top


def scores_of(batch, heads, seq_len, device, forced=0):
    scores = torch.randn(batch, heads, seq_len, device=device).exp()
    scores *= torch.linspace(0.2, 3, heads, device=device)[:, None]  # heads of different weight
    if forced:
        scores[..., -forced:] = torch.inf
    return scores


def test_counts_in_global_top(device):
    scores = scores_of(2, 4, 50, device)
    counts = counts_in_global_top(scores, [37, 0])
    order = scores[0].flatten().argsort(descending=True)[:37] // 50
    assert counts[0].tolist() == torch.bincount(order.cpu(), minlength=4).tolist()
    assert counts[1].tolist() == [0, 0, 0, 0]


def test_ties_go_to_the_smaller_head(device):
    assert counts_in_global_top(torch.ones(1, 3, 4, device=device), [6]).tolist() == [[4, 2, 0]]


@pytest.mark.parametrize(("rounding", "normalise"), [("exact", False), ("exact", True), ("safeguard", False)])
@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_sums_exactly(rounding, normalise, floor, device):
    scores = scores_of(3, 4, 60, device, forced=5)
    scores[1, :, :23] = -torch.inf  # padding
    split = AdaptiveHeads(floor=floor, normalise=normalise, rounding=rounding)(scores, [20, 20, 100]).tolist()
    assert [sum(row) for row in split] == [80, 80, 240]
    for row, length in zip(split, [60, 37, 60]):
        assert all(5 <= n <= length for n in row)
    if floor == 1.0 and rounding == "exact":
        assert split[0] == [20] * 4
    if floor == 0.0:
        assert split[0][3] > split[0][0]  # the heavier head wins more


def test_floor_is_a_minimum(device):
    scores = torch.rand(1, 4, 100, device=device)
    scores[0, 0] += 10
    split = AdaptiveHeads(floor=0.2)(scores, [20]).tolist()
    assert split == [[68, 4, 4, 4]]


def test_official_rounding(device):
    scores = scores_of(1, 4, 60, device, forced=4)
    won = counts_in_global_top(torch.where(scores.isinf(), -torch.inf, scores), [4 * 13])[0].tolist()
    split = AdaptiveHeads(floor=0.2, rounding="official")(scores, [17]).tolist()
    assert split == [[4 + min(round(n * 0.8 + int(13 * 0.2)), 56) for n in won]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"floor": 1.5}, "floor must be in"),
        ({"rounding": "up"}, "rounding must be"),
        ({"skip": -1}, "skip must be at least 0 layers, got -1"),
        ({"equal_share": 3}, 'equal_share must be None unless rounding is "official", got 3'),
        ({"rounding": "safeguard", "normalise": True}, 'normalise must be off for rounding "safeguard"'),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveHeads(**arguments)
