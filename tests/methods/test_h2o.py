"""H2O: column sums over all queries, the recent zone, and its share of the budget."""

from __future__ import annotations

import pytest
import torch

from kvcompress.methods import create
from kvcompress.select import TopKRecent
from tests.methods.states import (
    DTYPES,
    LENGTHS,
    assert_padded_rows_equal_those_rows_alone,
    assert_scores,
    attention,
    compress,
    kept,
    prompt,
)


def column_sums(layer):
    return attention(layer).sum(2).unflatten(1, (layer.keys.shape[1], -1)).mean(2)


def per_viewer(layer):
    return column_sums(layer) / torch.arange(layer.seq_len, 0, -1, device=layer.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [column_sums, per_viewer])
def test_scores(reference, dtype, device):
    score = create("h2o", budget=0.5, per_viewer=reference is per_viewer).stages().score
    assert_scores(score, reference, prompt(LENGTHS, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("budget", "recent", "zone"), [(20, 0.5, 10), (21, 0.5, 10), (20, 4, 4), (0.4, 0.25, 6), (20, 0.0, 0)]
)
def test_recent_zone_and_the_heaviest_before_it(budget, recent, zone, device):
    layer = prompt([60], device=device)
    store = compress(create("h2o", budget=budget, recent=recent), layer)
    sums = column_sums(layer)[0]
    for head, positions in enumerate(kept(store).tolist()):
        heavy = sums[head, : 60 - zone].topk(len(positions) - zone).indices.sort().values
        assert positions == heavy.tolist() + list(range(60 - zone, 60))


@pytest.mark.parametrize("recent", [0.5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_rows(recent, dtype, device):
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    for budget in (17, 0.3):
        assert_padded_rows_equal_those_rows_alone(create("h2o", budget=budget, recent=recent), layer)


def test_two_cuts_equal_one(device):
    """From what a larger budget keeps, a smaller one takes what it would have taken from all."""
    scores, stage = torch.rand(2, 3, 80, device=device), TopKRecent(0.4)
    first = stage(scores, [50, 31]).long()
    held = scores.gather(2, first.clamp(min=0))
    end = torch.tensor([50, 31], dtype=torch.int32, device=device)
    second = stage(held, [23, 30], seq_end=end)
    once = stage(scores, [23, 30])
    for row, count in enumerate([23, 30]):
        assert torch.equal(first[row].gather(1, second[row, :, :count].long()), once[row, :, :count].long())


@pytest.mark.parametrize("recent", [1.5, -0.1])
def test_refused(recent):
    with pytest.raises(ValueError, match="TopKRecent: recent must be a share in"):
        create("h2o", budget=0.5, recent=recent)
