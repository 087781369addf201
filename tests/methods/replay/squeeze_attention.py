"""SqueezeAttention: cosines, groups, budgets, and the kept positions of the official model runs.

The official LLaMA path cuts to the budget BEFORE it appends, so it holds budget + 1 rows after a step; ours (StreamingLLM inside)
cuts after attention: our rows after a step, plus the next token, are its rows after the next. Compared so. The official budgets
are one set for the batch, taken from row 0; ours are per row, and row 0 is compared.
"""

from __future__ import annotations

import torch

from kvcompress.budget import Squeeze, cosine_importance, kmeans_1d, squeeze_ratios
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden, rows

MISTRAL_BASE = 8000  # the constant of the official Mistral path


def replay(case: Golden) -> None:
    if "config" in case.tensors:
        budget_table(case)
    else:
        model_run(case)


def budgets(cosines: list[float], keep: float, unimportant: float, base: int) -> tuple[list[int], list[int]]:
    groups = kmeans_1d(cosines, 3)
    ratios = squeeze_ratios(groups, len(cosines), keep, unimportant)
    return groups, [int(ratio * base) for ratio in ratios]


def budget_table(case: Golden) -> None:
    columns = zip(case["config"].tolist(), case["ini_size"].tolist(), case["kv_class3"].tolist())
    for i, ((arch, layers, length), keep, unimportant) in enumerate(columns):
        assert arch in (0, 1)
        base = length if arch == 0 else MISTRAL_BASE
        groups, budget = budgets(case["cos_mean"][i, :layers].tolist(), keep, unimportant, base)
        assert groups == case["group"][i, :layers].tolist()
        assert budget == case["budget"][i, :layers].tolist()


def model_run(case: Golden) -> None:
    case.ignore("L", "E", "S", "Hq", "Hkv", "B", "sklearn_equals_exact_optimum")
    arch = case.take("arch")
    assert arch in ("llama", "mistral")
    before, after = case["h_in"], case["h_attn"]
    layers, _, length, hidden = before.shape
    # a token a row gives the cosine of each token
    tokens = cosine_importance(before[:, 0].reshape(-1, 1, hidden), after[:, 0].reshape(-1, 1, hidden))
    assert torch.allclose(tokens.view(layers, length), case["cos"], atol=1e-6)
    importance = torch.stack([cosine_importance(h, a) for h, a in zip(before, after)])  # [layers, batch]
    assert torch.allclose(importance[:, 0].double(), case["cos_mean"], atol=1e-6)

    keep, unimportant, base = case.take("ini_size"), case.take("KV_class3"), case.take("window_base")
    p = case.take("p")
    groups, budget = budgets(importance[:, 0].tolist(), keep, unimportant, base)
    assert groups == case["group"].tolist()
    assert budget == case["budget"].tolist()

    policy, steps = case.take("sequence_policy"), case.take("T")
    assert policy in ("streaming_llm", "sliding_window")
    start = case.take("start_size", None) or 0
    if base == length:  # our budget stage, as the pipeline calls it
        stage = Squeeze(keep, p=p, allocation="official")
        settled = stage.settle(list(importance[:, :1]), [length], floor=0)
        assert [row[0] for row in settled] == budget
    for index in range(layers):
        method = (
            create("streaming_llm", budget=budget[index], n_sink=start)
            if policy == "streaming_llm"
            else create("sliding_window", budget=budget[index])
        )
        pipeline = Pipeline(method.stages(), 1)
        keys = torch.randn(1, 1, length + steps, 8)
        store = pipeline.compress(LayerState(0, 1, None, keys[:, :, :length], keys[:, :, :length], [length], 1.0))
        for step in range(steps):
            pipeline.make_room(store, 1)
            store.append(keys[:, :, length + step :][:, :, :1], keys[:, :, length + step :][:, :, :1])
            held = store.max_length  # while the step attends
            assert held == int(case["n_cache"][step + 1, index])
            attended = store.positions[0, 0, :held].tolist()
            pipeline.evict(store)
        assert attended == rows(case["kept"])[index]
