"""The fixed store keeps and answers what the stages do over stores in order, step by step."""

from __future__ import annotations

import pytest
import torch

from kvcompress.fixed import FixedStore, Turnover
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


class Fixed:
    """The same tokens through a fixed store."""

    def __init__(self, run: Run, method, room: int = STEPS):
        self.run, self.store = run, FixedStore(Turnover.of(method.stages()))
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
@pytest.mark.parametrize("name", FIXED)
def test_launches_of_a_step(name, monkeypatch):
    """Three a layer, however many rows the batch has: one more where OBCache looks at the values again, and two where a store
    by query heads has copies of the new rows made.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a launch a new tensor
    lengths = [60, 27]
    q, k, v = tokens(lengths, STEPS, "cuda")
    fixed = Fixed(Run(FIXED[name], q, k, v, lengths), FIXED[name])
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


@pytest.mark.parametrize("name", ["h2o", "morphkv", "snapkv"])
def test_loading_again_keeps_the_addresses(name, device):
    method = FIXED[name]
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
        (create("adakv", budget=BUDGET, inner=FIXED["snapkv"]), "heads must keep equal numbers"),
    ):
        with pytest.raises(ValueError, match=why):
            Turnover.of(method.stages())
    share = create("h2o", budget=0.5, decode=True)
    with pytest.raises(ValueError, match="recent must be a count"):
        FixedStore(Turnover.of(share.stages())).load(Run(share, q, k, v, [60, 30]).store, room=1)
    with pytest.raises(ValueError, match="capacity must be at least the 25 entries"):
        FixedStore(Turnover.of(METHODS["h2o"].stages())).load(
            Run(METHODS["h2o"], q, k, v, [60, 30]).store, room=1, capacity=20
        )
