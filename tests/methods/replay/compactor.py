"""Compactor: raw and z-scored leverage and attention, scores, and for kvpress the kept sets.

kvpress takes its z-scores over the whole batch, so that a row's result depends on its neighbours; ours are a row's own. The
pieces are compared with z-scores taken here over the batch, the kept sets with the scores made of them, and, where the
batch is one row, with the method's own. The stored sketches replace ours; kvpress draws one for each head.

Leverage is compared where the case calls it valid: elsewhere a block has hardly more entries than the sketch has columns.

Kept sets, with and without the filling of pages, come from the method's own stages over the scores compared before, where all of
these are valid and the quota holds the protected entries: a smaller one drops some of them there, and none here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.methods.compactor import LeverageAndAttention
from kvcompress.pipeline import Pipeline
from kvcompress.rotary import rerotate
from kvcompress.select import topk
from tests.methods.golden import Golden
from tests.methods.ragged import kept as kept_positions
from tests.reference.rotary import frequencies

EPS = torch.finfo(torch.float32).eps


def replay(case: Golden) -> None:
    case.choose("mode", {"official": official, "kvpress": kvpress})(case)


def sketched_by(phi: torch.Tensor, score: LeverageAndAttention) -> LeverageAndAttention:
    class Given(LeverageAndAttention):
        def projection(self, head_dim: int) -> torch.Tensor:
            return phi

    return Given(**{field.name: getattr(score, field.name) for field in fields(score)})


def unrotated(keys: torch.Tensor, **given) -> LayerState:
    """A layer whose rotation is none, for keys that are given as they were before RoPE."""
    batch, _, length, dim = keys.shape
    return LayerState(0, 1, None, keys, keys, [length] * batch, dim**-0.5, inv_freq=torch.zeros(dim // 2), **given)


def official(case: Golden) -> None:
    case.ignore("Hq", "D", "lens")
    page_size = case.take("page_size")
    block = case.take("leverage_chunk")
    first, last, ratio = case.take("protected_first"), case.take("protected_last"), case.take("ratio")
    method = create(
        "compactor",
        budget=float(ratio),
        accounting="official",
        heads="layer",
        sketch=case.take("sketch"),
        leverage_block=block if block > 0 else None,
        regulariser=case.take("regularizer"),
        blend=case.take("blend"),
        chunk=case.take("attn_chunk"),
        logit_scale=case.take("sm_scale"),
        tail="official",
        sink=first,
        window=last,
    )
    heads = case.take("Hkv")
    score = sketched_by(case["phi"], method.stages().score)
    bounds = case["cu_seqlens"].tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        length = stop - start

        def row(name: str, start: int = start, stop: int = stop) -> torch.Tensor:  # [N, H, ...] -> [1, H, n, ...]
            return case[name][start:stop].transpose(0, 1)[None]

        keys, before = row("k"), row("key_pre")
        layer = LayerState(0, 1, row("q"), keys, row("v"), [length], 1.0)
        valid = case["leverage_valid"][start:stop].bool()
        attention, leverage = score.attention(layer), score.leverage(unrotated(before))
        loose = attention_error(layer, score)
        assert torch.allclose(attention, row("attn_raw"), rtol=loose, atol=0)
        attention_z = z_score(attention, 0)
        loose *= float(attention.max() / attention.std())
        assert torch.allclose(attention_z, row("attn_z"), rtol=loose, atol=loose)

        leverage_z, loose_z = torch.empty_like(leverage), torch.empty_like(leverage)
        size = score.leverage_block or length
        for at in range(0, length, size):
            part = slice(at, min(at + size, length))
            if valid[part].all():
                error = leverage_error(before[:, :, part] @ case["phi"], score.regulariser)
                assert torch.allclose(leverage[:, :, part], row("leverage_raw")[:, :, part], rtol=0, atol=error)
                loose_z[:, :, part] = 2 * error / leverage[:, :, part].std()
            leverage_z[:, :, part] = z_score(leverage[:, :, part], 0)
        difference = (leverage_z - row("leverage_z"))[:, :, valid].abs()
        assert (difference <= loose_z[:, :, valid] * (1 + leverage_z[:, :, valid].abs())).all()
        scores = attention_z + score.blend * leverage_z
        scores[:, :, :first] = scores[:, :, length - last :] = torch.inf
        inner = valid & scores[0, 0].isfinite()
        assert torch.isposinf(row("scores")[:, :, ~scores[0, 0].isfinite()]).all()
        difference = (scores - row("scores"))[:, :, inner].abs()
        loose_score = (loose + score.blend * loose_z) * (1 + attention_z.abs() + leverage_z.abs())
        assert (difference <= loose_score[:, :, inner]).all()

        retain = max(1, round(ratio * (length - first - last) * heads))
        assert retain == case["retain"][index]
        if valid.all() and retain >= (first + last) * heads:
            for pages, lens, masks in (
                (1, "head_lens_exact", ("keep", "stored_exact")),
                (page_size, "head_lens_padded", ("stored_padded",)),
            ):
                stages = replace(replace(method, page_size=pages).stages(), score=Known(scores))
                store = Pipeline(stages, 1).compress(layer)
                assert store.head_lengths == [case[lens][index].tolist()]
                mask = torch.zeros(length, heads, dtype=torch.uint8)
                for head, held in enumerate(kept_positions(store)):
                    mask[held, head] = 1
                for name in masks:
                    assert torch.equal(mask, case[name][start:stop]), name


class Known:
    """A score that is known already."""

    by_position, queries = False, 0

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def __call__(self, layer: LayerState) -> torch.Tensor:
        return self.scores


def kvpress(case: Golden) -> None:
    case.ignore("Hq", "Hkv", "D", "B", "S")
    keys, values = case["k"], case["v"]
    batch, heads, length, dim = keys.shape
    kept, blend = case.take("n_kept"), case.take("blend")
    assert kept == int(length * (1 - case.take("compression_ratio")))
    first, last = case.take("sink_start"), case.take("sink_end")
    method = create(
        "compactor",
        budget=kept,
        sketch=case.take("sketch"),
        leverage_block=None,
        regulariser=1e-2,
        blend=blend,
        chunk=case.take("attn_chunk"),
        value_norm=True,
        kernel_size=3,
        tail="kvpress",
        protected="unscored",
        sink=first,
        window=last,
    )
    score = sketched_by(case["phi"], method.stages().score)
    inv_freq = frequencies(case["cos"], case["sin"], first=0)
    queries = rerotate(case["query_pre"], torch.arange(length), inv_freq)
    layer = LayerState(0, 1, queries, keys, values, [length] * batch, dim**-0.5, inv_freq=inv_freq)
    attention, leverage = score.attention(layer), score.leverage(layer)
    attention_z, leverage_z = z_score(attention, 1, batch=True), z_score(leverage, 1, batch=True)
    middle = slice(first, length - last)
    # values' norms and the average over neighbours add no more than the same roundings again
    loose_a = 2 * attention_error(layer, score) * float(attention.max() / attention.std())
    assert torch.allclose(attention_z, case["attn_z"], rtol=loose_a, atol=loose_a)
    # keys turned back to before RoPE differ from the official ones by a rounding each: as much as the sketch's own
    error = leverage_error(case["key_pre"][:, :, middle] @ case["phi"], score.regulariser)
    loose_l = 2 * error / float(leverage.std())
    assert torch.allclose(leverage_z, case["leverage_z"], rtol=loose_l, atol=loose_l)
    scores = torch.full((batch, heads, length), torch.inf)
    scores[:, :, first : length - last] = attention_z + blend * leverage_z
    loose = loose_a + blend * loose_l
    assert torch.allclose(scores[:, :, middle], case["scores"][:, :, middle], rtol=loose, atol=loose)
    assert torch.equal(topk(scores, kept), case["indices"])
    if batch == 1:
        store = Pipeline(replace(method.stages(), score=score), 1).compress(layer)
        assert torch.equal(store.positions[:, :, :kept], case["indices"])


def z_score(x: torch.Tensor, correction: int, *, batch: bool = False) -> torch.Tensor:
    dims = (0, 1, 2) if batch else (1, 2)
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, correction=correction, keepdim=True)


def attention_error(layer: LayerState, score: LeverageAndAttention) -> float:
    """Relative error of a float32 column sum: that of the logits (head_dim roundings), and of two sums over a chunk."""
    dim, group = layer.keys.shape[-1], layer.queries.shape[1] // layer.keys.shape[1]
    norms = [t.norm(dim=-1).max() for t in (layer.queries, layer.keys)]
    logit = float(norms[0] * norms[1]) * (score.logit_scale or layer.softmax_scale)
    return 2 * EPS * (dim + score.chunk + group * score.chunk + logit * dim**0.5)


def leverage_error(x: torch.Tensor, regulariser: float) -> float:
    """Absolute error of a leverage (at most 1) from a float32 Gram matrix and its inverse: eps times the condition."""
    x = (x - x.mean(-2, keepdim=True)).double()
    eigenvalues = torch.linalg.eigvalsh(x.mT @ x) + regulariser
    return float(2 * EPS * x.shape[-1] ** 0.5 * (eigenvalues[..., -1] / eigenvalues[..., 0]).max())
