"""ragged_evict_append_ against the model of evict_append_, head by head, exactly. What both share is tested there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import store as reference
from tests.store.test_compact import DTYPES, fill, full, several

INF = float("inf")


class Ragged:
    """The arguments of one call: heads of `limits` slots, of which `held` are used, in no order and with slots between."""

    def __init__(self, limits, n, head_dim=16, *, heads=None, held=None, dtype=torch.bfloat16, device="cpu", **rest):
        heads = len(limits) if heads is None else heads
        batch = len(limits) // heads if heads else 1
        held = limits if held is None else held
        slots, self.starts = 2, []
        for limit in reversed(limits):  # heads lie in another order than they are counted
            self.starts.insert(0, slots)
            slots += limit + 1
        self.limits_list, self.slots = limits, slots
        self.buffers = [fill((slots, head_dim), dtype, device), fill((slots,), dtype, device)]
        self.rows = [fill((batch, heads, n, head_dim), dtype, device), fill((batch, heads, n), dtype, device)]
        self.positions = torch.full((slots,), -7, dtype=torch.int32, device=device)
        for start, count in zip(self.starts, held):
            self.positions[start : start + count] = torch.randperm(count).int().to(device) + 7
        self.row_start = torch.tensor(self.starts, dtype=torch.int64, device=device)
        self.lengths, self.limits = (torch.tensor(x, dtype=torch.int32, device=device) for x in (held, limits))
        self.seen = self.lengths + 7
        self.options = {"max_length": max(limits, default=0), **rest}

    def arguments(self):
        return (self.buffers, self.rows, self.positions, self.row_start, self.lengths, self.seen, self.limits)

    def check(self):
        """Every head alone, as a dense store of its own slots."""
        options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in self.options.items()}
        del options["max_length"]
        fuse = options.pop("fuse", None)
        before = [t.cpu().clone() for t in (*self.buffers, self.positions)]
        beside = {name: options.pop(name).clone() for name in ("scores", "history") if name in options}
        after = [t.clone() for t in before]
        expected_beside = {name: t.clone() for name, t in beside.items()}
        counters = [t.cpu().clone() for t in (self.lengths, self.seen)]
        slots, heads = [], self.rows[0].shape[1]
        for s, (start, limit) in enumerate(zip(self.starts, self.limits_list)):
            own = slice(start, start + limit)
            if limit == 0:
                slots.append([-1] * self.rows[0].shape[2])
                counters[1][s] += self.rows[0].shape[2]
                continue
            rows = [t.cpu()[s // heads, s % heads][None, None] for t in self.rows]
            state = [before[-1][own][None, None], *(t[s].view(1, 1) for t in counters)]
            mine = {name: t[own][None, None].clone() for name, t in beside.items()}
            if fuse is not None:
                device = self.positions.device
                history = mine["history"].to(device)
                window = options.get("window", 0)
                ranks = kvcompress.history_scores(history, *(t.to(device) for t in state), window=window, fuse=fuse)
                mine["scores"] = ranks.cpu()
            got, buffers, positions, lengths, seen, scores, history = reference.evict_append(
                [t[own][None, None] for t in before[:-1]], rows, *state, **options, **mine
            )
            slots.append(got.flatten().tolist())
            for whole, part in zip(after, (*buffers, positions)):
                whole[own] = part[0, 0]
            for name, part in (("scores", scores), ("history", history)):
                if name in expected_beside:
                    expected_beside[name][own] = part[0, 0]
            counters[0][s], counters[1][s] = lengths.item(), seen.item()
        got = kvcompress.ragged_evict_append_(*self.arguments(), **self.options)
        assert got.flatten(0, 1).tolist() == slots
        for ours, theirs in zip((*self.buffers, self.positions, self.lengths, self.seen), (*after, *counters)):
            assert torch.equal(ours.cpu(), theirs)
        for name, theirs in expected_beside.items():
            assert torch.equal(self.options[name].cpu(), theirs)
        return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 80, 128])
def test_dtypes(dtype, head_dim, device):
    store = Ragged([40, 3, 17, 90], 1, head_dim, heads=2, dtype=dtype, device=device, sink=1, window=1)
    store.options["scores"] = torch.rand(store.slots, device=device)
    store.check()


@pytest.mark.parametrize("limits", [[1], [5, 2000, 1, 0, 300], [2049, 3], [700] * 20, [0, 0, 4]])
def test_sizes(limits, device):
    """By position, by scores and by history."""
    for beside in ("", "scores", "history"):
        store = Ragged(limits, 1, device=device)
        if beside == "scores":
            store.options["scores"] = torch.rand(store.slots, device=device)
        elif beside == "history":
            history = torch.randn(store.slots, 32, device=device)
            store.options |= {"history": history, "fuse": "sum", "window": max(limits) // 4}
        store.check()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fills_up_then_turns_over(n, device):
    limits, held = [20, 9, 33, 6], [18, 9, 0, 2]
    for options in ({}, {"sink": 2, "window": 3}):
        store = Ragged(limits, n, heads=2, held=held, device=device, **options)
        store.options["scores"] = (torch.rand(store.slots, device=device) * 4).floor()
        store.check()


def test_more_tokens_than_room(device):
    got = Ragged([2, 30], 4, held=[0, 30], device=device).check()
    assert got[0, 0].tolist() == [0, 1, -1, -1]


def test_equals_the_dense_op(device):
    """Heads of equal room, one after the other, are a dense store."""
    batch, heads, capacity = 2, 3, 50
    keys, rows = (
        fill((batch, heads, capacity, 16), torch.bfloat16, device),
        fill((batch, heads, 2, 16), torch.bfloat16, device),
    )
    positions = torch.arange(capacity, dtype=torch.int32, device=device).repeat(batch, heads, 1)
    counters = [torch.full((batch, heads), capacity, dtype=torch.int32, device=device) for _ in range(3)]
    history = torch.randn(batch, heads, capacity, 12, device=device)
    packed = [t.clone().flatten(0, 2) for t in (keys, positions, history)]
    row_start = torch.arange(batch * heads, device=device) * capacity
    flat = [t.clone().flatten() for t in counters]
    options = {"fuse": "max", "window": 7}
    dense = kvcompress.evict_append_([keys], [rows], positions, *counters[:2], history=history, **options)
    state = (packed[1], row_start, *flat)
    options |= {"history": packed[2], "max_length": capacity}
    assert torch.equal(kvcompress.ragged_evict_append_([packed[0]], [rows], *state, **options), dense)
    for ours, theirs in zip(packed, (keys, positions, history)):
        assert torch.equal(ours, theirs.flatten(0, 2))


def test_strided_views(device):
    store = Ragged([30, 12, 50], 2, device=device, sink=1, window=2)
    side_by_side = fill((store.slots, 2, 40), torch.float16, device)  # K and V
    store.buffers = [side_by_side[:, 0], side_by_side[:, 1], fill((2 * store.slots, 9), torch.uint8, device)[::2]]
    store.rows = [
        cases.strided(fill((1, 3, 2, 40), torch.float16, device)),
        fill((1, 2, 3, 40), torch.float16, device).transpose(1, 2),
        fill((1, 3, 2, 9), torch.uint8, device),
    ]
    store.options["history"] = torch.randn(store.slots, 8, device=device)[:, :5]
    store.check()


def test_64_bit_offsets(device):
    store = Ragged([20, 20], 1, dtype=torch.uint8, device=device)
    buffer = cases.far_apart((2, 20, 16), torch.uint8, device, 2**31 + 64)
    buffer.zero_()
    stride = buffer.stride(0)
    packed = buffer.as_strided((stride // 16 + 20, 16), (16, 1))
    store.buffers = [packed]
    store.rows = store.rows[:1]
    store.positions = torch.zeros(packed.shape[0], dtype=torch.int32, device=device)
    store.row_start = torch.tensor([0, stride // 16], device=device)
    slots = kvcompress.ragged_evict_append_(*store.arguments(), max_length=20)
    for h in range(2):
        assert torch.equal(buffer[h, slots[0, h, 0]], store.rows[0][0, h, 0])
    assert int((buffer != 0).sum()) == int((store.rows[0] != 0).sum())


def test_bitwise_run_to_run(device):
    runs = []
    for _ in range(3):
        torch.manual_seed(3)
        store = Ragged([3000, 40, 700, 1], 4, device=device, window=9)
        history = torch.randn(store.slots, 32, device=device)
        slots = kvcompress.ragged_evict_append_(*store.arguments(), history=history, fuse="sum", **store.options)
        runs.append((slots, *store.buffers, store.positions))
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0]))


def test_empty(device):
    store = Ragged([], 1, device=device)
    store.rows = [t[:0] for t in (torch.empty(1, 0, 1, 16), torch.empty(1, 0, 1))]
    store.rows = [t.to(device, store.buffers[0].dtype) for t in store.rows]
    store.options["max_length"] = 1
    assert kvcompress.ragged_evict_append_(*store.arguments(), **store.options).shape == (0, 0, 1)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_fuzz(data):
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    limits = [data.draw(st.integers(0, 30)) for _ in range(batch * heads)]
    limits[0] = max(limits[0], 2)
    most = max(limits)
    sink = data.draw(st.integers(0, most - 1))
    options = {"sink": sink, "window": data.draw(st.integers(0, most - 1 - sink))}
    held = [data.draw(st.integers(0, limit)) for limit in limits]
    n = data.draw(st.integers(1, min(8, most)))
    store = Ragged(limits, n, data.draw(st.integers(1, 9)), heads=heads, held=held, **options)
    if data.draw(st.booleans()):
        store.options["scores"] = (torch.rand(store.slots) * 5).floor()
    if data.draw(st.booleans()):
        store.options["history"] = torch.randn(store.slots, data.draw(st.integers(1, 4)))
        if "scores" not in store.options:
            store.options["fuse"] = data.draw(st.sampled_from([None, "sum", "max"]))
    store.check()


def samples(device):
    store = Ragged([12, 3, 20, 7], 2, heads=2, held=[11, 3, 20, 0], device=device)
    history = torch.randn(store.slots, 3, device=device)
    by_history = Ragged([12, 30], 1, device=device)
    return [
        (*store.arguments(), torch.rand(store.slots, device=device), history, 20, 2, 3, 0.0, 0),
        (*by_history.arguments(), None, torch.randn(by_history.slots, 5, device=device), 30, 0, 3, 0.0, 2),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "buffers": [torch.randn(12, 4, device=device), torch.randn(12, device=device)],
            "rows": [torch.randn(2, 2, 2, 4, device=device), torch.randn(2, 2, 2, device=device)],
            "positions": torch.ones(12, dtype=torch.int32, device=device),
            "row_start": torch.arange(4, device=device) * 3,
            "lengths": torch.ones(4, dtype=torch.int32, device=device),
            "seen": torch.ones(4, dtype=torch.int32, device=device),
            "limits": torch.full((4,), 3, dtype=torch.int32, device=device),
            "scores": torch.ones(12, device=device),
            "history": torch.ones(12, 3, device=device),
            "max_length": 3,
            "sink": 1,
            "window": 1,
            "fresh": 0.0,
            "fuse": 0,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def ints(*shape):
    return full(*shape, dtype=torch.int32)


NAME = "ragged_evict_append_"
BAD = [
    Bad("rank_positions", wrong(positions=ints(3, 4)), f"{NAME}: positions must be [slots], got 2D [3, 4]"),
    Bad("positions_dtype", wrong(positions=full(12)), f"{NAME}: positions must be int32, got float32"),
    Bad("no_buffers", wrong(buffers=several()), f"{NAME}: buffers must be 1 to 8 tensors, got 0"),
    Bad(
        "buffers_rank",
        wrong(buffers=several(full(1, 12, 4), full(12))),
        f"{NAME}: buffers must be [slots, head_dim] or [slots], got 3D [1, 12, 4] at [0]",
    ),
    Bad(
        "rows_rank",
        wrong(rows=several(full(4, 4), full(2, 2, 2))),
        f"{NAME}: rows must be [batch, heads, n, head_dim] or [batch, heads, n], got 2D [4, 4] at [0]",
    ),
    Bad(
        "fewer_rows",
        wrong(rows=several(full(2, 2, 2, 4))),
        f"{NAME}: rows must be as many tensors as buffers (2), got 1",
    ),
    Bad(
        "slots",
        wrong(buffers=several(full(12, 4), full(11))),
        f"{NAME}: buffers must be of the slots of positions (12), got [11] at [1]",
    ),
    Bad(
        "rows",
        wrong(rows=several(full(2, 2, 2, 4), full(2, 2, 3))),
        f"{NAME}: rows must be [2, 2, 2] and the row of buffers [12], got [2, 2, 3] at [1]",
    ),
    Bad(
        "rows_dim",
        wrong(rows=several(full(2, 2, 2, 5), full(2, 2, 2))),
        f"{NAME}: rows must be [2, 2, 2] and the row of buffers [12, 4], got [2, 2, 2, 5] at [0]",
    ),
    Bad("row_start", wrong(row_start=ints(4)), f"{NAME}: row_start must be int64, got int32"),
    Bad("lengths", wrong(lengths=ints(2, 2)), f"{NAME}: lengths must be [batch * heads] (4), got 2D [2, 2]"),
    Bad("seen", wrong(seen=ints(3)), f"{NAME}: seen must be [batch * heads] (4), got 1D [3]"),
    Bad("limits", wrong(limits=full(4)), f"{NAME}: limits must be int32, got float32"),
    Bad("scores", wrong(scores=full(11)), f"{NAME}: scores must be of the slots of positions (12), got [11]"),
    Bad("scores_dtype", wrong(scores=full(12, dtype=torch.float16)), f"{NAME}: scores must be float32, got float16"),
    Bad("history", wrong(history=full(12)), f"{NAME}: history must be [slots, width], got 1D [12]"),
    Bad(
        "history_overlap",
        wrong(history=lambda d: torch.ones(1, 3, device=d).expand(12, 3)),
        f"{NAME}: history must be free of overlaps, got a stride of 0",
    ),
    Bad(
        "max_length",
        wrong(max_length=13),
        f"{NAME}: max_length must be from 0 to the slots of positions (12), got 13",
    ),
    Bad(
        "too_many_tokens",
        wrong(max_length=1),
        f"{NAME}: n must be from 1 to 8 and at most the max_length (1), got 2",
    ),
    Bad("sink", wrong(sink=-1), f"{NAME}: sink must be at least 0, got -1"),
    Bad("window", wrong(window=2), f"{NAME}: window must be below the max_length less the sink (2), got 2"),
    Bad("fuse_and_scores", wrong(fuse=1), f"{NAME}: scores must be absent with fuse, got scores"),
    Bad(
        "limit",
        wrong(limits=lambda d: torch.tensor([1, 4, 0, 0], dtype=torch.int32, device=d)),
        f"{NAME}: limits must be from 0 to max_length (3), got 4 at [1]",
        reads_data=True,
    ),
]
