"""Random: the same draw everywhere, uniform, other with every seed, layer and head."""

from __future__ import annotations

import torch

from kvcompress.methods import create
from tests.methods.scoring import layer


def scores(lengths, device="cpu", *, seed=0, index=0, dtype=torch.float32):
    score = create("random", budget=0.5, seed=seed).stages().score
    return score(layer(lengths, dtype=dtype, device=device, index=index))


def test_depends_on_seed_layer_head_and_position_only(device):
    base = scores([70], device)[0].cpu()
    padded = scores([200, 70, 5], device, dtype=torch.bfloat16).cpu()
    assert torch.equal(padded[1, :, 130:], base)
    assert torch.isneginf(padded[1, :, :130]).all()
    assert torch.equal(padded[0, :, :70], base)  # a longer prompt draws on
    assert torch.equal(padded[2, :, 195:], base[:, :5])
    assert torch.equal(scores([70]), base[None])  # every device
    others = [base[0], base[1], scores([70], seed=1)[0, 0], scores([70], index=1)[0, 0]]
    assert len({tuple(other.tolist()) for other in others}) == 4


def test_is_uniform():
    drawn = scores([20000])[0]
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = torch.histc(drawn[0], 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5  # five standard deviations of a bin
    assert abs(torch.corrcoef(drawn)[0, 1]) < 5 / 20000**0.5
