"""What the prompt's own attention leaves behind, its log-sum-exp and its output, in place of what a score would make again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.attend import attend_with_lse
from kvcompress.methods import available, create
from kvcompress.pipeline import Pipeline
from kvcompress.score import attention_output
from tests.methods.states import DTYPES, LENGTHS, assert_scores, attention, prompt
from tests.methods.test_h2o import column_sums
from tests.methods.test_obcache import formula

PARAMETERS = {"baklava": None, "compactor": {"budget": 0.3}, "laq": {"budget": 40, "window": 8}}


def given(layer):
    """The layer as a model loop hands it over: the log-sum-exp is None where the attention has none to give."""
    starts = [layer.seq_len - n for n in layer.lengths]
    output, lse = attend_with_lse(
        layer.queries, layer.keys, layer.values, softmax_scale=layer.softmax_scale, starts=starts
    )
    return replace(layer, lse=lse, output=output)


def window_sums(layer):
    """SnapKV's votes without a pool: the last 8 queries over the prefix, the window itself always kept."""
    rows = min(8, layer.seq_len)
    votes = attention(layer, rows).sum(2).unflatten(1, (layer.keys.shape[1], -1)).mean(2)
    votes[:, :, layer.seq_len - rows :] = torch.inf
    return votes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "parameters", "reference"),
    [
        ("h2o", {}, column_sums),
        ("snapkv", {"budget": 20, "window": 8, "pool": "none"}, window_sums),
        ("tova", {}, lambda layer: attention(layer, 1)[:, :, 0].mean(1, keepdim=True).expand(-1, 2, -1)),
        ("prefixkv", {}, lambda layer: attention(layer).sum(2).mean(1, keepdim=True).expand(-1, 2, -1)),
    ],
)
def test_scores_with_the_log_sum_exp(name, parameters, reference, dtype, device):
    """To the same tolerance as without: twice the error of plain float32, and the rounding of a dot."""
    layer = given(prompt(LENGTHS, dtype=dtype, device=device))
    assert (layer.lse is None) == ((device == "cpu") == (dtype != torch.float32))
    assert_scores(create(name, **{"budget": 0.5, **parameters}).stages().score, reference, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["value", "key", "joint"])
@pytest.mark.parametrize("window", [8, None])
def test_obcache_takes_the_output_as_it_was(window, kind, dtype, device):
    # no row of one token: there v - o is 0, and what is left of it rounding alone
    layer = given(prompt([n for n in LENGTHS if n > 1], dtype=dtype, device=device))
    score = create("obcache", budget=20, kind=kind, window=window, recent=8).stages().score
    assert_scores(score, formula(kind, window), layer, lambda row: {"output": layer.output[row : row + 1]})
    made, _ = attention_output(layer, layer.queries)
    step = 2 * torch.finfo(dtype).eps  # torch's kernel rounds probabilities to the dtype, ours nothing but the output
    real = [slice(layer.seq_len - n, None) for n in layer.lengths]
    for row, span in enumerate(real):
        most = layer.values[row, :, span].float().abs().max()
        assert ((made - layer.output)[row, :, span].float().abs() <= step * most + 1e-5 * most).all()


@pytest.mark.parametrize("name", sorted(available()))
@pytest.mark.parametrize("field", ["lse", "output"])
def test_who_wants_it_says_so(name, field):
    """NaN in place of it shows in the scores or budgets of the methods that ask for it, and of no other."""
    parameters = PARAMETERS.get(name, {"budget": 0.5})
    if parameters is None:
        pytest.skip("needs a table of its own, and makes no score")
    pipeline = Pipeline(create(name, **parameters).stages(), 1)
    layer = given(prompt([90]))
    layer.inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    if pipeline.stages.lookahead is not None:
        layer.lookahead, layer.lookahead_lengths = layer.queries[:, :, :4], [4]
    poisoned = replace(layer, **{field: torch.full_like(getattr(layer, field), torch.nan)})

    def seen(state):
        scores = pipeline.stages.score(state)
        budget = pipeline.stages.budget
        try:
            measured = budget.measure(state, lambda: scores)
        except NotImplementedError:
            measured = torch.tensor(budget.first(state, lambda: scores)).float()
        return torch.cat([scores.flatten(), measured.flatten().float()])

    same = torch.equal(seen(poisoned).nan_to_num(-1), seen(layer).nan_to_num(-1))
    assert same != getattr(pipeline, f"wants_{field}")
