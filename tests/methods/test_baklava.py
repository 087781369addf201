"""BaKlaVa-like budgets: the spec's worked examples, exact totals, ragged cuts, the table's file."""

from __future__ import annotations

import json

import pytest

from kvcompress.methods import create
from kvcompress.methods.baklava import BaklavaLike, CacheTable
from kvcompress.pipeline import Pipeline
from tests.methods.ragged import kept
from tests.methods.states import LENGTHS, prompt

TABLE = CacheTable(((0.1, 0.2), (0.3, 0.4)), gamma=1.0, beta=0.2)


def test_worked_examples():
    assert TABLE.budgets(50, 1000) == [[26, 42], [58, 74]]
    assert CacheTable(TABLE.importance, 2.0, 0.2).budgets(50, 1000) == [[16, 31], [58, 95]]
    assert TABLE.budgets(50, 60) == [[30, 50], [60, 60]]


@pytest.mark.parametrize("length", [1, 7, 50, 51, 64, 500])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_totals_are_exact(length, gamma, beta):
    rows = CacheTable(((0.5, 0.0, 2.0), (0.1, 0.1, 0.7)), gamma, beta).budgets(50, length)
    assert sum(map(sum, rows)) == 6 * min(50, length)
    assert all(0 <= n <= length for row in rows for n in row)
    if gamma == 0 or beta == 1:
        assert rows == [[min(50, length)] * 3] * 2


def test_cuts_each_head_to_its_own_count(device):
    """Two layers and heads; what stays are a head's best by the inner score, which a uniform cut to that count keeps too."""
    method = BaklavaLike(budget=20, table=TABLE, inner=create("snapkv", budget=9, window=4))
    pipeline = Pipeline(method.stages(), 2)
    total = 0
    for index in range(2):
        layer = prompt(LENGTHS, device=device, index=index, num_layers=2)
        store = pipeline.compress(layer)
        for row, length in enumerate(LENGTHS):
            wanted = TABLE.budgets(20, length, floor=4)[index]
            heads = kept(store, row)
            assert [len(head) for head in heads] == [min(max(n, 4), length) for n in wanted]
            total += sum(map(len, heads)) if row == 0 else 0
            for head, count in enumerate(wanted):
                if length > 20:
                    alone = Pipeline(create("snapkv", budget=max(count, 5), window=4).stages(), 1)
                    layer.index, layer.num_layers = 0, 1
                    uniform = alone.compress(layer).padded_positions()[row, head]
                    layer.index, layer.num_layers = index, 2
                    if count >= 5:
                        assert heads[head] == uniform[uniform >= 0].tolist()
    assert total == 4 * 20


def test_without_a_table_all_caches_are_alike():
    layer = prompt([90])
    ours = Pipeline(create("baklava_like", budget=40).stages(), 1).compress(layer)
    plain = Pipeline(create("snapkv", budget=40).stages(), 1).compress(layer)
    assert kept(ours) == kept(plain)


def test_the_file(tmp_path):
    path = tmp_path / "table.json"
    TABLE.save(path, model="a model")
    assert CacheTable.load(path) == TABLE
    assert json.loads(path.read_text())["model"] == "a model"
    method = create("baklava_like", budget=0.5, table=str(path))
    assert method.stages().budget.table == TABLE
    for text in ("", "{}", '{"format": "kvcompress profile 1"}', "[1]"):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"CacheTable: path must be a file of `kvcompress calibrate`.* got .*table\.json"
        ):
            create("baklava_like", budget=0.5, table=str(path))
    with pytest.raises(ValueError, match="CacheTable: path must be a file"):
        CacheTable.load(tmp_path / "none.json")


def test_refused():
    with pytest.raises(ValueError, match=r"importance must be \[layers\]\[kv heads\], got rows of \[1, 2\] numbers"):
        CacheTable(((1.0,), (1.0, 2.0)))
    with pytest.raises(ValueError, match="importance must be finite and at least 0"):
        CacheTable(((1.0, -1.0),))
    with pytest.raises(ValueError, match="gamma must be finite and at least 0, got -1"):
        CacheTable(((1.0,),), gamma=-1)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 2"):
        CacheTable(((1.0,),), beta=2)
    with pytest.raises(
        ValueError, match="baklava_like: inner must be a method with equal layer budgets, got pyramidkv"
    ):
        create("baklava_like", budget=40, inner="pyramidkv")
    pipeline = Pipeline(create("baklava_like", budget=40, table=TABLE).stages(), 1)
    with pytest.raises(ValueError, match="table must be of a model with 1 layers and 2 kv heads, got 2 and 2"):
        pipeline.compress(prompt([90]))
