"""evict_append_ against a slot-by-slot model, exactly: it compares and copies, and computes nothing but a sum of scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from kvcompress.rotary import rerotate
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import store as reference
from tests.reference.rotary import rope
from tests.store.test_compact import DTYPES, fill, full, several

INF, NAN = float("inf"), float("nan")


class Store:
    """The arguments of one call: a store of which `held` entries a row are used, and n new ones."""

    def __init__(
        self,
        batch,
        heads,
        capacity,
        n,
        head_dim=16,
        *,
        units=None,
        held=None,
        dtype=torch.bfloat16,
        device="cpu",
        **rest,
    ):
        units = heads if units is None else units
        held = [capacity] * batch if held is None else held
        self.buffers = [fill((batch, heads, capacity, head_dim), dtype, device) for _ in range(2)]
        self.rows = [fill((batch, heads, n, head_dim), dtype, device) for _ in range(2)]
        self.lengths = torch.tensor(held, dtype=torch.int32, device=device)[:, None].repeat(1, units)
        self.seen = self.lengths + 7
        self.positions = (torch.rand(batch, units, capacity).argsort(-1).int() + 7).to(device)  # slots are in no order
        for b, count in enumerate(held):
            order = torch.stack([torch.randperm(count) for _ in range(units)]).int()
            self.positions[b, :, :count] = order.to(device) + 7
        self.options = rest

    def arguments(self):
        return (self.buffers, self.rows, self.positions, self.lengths, self.seen)

    def check(self):
        cpu = [[t.cpu() for t in x] if isinstance(x, list) else x.cpu() for x in self.arguments()]
        options = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in self.options.items()}
        if fuse := options.pop("fuse", None):  # an op of its own, with a reference of its own
            state = (self.positions, self.lengths, self.seen)
            window = options.get("window", 0)
            ranks = kvcompress.history_scores(self.options["history"], *state, window=window, fuse=fuse)
            options["scores"] = ranks.cpu()
        slots, buffers, *expected = reference.evict_append(*cpu, **options)
        got = kvcompress.evict_append_(*self.arguments(), **self.options)
        assert torch.equal(got.cpu(), slots)
        for ours, theirs in zip(self.buffers, buffers):
            assert torch.equal(ours.cpu(), theirs)
        left = [self.positions, self.lengths, self.seen, self.options.get("scores"), self.options.get("history")]
        if fuse:
            expected[3] = None
        for ours, theirs in zip(left, expected):
            if theirs is None:
                assert ours is None
            else:
                assert torch.equal(ours.cpu().nan_to_num(5.5e30), theirs.nan_to_num(5.5e30))
        return got


def some_scores(*shape, device="cpu", levels=None):
    scores = torch.rand(*shape)
    return (scores if levels is None else (scores * levels).floor()).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 80, 128])
def test_dtypes(dtype, head_dim, device):
    scores = some_scores(2, 3, 40, device=device)
    Store(2, 3, 40, 1, head_dim, dtype=dtype, device=device, scores=scores, sink=4, window=8).check()


@pytest.mark.parametrize("capacity", [2, 31, 256, 257, 1024, 2048, 2049, 5000])
@pytest.mark.parametrize("shared", [False, True])
def test_sizes(capacity, shared, device):
    units = 1 if shared else 3
    scores = some_scores(2, 3, capacity, device=device)
    Store(2, 3, capacity, 1, units=units, device=device, scores=scores, window=capacity // 4).check()
    Store(2, 3, capacity, 1, units=units, device=device, sink=capacity // 4).check()


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("held", [[0, 3], [15, 16], [12, 20], [20, 20]])
def test_fills_up_then_turns_over(n, held, device):
    """Room is used first; of one call some tokens may be appended and others displace."""
    scores = some_scores(2, 2, 20, device=device, levels=4)
    Store(2, 2, 20, n, held=held, device=device, scores=scores, sink=2, window=3).check()


@pytest.mark.parametrize("group", [1, 4])
def test_shared_victim(group, device):
    """TOVA: one victim for all heads, by the sum over heads; scores may be per query head."""
    scores = some_scores(3, 4 * group, 50, device=device)
    got = Store(3, 4, 50, 2, units=1, device=device, scores=scores).check()
    assert got.shape == (3, 1, 2)


def test_ties_and_specials(device):
    """Of equal scores the smaller position stays; NaN is below -inf; +inf stays longest; -0 equals 0."""
    positions = torch.tensor([[[5, 3, 9, 4]]], dtype=torch.int32, device=device)
    for values, slot in [
        ([1, 1, 1, 1], 2),
        ([1, 0, 1, 0], 3),
        ([0.0, -0.0, 0.0, -0.0], 2),
        ([-INF, NAN, NAN, 0], 2),
        ([-INF, -INF, -1e38, 0], 0),
        ([INF, INF, INF, INF], 2),
        ([NAN, INF, INF, INF], 0),
    ]:
        scores = torch.tensor([[values]], dtype=torch.float32, device=device)
        store = Store(1, 1, 4, 1, device=device, scores=scores, fresh=2.5)
        store.positions = positions.clone()
        store.seen = torch.full_like(store.seen, 10)
        assert store.check().item() == slot
        assert scores[0, 0, slot] == 2.5


def test_protection_is_by_position(device):
    """The first tokens and the newest stay whatever slot they lie in, however low they score."""
    scores = torch.tensor([[[0.0, 1, 2, 9, 8, 7]]], device=device)
    store = Store(1, 1, 6, 1, device=device, scores=scores, sink=2, window=2)
    store.positions = torch.tensor([[[0, 11, 1, 5, 6, 10]]], dtype=torch.int32, device=device)
    store.seen = torch.full_like(store.seen, 12)
    assert store.check().item() == 4


def test_all_protected(device):
    """A limit below sink + window: the lowest of the protected leaves."""
    limits = torch.tensor([[3]], dtype=torch.int32, device=device)
    scores = some_scores(1, 1, 20, device=device)
    store = Store(1, 1, 20, 1, held=[3], device=device, scores=scores, sink=2, window=3, limits=limits)
    store.positions[0, 0, :3] = torch.tensor([0, 1, 9], dtype=torch.int32, device=device)
    store.check()


def test_limits(device):
    """Each unit has its own room; a row above its limit stays at what it holds."""
    limits = torch.tensor([[4, 20, 30], [0, 1, 9]], dtype=torch.int32, device=device)
    scores = some_scores(2, 3, 20, device=device)
    got = Store(2, 3, 20, 5, held=[4, 9], device=device, scores=scores, limits=limits).check()
    assert (got >= 0).sum() == 29  # the unit of 4 entries has no victim for its fifth token


def test_more_tokens_than_room(device):
    limits = torch.tensor([[2]], dtype=torch.int32, device=device)
    got = Store(1, 1, 20, 4, held=[0], device=device, limits=limits).check()
    assert got.flatten().tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("width", [1, 5, 32])
def test_history(width, device):
    history = torch.randn(2, 4, 30, width, device=device)
    scores = some_scores(2, 2, 30, device=device)
    Store(2, 2, 30, 3, held=[28, 30], device=device, scores=scores, history=history, window=4).check()


@pytest.mark.parametrize("fuse", ["sum", "max"])
@pytest.mark.parametrize("capacity", [5, 31, 129, 1025, 3000])
@pytest.mark.parametrize("width", [1, 32, 33, 200])
def test_by_history(width, capacity, fuse, device):
    """The victims that history_scores and a second call would have chosen, to the bit of the scores."""
    history = torch.randn(2, 3, capacity, width, device=device)
    history[:, :, capacity // 2 :, 0] = -INF
    options = {"history": history, "fuse": fuse, "sink": 1, "window": capacity // 4, "device": device}
    Store(2, 3, capacity, 1, held=[capacity - 1, capacity], **options).check()


@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_by_history_of_many(n, batch, device):
    """More heads than a GPU has multiprocessors; several tokens, some of which still find room."""
    history = torch.randn(batch, 8, 40, 12, device=device)
    held = [40 - row % 3 for row in range(batch)]
    limits = torch.full((batch, 8), 39, dtype=torch.int32, device=device)
    Store(batch, 8, 40, n, held=held, device=device, history=history, fuse="sum", window=5, limits=limits).check()


def test_by_history_of_all_heads(device):
    """One victim for all heads: their ranks are added up in their order."""
    history = torch.randn(2, 4, 300, 32, device=device)
    for units in (1, 2):
        Store(2, 4, 300, 2, units=units, device=device, history=history.clone(), fuse="sum", window=5).check()


def test_by_history_nan(device):
    """A NaN reaches every rank of its head, so the largest position leaves, as with NaN scores."""
    history = torch.randn(1, 2, 200, 8, device=device)
    history[0, 1, 17, 3] = NAN
    Store(1, 2, 200, 1, device=device, history=history, fuse="sum").check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (80, 40), (128, 32), (256, 128), (600, 300), (17, 1)])
def test_sinks_stand_before_the_window(head_dim, half, dtype, device):
    """`rerotate` from where they began, to the bit, and what float64 gives to a rounding."""
    store = Store(2, 3, 20, 2, head_dim, dtype=dtype, device=device, held=[19, 20], sink=4)
    store.positions = torch.arange(20, dtype=torch.int32, device=device).repeat(2, 3, 1)
    keys = store.buffers[0].normal_()
    sinks = torch.randn(2, 3, 4, head_dim, device=device).to(dtype)
    inv_freq = (10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)).float().to(device)
    store.seen += torch.tensor([[3], [70_000]], dtype=torch.int32, device=device)
    before = keys.clone()
    slots = kvcompress.evict_append_(*store.arguments(), sinks=sinks, inv_freq=inv_freq, sink=4)
    shift = (store.seen - store.lengths)[..., None]
    assert torch.equal(keys[:, :, :4, : 2 * half], rerotate(sinks, shift, inv_freq)[..., : 2 * half])
    exact = rope(sinks[1, 0, :, : 2 * half].double(), shift[1, 0].expand(4), inv_freq)
    assert torch.allclose(keys[1, 0, :4, : 2 * half].double(), exact, atol=8 * torch.finfo(dtype).eps)
    # nothing else has changed but the slots of the new tokens
    keys[:, :, :4, : 2 * half] = before[:, :, :4, : 2 * half]
    for b in range(2):
        for h in range(3):
            for t, slot in enumerate(slots[b, h].tolist()):
                assert torch.equal(keys[b, h, slot], store.rows[0][b, h, t])
                keys[b, h, slot] = before[b, h, slot]
    assert torch.equal(keys, before)


def test_sinks_that_have_not_moved(device):
    """Nothing has left: their bytes, also at heads that share a victim."""
    store = Store(1, 4, 20, 1, 16, units=1, dtype=torch.float16, device=device, held=[10], sink=4)
    store.seen = store.lengths.clone()
    sinks = torch.randn(1, 4, 3, 16, device=device).half()
    inv_freq = torch.rand(8, device=device)
    kvcompress.evict_append_(*store.arguments(), sinks=sinks, inv_freq=inv_freq, sink=4)
    assert torch.equal(store.buffers[0][:, :, :3], sinks)


def test_sinks_and_history_together(device):
    store = Store(2, 2, 40, 1, 16, dtype=torch.float32, device=device, history=torch.randn(2, 2, 40, 5, device=device))
    other = [t.clone() for t in store.buffers]
    inv_freq, sinks = torch.rand(8, device=device), torch.randn(2, 2, 4, 16, device=device)
    options = {"sink": 4, "fuse": "max"}
    state = [t.clone() for t in (store.positions, store.lengths, store.seen)]
    history = store.options["history"].clone()
    plain = kvcompress.evict_append_(other, store.rows, *state, history=history, **options)
    options |= {"sinks": sinks, "inv_freq": inv_freq, "history": store.options["history"]}
    assert torch.equal(kvcompress.evict_append_(*store.arguments(), **options), plain)
    assert torch.equal(store.buffers[1], other[1])
    assert torch.equal(store.buffers[0][:, :, 4:], other[0][:, :, 4:])
    shift = (store.seen - store.lengths)[..., None]
    assert torch.equal(store.buffers[0][:, :, :4], rerotate(sinks, shift, inv_freq))


def test_ring(device):
    """Without scores a window rolls behind the sinks, slot after slot."""
    store = Store(1, 2, 8, 1, held=[0], device=device, sink=2)
    store.seen.zero_()
    order = [kvcompress.evict_append_(*store.arguments(), sink=2)[0, 0, 0].item() for _ in range(22)]
    assert order == [*range(8), *([2, 3, 4, 5, 6, 7] * 3)[:14]]
    assert sorted(store.positions[0, 0].tolist()) == [0, 1, *range(16, 22)]


@pytest.mark.parametrize("shared", [False, True])
def test_equals_topk_and_compact(shared, device):
    """One entry leaves: the same set as topk keeps of the store and the new entry."""
    capacity, sink, window = 24, 3, 5
    units = 1 if shared else 2
    scores = some_scores(2, units, capacity, device=device, levels=6)
    store = Store(2, 2, capacity, 1, units=units, device=device)
    store.positions = torch.arange(capacity, dtype=torch.int32, device=device).repeat(2, units, 1)
    store.seen = torch.full_like(store.seen, capacity)
    kept = kvcompress.topk(scores, capacity - 1, sink=sink, window=window)
    slots = kvcompress.evict_append_(*store.arguments(), scores=scores.clone(), sink=sink, window=window)
    for b in range(2):
        for u in range(units):
            assert {*range(capacity)} - {*kept[b, u].tolist()} == {slots[b, u, 0].item()}


def test_strided_views(device):
    base = fill((2, 50, 3, 64), torch.bfloat16, device)
    packed = fill((2, 3, 50, 2, 40), torch.float16, device)
    odd = fill((2 * 3 * 50 * 9 + 1,), torch.uint8, device)[1:].view(2, 3, 50, 9)
    wide = torch.rand(2, 5, 3, 50, device=device)
    store = Store(2, 3, 50, 2, device=device, scores=wide[:, 3], sink=1, window=2)
    store.buffers = [base.transpose(1, 2), packed[..., 1, :], odd, fill((2, 3, 50), torch.int64, device)]
    store.rows = [
        fill((2, 2, 3, 64), torch.bfloat16, device).transpose(1, 2),
        cases.strided(fill((2, 3, 2, 40), torch.float16, device)),
        fill((2, 3, 2, 9), torch.uint8, device),
        fill((2, 1, 2), torch.int64, device).expand(2, 3, 2),
    ]
    store.lengths = torch.full((3, 2), 50, dtype=torch.int32, device=device).mT
    store.options["limits"] = torch.full((1, 1), 50, dtype=torch.int32, device=device).expand(2, 3)
    store.check()


def test_64_bit_offsets(device):
    buffer = cases.far_apart((2, 2, 50, 16), torch.uint8, device, 2**31 + 64)
    buffer.zero_()
    store = Store(2, 2, 50, 1, dtype=torch.uint8, device=device, scores=some_scores(2, 2, 50, device=device))
    store.buffers[0] = buffer
    slots = kvcompress.evict_append_(*store.arguments(), **store.options)
    for b in range(2):
        for h in range(2):
            assert torch.equal(buffer[b, h, slots[b, h, 0]], store.rows[0][b, h, 0])
    assert int(sum((row != 0).sum() for row in buffer)) == int((store.rows[0] != 0).sum())


def test_token_by_token_equals_at_once(device):
    """A call of n tokens picks what n calls pick, as long as new entries score higher than old ones."""
    scores = some_scores(2, 2, 30, device=device)
    at_once = Store(2, 2, 30, 6, held=[27, 30], device=device, scores=scores, fresh=9.0, sink=2, window=4)
    one = Store(2, 2, 30, 6, held=[27, 30], device=device)
    for name in ("positions", "lengths", "seen"):
        setattr(one, name, getattr(at_once, name).clone())
    one.buffers, one.rows = [t.clone() for t in at_once.buffers], at_once.rows
    single = scores.clone()
    got = at_once.check()
    for t in range(6):
        rows = [row[:, :, t : t + 1] for row in one.rows]
        state = (one.positions, one.lengths, one.seen)
        slots = kvcompress.evict_append_(one.buffers, rows, *state, scores=single, fresh=9.0, sink=2, window=4)
        assert torch.equal(slots[..., 0], got[..., t])
    assert torch.equal(single, scores)
    assert all(torch.equal(x, y) for x, y in zip(one.buffers, at_once.buffers))


def test_bitwise_run_to_run(device):
    runs = []
    for _ in range(4):
        torch.manual_seed(3)
        store = Store(2, 4, 3000, 8, device=device, scores=some_scores(2, 8, 3000, device=device, levels=50))
        runs.append((kvcompress.evict_append_(*store.arguments(), **store.options), *store.buffers, store.positions))
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0]))


def test_empty(device):
    for shape in [(0, 2, 8, 4), (2, 0, 8, 4), (2, 2, 8, 0)]:
        store = Store(2, 2, 8, 1, device=device)
        store.buffers = [torch.empty(shape, device=device)]
        store.rows = [torch.empty(*shape[:2], 1, shape[3], device=device)]
        state = [torch.zeros(*shape[:2], *rest, dtype=torch.int32, device=device) for rest in ((8,), (), ())]
        slots = kvcompress.evict_append_(store.buffers, store.rows, *state)
        assert slots.shape == (*shape[:2], 1)
        assert (state[1] == 1).all()


@pytest.mark.cuda
def test_in_a_cuda_graph():
    """One captured step serves a store that fills up and then turns over: the same as eager, step by step."""
    scores = some_scores(2, 2, 40, device="cuda")
    eager = Store(2, 2, 40, 1, held=[30, 37], device="cuda", scores=scores, sink=1, window=3)
    options = dict(eager.options, scores=scores.clone())
    graphed = [[t.clone() for t in x] if isinstance(x, list) else x.clone() for x in eager.arguments()]
    warm = [[t.clone() for t in x] if isinstance(x, list) else x.clone() for x in eager.arguments()]
    kvcompress.evict_append_(*warm, **dict(eager.options, scores=scores.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kvcompress.evict_append_(*graphed, **options)
    for _ in range(30):
        for new, row in zip(eager.rows, graphed[1]):
            new.normal_()
            row.copy_(new)
        eager.options["scores"].add_(torch.rand_like(scores))
        options["scores"].copy_(eager.options["scores"])
        graph.replay()
        assert torch.equal(kvcompress.evict_append_(*eager.arguments(), **eager.options), got)
    assert all(torch.equal(x, y) for x, y in zip(eager.buffers, graphed[0]))
    assert torch.equal(eager.positions, graphed[2])
    assert torch.equal(eager.lengths, graphed[3])


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzz(data):
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    batch, units, each = (data.draw(st.integers(1, 3)) for _ in range(3))
    capacity = data.draw(st.integers(2, 40))
    n = data.draw(st.integers(1, min(8, capacity)))
    sink = data.draw(st.integers(0, capacity - 1))
    window = data.draw(st.integers(0, capacity - 1 - sink))
    held = [data.draw(st.integers(0, capacity)) for _ in range(batch)]
    options = {"sink": sink, "window": window}
    if data.draw(st.booleans()):
        scores = some_scores(batch, units * each, capacity, levels=data.draw(st.sampled_from([None, 3])))
        scores[torch.rand_like(scores) < 0.1] = data.draw(st.sampled_from([NAN, INF, -INF, -0.0]))
        options["scores"] = scores
    if data.draw(st.booleans()):
        options["history"] = torch.randn(batch, units * each, capacity, data.draw(st.integers(1, 4)))
        if "scores" not in options:
            options["fuse"] = data.draw(st.sampled_from([None, "sum", "max"]))
    if data.draw(st.booleans()):
        options["limits"] = torch.randint(0, capacity + 1, (batch, units), dtype=torch.int32)
    Store(batch, units * each, capacity, n, data.draw(st.integers(1, 9)), units=units, held=held, **options).check()


def samples(device):
    store = Store(2, 4, 12, 2, 16, held=[11, 12], device=device)
    ring = Store(2, 4, 12, 1, 16, units=1, held=[3, 12], device=device)
    scores, history = some_scores(2, 8, 12, device=device), torch.randn(2, 4, 12, 3, device=device)
    limits = torch.full((2, 4), 12, dtype=torch.int32, device=device)
    by_history = Store(2, 4, 12, 1, 16, device=device)
    sinks, inv_freq = ring.buffers[0][:, :, :4].clone(), torch.rand(8, device=device)
    return [
        (*store.arguments(), scores, history, limits, None, None, 2, 3, 0.0, 0),
        (*ring.arguments(), None, None, None, sinks, inv_freq, 4, 0, 0.0, 0),
        (*by_history.arguments(), None, history.clone(), None, None, None, 0, 3, 0.0, 1),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "buffers": [torch.randn(2, 4, 6, 4, device=device), torch.randn(2, 2, 6, device=device)],
            "rows": [torch.randn(2, 4, 2, 4, device=device), torch.randn(2, 2, 2, device=device)],
            "positions": torch.ones(2, 2, 6, dtype=torch.int32, device=device),
            "lengths": torch.ones(2, 2, dtype=torch.int32, device=device),
            "seen": torch.ones(2, 2, dtype=torch.int32, device=device),
            "scores": torch.ones(2, 4, 6, device=device),
            "history": torch.ones(2, 4, 6, 3, device=device),
            "limits": torch.ones(2, 2, dtype=torch.int32, device=device),
            "sinks": torch.ones(2, 4, 3, 4, device=device),
            "inv_freq": torch.ones(2, device=device),
            "sink": 1,
            "window": 2,
            "fresh": 0.0,
            "fuse": 0,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def ints(*shape):
    return full(*shape, dtype=torch.int32)


def overlapping(*shape, dtype=torch.float32):
    return lambda device: torch.ones(1, *shape[1:], dtype=dtype, device=device).expand(shape)


NAME = "evict_append_"
FIT = "of the batch (2) and capacity (6) of positions and a multiple of 2 heads"
BAD = [
    Bad(
        "rank_positions",
        wrong(positions=ints(2, 6)),
        f"{NAME}: positions must be [batch, units, capacity], got 2D [2, 6]",
    ),
    Bad("positions_dtype", wrong(positions=full(2, 2, 6)), f"{NAME}: positions must be int32, got float32"),
    Bad(
        "positions_overlap",
        wrong(positions=overlapping(2, 2, 6, dtype=torch.int32)),
        f"{NAME}: positions must be free of overlaps, got a stride of 0",
    ),
    Bad("no_buffers", wrong(buffers=several()), f"{NAME}: buffers must be 1 to 8 tensors, got 0"),
    Bad(
        "fewer_rows",
        wrong(rows=several(full(2, 4, 2, 4))),
        f"{NAME}: rows must be as many tensors as buffers (2), got 1",
    ),
    Bad(
        "rows_dtype",
        wrong(rows=several(full(2, 4, 2, 4, dtype=torch.float16), full(2, 2, 2))),
        f"{NAME}: rows must be of the dtype of buffers (float32), got float16",
    ),
    Bad(
        "heads",
        wrong(buffers=several(full(2, 3, 6, 4), full(2, 2, 6)), rows=several(full(2, 3, 2, 4), full(2, 2, 2))),
        f"{NAME}: buffers must be {FIT}, got [2, 3, 6, 4] at [0]",
    ),
    Bad(
        "capacity",
        wrong(buffers=several(full(2, 4, 6, 4), full(2, 2, 7))),
        f"{NAME}: buffers must be {FIT}, got [2, 2, 7] at [1]",
    ),
    Bad(
        "n",
        wrong(rows=several(full(2, 4, 2, 4), full(2, 2, 3))),
        f"{NAME}: rows must be of the shape of buffers [2, 2, 6] with n (2) for the capacity, got [2, 2, 3] at [1]",
    ),
    Bad(
        "no_tokens",
        wrong(rows=several(full(2, 4, 0, 4), full(2, 2, 0))),
        f"{NAME}: n must be from 1 to 8 and at most the capacity (6), got 0",
    ),
    Bad(
        "too_many_tokens",
        wrong(rows=several(full(2, 4, 7, 4), full(2, 2, 7))),
        f"{NAME}: n must be from 1 to 8 and at most the capacity (6), got 7",
    ),
    Bad("lengths", wrong(lengths=ints(2, 4)), f"{NAME}: lengths must be [batch, units] [2, 2], got 2D [2, 4]"),
    Bad("lengths_rank", wrong(lengths=ints(2)), f"{NAME}: lengths must be [batch, units] [2, 2], got 1D [2]"),
    Bad("lengths_dtype", wrong(lengths=full(2, 2)), f"{NAME}: lengths must be int32, got float32"),
    Bad(
        "lengths_overlap",
        wrong(lengths=overlapping(2, 2, dtype=torch.int32)),
        f"{NAME}: lengths must be free of overlaps, got a stride of 0",
    ),
    Bad("seen", wrong(seen=ints(1, 2)), f"{NAME}: seen must be [batch, units] [2, 2], got 2D [1, 2]"),
    Bad("limits", wrong(limits=ints(1, 2)), f"{NAME}: limits must be [batch, units] [2, 2], got 2D [1, 2]"),
    Bad("scores_rank", wrong(scores=full(4, 6)), f"{NAME}: scores must be [batch, heads, capacity], got 2D [4, 6]"),
    Bad("scores_heads", wrong(scores=full(2, 3, 6)), f"{NAME}: scores must be {FIT}, got [2, 3, 6]"),
    Bad(
        "scores_dtype", wrong(scores=full(2, 4, 6, dtype=torch.float16)), f"{NAME}: scores must be float32, got float16"
    ),
    Bad(
        "scores_overlap",
        wrong(scores=overlapping(2, 4, 6)),
        f"{NAME}: scores must be free of overlaps, got a stride of 0",
    ),
    Bad(
        "history_rank",
        wrong(history=full(2, 4, 6)),
        f"{NAME}: history must be [batch, heads, capacity, width], got 3D [2, 4, 6]",
    ),
    Bad("history", wrong(history=full(2, 4, 5, 3)), f"{NAME}: history must be {FIT}, got [2, 4, 5, 3]"),
    Bad("sinks_alone", wrong(inv_freq=None), f"{NAME}: inv_freq must be there with sinks alone, got none"),
    Bad("inv_freq_alone", wrong(sinks=None), f"{NAME}: inv_freq must be there with sinks alone, got no sinks"),
    Bad(
        "sinks_rank",
        wrong(sinks=full(2, 3, 4)),
        f"{NAME}: sinks must be [batch, heads, num_sinks, head_dim], got 3D [2, 3, 4]",
    ),
    Bad(
        "sinks_dtype",
        wrong(sinks=full(2, 4, 3, 4, dtype=torch.float16)),
        f"{NAME}: sinks must be of the dtype of buffers[0] (float32), got float16",
    ),
    Bad(
        "sinks",
        wrong(sinks=full(2, 2, 3, 4)),
        f"{NAME}: sinks must be of the shape of buffers[0] [2, 4, 6, 4] but for fewer entries, got [2, 2, 3, 4]",
    ),
    Bad("inv_freq_rank", wrong(inv_freq=full(1, 2)), f"{NAME}: inv_freq must be [rotary_dim / 2], got 2D [1, 2]"),
    Bad("inv_freq", wrong(inv_freq=full(3)), f"{NAME}: inv_freq must be [at most 2], got [3]"),
    Bad(
        "inv_freq_dtype",
        wrong(inv_freq=full(2, dtype=torch.float64)),
        f"{NAME}: inv_freq must be float32, got float64",
    ),
    Bad("fuse", wrong(fuse=3), f"{NAME}: fuse must be 0 (none), 1 (sum) or 2 (max), got 3"),
    Bad("fuse_without", wrong(fuse=1, history=None), f"{NAME}: history must be there with fuse, got none"),
    Bad("fuse_and_scores", wrong(fuse=2), f"{NAME}: scores must be absent with fuse, got scores"),
    Bad(
        "fuse_width",
        wrong(fuse=2, scores=None, history=full(2, 4, 6, 1025)),
        f"{NAME}: history must be of a width from 1 to 1024 with fuse, got 1025",
    ),
    Bad("sink", wrong(sink=-1), f"{NAME}: sink must be at least 0, got -1"),
    Bad("window_negative", wrong(window=-1), f"{NAME}: window must be at least 0, got -1"),
    Bad("window", wrong(window=5), f"{NAME}: window must be below the capacity less the sink (5), got 5"),
    Bad(
        "length",
        wrong(lengths=lambda d: torch.tensor([[1, 2], [7, 0]], dtype=torch.int32, device=d)),
        f"{NAME}: lengths must be from 0 to the capacity (6), got 7 at [1, 0]",
        reads_data=True,
    ),
]
