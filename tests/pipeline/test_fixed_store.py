"""The fixed store keeps and answers what the stages do over stores in order, step by step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kvcompress.cache import DenseStore
from kvcompress.fixed import FixedStore, Turnover
from kvcompress.fixed_ragged import RaggedFixedStore
from kvcompress.methods import create
from tests.pipeline.test_decoding import BUDGET, DIM, METHODS, Run, tokens

INV_FREQ = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
FIXED = {
    name: METHODS[name]
    for name in ("h2o", "h2o_decay", "h2o_q_heads", "tova", "tova_per_head", "morphkv", "morphkv_max")
}
FIXED |= {
    "obcache": METHODS["obcache"],
    "obcache_key": create("obcache", budget=BUDGET, window=8, decode=True, kind="key", latest_only=True),
    "snapkv_morphkv": METHODS["snapkv_morphkv"],
    "snapkv": create("snapkv", budget=BUDGET, window=5),
    "streaming_llm": create("streaming_llm", budget=BUDGET),
    "sliding_window": create("sliding_window", budget=BUDGET),
}
STEPS = 40


ADAKV = create("adakv", budget=BUDGET, inner=FIXED["snapkv"], floor=0.1)


def ragged(decode, **options):
    """AdaKV's prompt, then evictions at each head's own size."""
    decode = create(decode, budget=BUDGET, **({} if decode == "morphkv" else {"decode": True}), **options)
    return create("prefill_decode", budget=BUDGET, prefill=ADAKV, decode=decode)


RAGGED = {
    "adakv": ADAKV,
    "adakv_h2o": ragged("h2o", recent=4),
    "adakv_tova": ragged("tova", per_kv_head=True),
    "adakv_morphkv": ragged("morphkv", window=4),
    "adakv_morphkv_max": ragged("morphkv", window=3, fuse="max"),
}


class Fixed:
    """The same tokens through a fixed store."""

    def __init__(self, run: Run, method, room: int = STEPS):
        turnover = Turnover.of(method.stages())
        self.run, self.store = run, (RaggedFixedStore if turnover.is_ragged else FixedStore)(turnover)
        self.store.load(run.store, room=room)
        self.next = run.next

    def step(self, new=1):
        span = slice(self.next, self.next + new)
        self.next += new
        q, k, v = (x[:, :, span] for x in (self.run.q, self.run.k, self.run.v))
        return self.store.step(q, k, v, softmax_scale=DIM**-0.5, inv_freq=INV_FREQ.to(q.device))


def rotating(run):
    """`Run.step` for methods that move their sinks."""
    prepare = run.pipeline.prepare
    attend = run.pipeline.attend

    def prepared(store, query, **options):
        prepare(store, INV_FREQ.to(query.device))
        return attend(store, query, **options)

    run.pipeline.attend = prepared
    return run


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("lengths", [[60], [60, 27, 8]])
def test_step_by_step_as_in_order(name, lengths, device):
    method = FIXED[name]
    q, k, v = tokens(lengths, STEPS, device)
    ordered = rotating(Run(method, q, k, v, lengths))
    fixed = Fixed(Run(method, q, k, v, lengths), method)
    before = [t.data_ptr() for t in fixed.store.tensors]
    for step in range(STEPS):
        expected = ordered.step()
        assert torch.allclose(fixed.step(), expected, atol=2e-5), step
    fixed.store.check_room()
    assert before == [t.data_ptr() for t in fixed.store.tensors]
    # one more token: what the ordered store evicted after its last step, the fixed one overwrites now
    held = fixed.store.ordered_positions()
    for row in range(len(lengths)):
        for head in range(held.shape[1]):
            mine = set(held[row, head].tolist()) - {-1}
            theirs = set(ordered.kept(row)[head].tolist())
            assert theirs <= mine
            assert len(mine) - len(theirs) <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIXED | RAGGED)
def test_launches_of_a_step(name, monkeypatch):
    """Three a layer, however many rows the batch has: one more where OBCache looks at the values again, and two where a store
    by query heads has copies of the new rows made.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a launch a new tensor
    lengths = [60, 27]
    q, k, v = tokens(lengths, STEPS, "cuda")
    method = (FIXED | RAGGED)[name]
    fixed = Fixed(Run(method, q, k, v, lengths), method)
    fixed.step()
    inv_freq, span = INV_FREQ.cuda(), slice(fixed.next, fixed.next + 1)
    new = [x[:, :, span] for x in (q, k, v)]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fixed.store.step(*new, softmax_scale=DIM**-0.5, inv_freq=inv_freq)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    more = {"obcache": 1, "obcache_key": 1, "h2o_q_heads": 2}
    assert len(launches) == 3 + more.get(name, 0), launches


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("lengths", [[60], [60, 27, 8]])
def test_ragged_heads_are_stores_of_their_own(name, lengths, device):
    """Every head as if it were alone in a dense fixed store of its own size; another prompt finds the same buffers."""
    method = RAGGED[name]
    q, k, v = tokens(lengths, STEPS, device)
    run = Run(method, q, k, v, lengths)
    fixed = Fixed(run, method)
    held = run.store.padded_positions()
    sizes = run.store.head_lengths
    assert len({n for row in sizes for n in row}) > 1
    singles = []
    for row, head in itertools.product(range(len(lengths)), range(2)):
        n = sizes[row][head]
        at = held[row, head, :n].long() + max(lengths) - lengths[row]
        mine = DenseStore(
            *(x[row, head, at][None, None] for x in (k, v)), held[row, head, :n][None, None], [n], seen=[lengths[row]]
        )
        whole = len(set(sizes[row])) == 1 and n < BUDGET
        mine.targets = [BUDGET if whole else n]
        for beside, numbers in run.store.beside.items():
            mine.put_beside(beside, numbers[row, head, :n][None, None].contiguous(), fill=0.0)
        single = FixedStore(replace(fixed.store.turnover, is_ragged=False))
        single.load(mine, room=STEPS)
        singles.append((row, head, single))
    before = [t.data_ptr() for t in fixed.store.tensors]
    for step in range(STEPS):
        span = slice(fixed.next, fixed.next + 1)
        out = fixed.step()
        for row, head, single in singles:
            mine = slice(2 * head, 2 * head + 2)
            new = (x[row : row + 1, head : head + 1, span] for x in (k, v))
            alone = single.step(q[row : row + 1, mine, span], *new, softmax_scale=DIM**-0.5)
            assert torch.allclose(out[row : row + 1, mine], alone, atol=2e-5), step
    fixed.store.check_room()
    positions = fixed.store.ordered_positions()
    for row, head, single in singles:
        own = single.ordered_positions()[0, 0]
        ours = positions[row, head]
        assert torch.equal(ours[ours >= 0], own[own >= 0])
    fixed.store.load(Run(method, q, k, v, lengths).store, room=STEPS)
    assert before == [t.data_ptr() for t in fixed.store.tensors]


@pytest.mark.parametrize("name", ["h2o", "morphkv", "snapkv", *RAGGED])
def test_loading_again_keeps_the_addresses(name, device):
    method = (FIXED | RAGGED)[name]
    q, k, v = tokens([60], STEPS, device)
    fixed = Fixed(Run(method, q, k, v, [60]), method)
    first = [fixed.step() for _ in range(10)]
    before = [t.data_ptr() for t in fixed.store.tensors]
    fixed.store.load(Run(method, q, k, v, [60]).store, room=STEPS)
    fixed.next = 60
    assert all(torch.equal(a, fixed.step()) for a in first)
    assert before == [t.data_ptr() for t in fixed.store.tensors]


def test_drafts_are_taken_back_where_nobody_left(device):
    method = FIXED["snapkv"]
    q, k, v = tokens([60, 41], STEPS, device)
    fixed, other = (Fixed(Run(method, q, k, v, [60, 41]), method) for _ in range(2))
    fixed.step(11)
    fixed.store.crop(9)
    fixed.next -= 9
    other.step(2)
    assert torch.allclose(fixed.step(3), other.step(3), atol=1e-6)
    streaming = FIXED["streaming_llm"]
    ring = Fixed(Run(streaming, q, k, v, [60, 41]), streaming)
    with pytest.raises(ValueError, match="tokens must be 0 where entries are overwritten, got 2"):
        ring.store.crop(2)


def test_too_many_tokens_are_noticed(device):
    method = FIXED["snapkv"]
    q, k, v = tokens([60], STEPS, device)
    fixed = Fixed(Run(method, q, k, v, [60]), method, room=3)
    fixed.step(3)
    fixed.store.check_room()
    fixed.step(2)
    with pytest.raises(RuntimeError, match="got 2 tokens too many"):
        fixed.store.check_room()


def test_what_cannot_be_fixed_is_refused(device):
    q, k, v = tokens([60, 30], 1, device)
    for method, why in (
        (create("tova", budget=BUDGET, decode=True, every=4), "one entry a token"),
        (create("morphkv", budget=BUDGET, window=4, evict_after=1.5), "one entry a token"),
        (create("knorm", budget=BUDGET, decode=True), "a statistic that knows slots in no order, got Rescored"),
        (create("h2o", budget=BUDGET, decode=True, per_viewer=True), "per_viewer must be False"),
        (METHODS["obcache_pooled"], "slots have no neighbours"),
        (ragged("tova"), "shared must be False for heads of different counts"),
        (ragged("obcache", window=8), "heads must keep equal numbers of entries while decoding"),
    ):
        with pytest.raises(ValueError, match=why):
            Turnover.of(method.stages())
    share = create("h2o", budget=0.5, decode=True)
    with pytest.raises(ValueError, match="recent must be a count"):
        FixedStore(Turnover.of(share.stages())).load(Run(share, q, k, v, [60, 30]).store, room=1)
    later = ragged("h2o", recent=4).stages()
    with pytest.raises(ValueError, match="budget must not wait for all layers"):
        replace(create("lava", budget=BUDGET, window=5).stages(), when=later.when, decode=later.decode)
    packed = RaggedFixedStore(Turnover.of(ADAKV.stages()))
    with pytest.raises(ValueError, match="capacity must be at least the 29 entries a head"):
        packed.load(Run(ADAKV, q, k, v, [60, 30]).store, room=5, capacity=28)
    packed.load(Run(ADAKV, q, k, v, [60, 30]).store, room=5)
    with pytest.raises(NotImplementedError, match="stretches of their own"):
        packed.select_rows(torch.tensor([1, 0], device=device))
    with pytest.raises(ValueError, match="capacity must be at least the 25 entries"):
        FixedStore(Turnover.of(METHODS["h2o"].stages())).load(
            Run(METHODS["h2o"], q, k, v, [60, 30]).store, room=1, capacity=20
        )
