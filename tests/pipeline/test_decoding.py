"""Evictions while decoding: rows of a batch as if alone, several tokens at once, schedules, what moves with the entries."""

from __future__ import annotations

import pytest
import torch

from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline

BUDGET = 24
METHODS = {
    "h2o": create("h2o", budget=BUDGET, decode=True),
    "h2o_decay": create("h2o", budget=BUDGET, decode=True, recent=4, decay=0.9),
    "h2o_q_heads": create("h2o", budget=BUDGET, decode=True, group_reduce="none"),
    "h2o_per_viewer": create("h2o", budget=BUDGET, decode=True, per_viewer=True),
    "tova": create("tova", budget=BUDGET, decode=True),
    "tova_per_head": create("tova", budget=BUDGET, decode=True, per_kv_head=True),
    "obcache": create("obcache", budget=BUDGET, window=8, decode=True),
    "obcache_pooled": create("obcache", budget=BUDGET, window=8, decode=True, pool="max", kernel_size=3),
    "morphkv": create("morphkv", budget=BUDGET, window=6),
    "morphkv_max": create("morphkv", budget=BUDGET, window=3, fuse="max"),
    "keydiff": create("keydiff", budget=BUDGET, decode=True, every=4),
    "knorm": create("knorm", budget=BUDGET, skip_layers=(), decode=True, window=2),
    "snapkv": create("while_decoding", budget=BUDGET, every=3, inner=create("snapkv", budget=BUDGET, window=5)),
    "snapkv_morphkv": create(
        "prefill_decode",
        budget=BUDGET,
        prefill=create("snapkv", budget=BUDGET, window=5),
        decode=create("morphkv", budget=BUDGET, window=4),
    ),
    "snapkv_h2o": create(
        "prefill_decode", budget=BUDGET, prefill=create("snapkv", budget=BUDGET, window=5), decode="h2o"
    ),
}
LENGTHS = [60, 60, 27, 8]  # a full row, its twin, one a little above the budget, one that still grows
STEPS = 30
Q_HEADS, KV_HEADS, DIM = 4, 2, 16


def tokens(lengths, steps, device):
    """Queries, keys, values of left-padded prompts and the steps behind them."""
    seq_len = max(lengths)
    state = []
    for heads in (Q_HEADS, KV_HEADS, KV_HEADS):
        x = 1.5 * torch.randn(len(lengths), heads, seq_len + steps, DIM, device=device)
        for row, n in enumerate(lengths):
            x[row, :, : seq_len - n] = 40.0
        state.append(x)
    return state


class Run:
    def __init__(self, method, q, k, v, lengths):
        self.q, self.k, self.v, self.next = q, k, v, max(lengths)
        self.pipeline = Pipeline(method.stages(), 1)
        start = torch.tensor([self.next - n for n in lengths], dtype=torch.int32, device=q.device)
        queries, keys, values = (x[:, :, : self.next] for x in (q, k, v))
        seq_start = start if min(lengths) < self.next else None
        layer = LayerState(0, 1, queries, keys, values, list(lengths), DIM**-0.5, seq_start)
        self.store = self.pipeline.compress(layer)

    def step(self, new=1, real=None):
        span = slice(self.next, self.next + new)
        self.next += new
        self.pipeline.make_room(self.store, new)
        self.store.append(self.k[:, :, span], self.v[:, :, span], real)
        self.attended = self.store.max_length
        out = self.pipeline.attend(self.store, self.q[:, :, span], softmax_scale=DIM**-0.5, real=real)
        self.pipeline.evict(self.store)
        return out

    def kept(self, row=0):
        return self.store.positions[row, :, : self.store.lengths[row]]


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_padded_batch_are_those_rows_alone(name, device):
    q, k, v = tokens(LENGTHS, STEPS, device)
    together = Run(METHODS[name], q, k, v, LENGTHS)
    singles = [
        Run(METHODS[name], *(x[b : b + 1, :, max(LENGTHS) - n :] for x in (q, k, v)), [n])
        for b, n in enumerate(LENGTHS)
    ]
    for _ in range(STEPS):
        out = together.step()
        for row, single in enumerate(singles):
            alone = single.step()
            assert torch.allclose(out[row], alone[0], atol=1e-5)
            assert torch.equal(together.kept(row), single.kept())
    assert max(together.store.lengths) <= BUDGET + 4
    assert torch.equal(together.kept(3)[:, :8].sort(-1).values, together.kept(3)[:, :8])  # entries stay in order


@pytest.mark.parametrize("name", METHODS)
def test_size_stays_constant(name, device):
    q, k, v = tokens([60], 3 * BUDGET, device)
    run = Run(METHODS[name], q, k, v, [60])
    held = set()
    for _ in range(3 * BUDGET):
        run.step()
        held.add(run.store.capacity)
    every = METHODS[name].stages().when.every
    assert run.attended <= BUDGET + every
    assert BUDGET <= run.store.max_length <= BUDGET + every
    assert len(held) == 1  # no buffer ever grew


def test_several_tokens_say_what_they_say_one_by_one(device):
    """11 tokens with padding between, through two calls of the attention: the same sums and rows as one after the other."""
    q, k, v = tokens([40, 33], 11, device)
    real = [11, 6]
    for name in ("h2o", "h2o_decay", "obcache", "morphkv", "tova"):
        method = METHODS[name]
        at_once = Run(method, q, k, v, [40, 33])
        at_once.pipeline.evict = lambda store: None
        at_once.step(11, real)
        for row, n in enumerate(real):
            lines = [
                torch.cat([x[row : row + 1, :, 40 - (40, 33)[row] : 40], x[row : row + 1, :, 51 - n :]], 2)
                for x in (q, k, v)
            ]
            single = Run(method, *lines, [(40, 33)[row]])
            single.pipeline.make_room(single.store, 1)
            single.pipeline.make_room = lambda store, new: None
            single.pipeline.evict = lambda store: None
            for _ in range(n):
                single.step()
            length = single.store.lengths[0]
            assert length == at_once.store.lengths[row]
            (beside,), (alone,) = at_once.store.beside.values(), single.store.beside.values()
            assert torch.allclose(beside[row, :, :length], alone[0, :, :length], rtol=1e-4, atol=1e-5), name


def test_decay_forgets(device):
    """The sums after t steps are ``sum over queries of decay ** (age in tokens) * P``, in float64, entry by entry."""
    q, k, v = tokens([20], 6, device)
    run = Run(create("h2o", budget=100, decode=True, decay=0.5), q, k, v, [20])
    keys = k.double().repeat_interleave(2, 1)
    logits = (q.double() @ keys.mT * DIM**-0.5).masked_fill(
        torch.ones(26, 26, dtype=torch.bool, device=device).triu(1), -torch.inf
    )
    map_ = logits.softmax(-1).unflatten(1, (KV_HEADS, 2)).mean(2)
    age = torch.tensor([6.0] * 20 + [5, 4, 3, 2, 1, 0], device=device, dtype=torch.float64)
    expected = (map_ * (0.5**age)[:, None]).sum(2)
    for _ in range(6):
        run.step()
    sums = run.store.beside["sums"][:, :, :26]
    assert torch.allclose(sums.double(), expected, rtol=1e-4, atol=1e-6)


def test_every_evicts_in_bursts(device):
    q, k, v = tokens([60], 40, device)
    run = Run(create("tova", budget=BUDGET, decode=True, every=8), q, k, v, [60])
    lengths = [run.step() is not None and run.store.max_length for _ in range(16)]
    assert lengths == 2 * [*range(BUDGET + 1, BUDGET + 8), BUDGET]


def test_bursts_of_morphkv_wait_for_their_size(device):
    q, k, v = tokens([30], 20, device)
    run = Run(create("morphkv", budget=20, window=4, evict_after=1.5), q, k, v, [30])
    assert run.store.max_length == 30  # below 1.5 * 21 with the next token
    attended = []
    for _ in range(14):
        run.step()
        attended.append(run.attended)
    # official: evict once L, the new token included, reaches 31.5, back to 21 of them
    assert attended == [31, 21, *range(22, 32), 21, 22]


def test_share_of_all_tokens_grows(device):
    q, k, v = tokens([60], 60, device)
    method = create("while_decoding", budget=0.25, every=1, keep=0.25, inner=create("snapkv", budget=0.25, window=4))
    run = Run(method, q, k, v, [60])
    for step in range(60):
        run.step()
        assert run.store.max_length == int(0.25 * (61 + step))


@pytest.mark.parametrize("name", ["h2o", "morphkv", "snapkv"])
def test_saved_and_reordered_stores_go_on_alike(name, device):
    q, k, v = tokens([60, 31], STEPS, device)
    run = Run(METHODS[name], q, k, v, [60, 31])
    for _ in range(5):
        run.step()
    other = Run(METHODS[name], q.flip(0), k.flip(0), v.flip(0), [31, 60])
    other.next = run.next
    other.store = DenseStore.from_state_dict(run.store.state_dict())
    other.store.select_rows(torch.tensor([1, 0]))
    for _ in range(5):
        assert torch.equal(run.step(), other.step().flip(0))
    for row in (0, 1):
        assert torch.equal(run.kept(row), other.kept(1 - row))


def test_two_runs_are_equal_to_the_bit(device):
    q, k, v = tokens(LENGTHS, STEPS, device)
    for name in ("h2o", "tova", "obcache", "morphkv"):
        a, b = (Run(METHODS[name], q, k, v, LENGTHS) for _ in range(2))
        assert all(torch.equal(a.step(), b.step()) for _ in range(STEPS))
        assert torch.equal(a.store.positions, b.store.positions)


def test_senseless_combinations_are_refused():
    with pytest.raises(ValueError, match="decode must be a method that evicts while decoding, got snapkv"):
        create("prefill_decode", budget=64, decode="snapkv")
    with pytest.raises(ValueError, match="goes by position"):
        create("prefill_decode", budget=64, decode="streaming_llm")
    with pytest.raises(ValueError, match="can rank what is left of a prompt again .* got ReceivedAttention"):
        create("while_decoding", budget=64, inner="h2o")
    with pytest.raises(ValueError, match="inner must be a method that cuts once"):
        create("while_decoding", budget=64, inner="morphkv")
    with pytest.raises(ValueError, match="budget must be more than the window of 32, got 20"):
        create("morphkv", budget=20)
    with pytest.raises(ValueError, match="every must be at least 1 entry, got 0"):
        create("tova", budget=64, decode=True, every=0)
    with pytest.raises(ValueError, match='group_reduce must be "mean", "sum" or "none" while decoding'):
        create("h2o", budget=64, decode=True, group_reduce="max")
