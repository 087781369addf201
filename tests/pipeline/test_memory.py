"""The allocator's own figures while layers are cut: the peak and what is left, on CUDA."""

from __future__ import annotations

import gc

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline

LAYERS, HEADS, GROUP, DIM, LENGTH, RESERVE = 6, 4, 2, 64, 4096, 64
ENTRY = 2 * DIM * 2  # bytes of K and V of an entry
FULL = HEADS * LENGTH * ENTRY  # of one layer
# float32 scores and what a sort, an index or a mask of them takes; O(scores), a twelfth of K and V here
SCRATCH = 24 * 4 * HEADS * LENGTH
COSINES = [torch.tensor([0.5 + 0.08 * index]) for index in range(LAYERS)]

MADE = {
    "snapkv": create("snapkv", budget=0.1),
    "adakv": create("adakv", budget=0.1),
    "lava_uniform": create("lava", budget=0.1, layers="uniform"),
    "lava": create("lava", budget=0.1),
    "auto": create("auto", budget=0.1, before_rope=False),
    "zigzagkv": create("zigzagkv", budget=0.1),
    "prefixkv": create("prefixkv", budget=0.1),
    "squeeze_adakv": create("squeeze_attention", budget=0.1, inner=create("adakv", budget=0.1)),
}


def prompt(index, spread):
    shape = (1, HEADS, LENGTH, DIM)
    queries = torch.randn(1, HEADS * GROUP, 32, DIM, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return LayerState(index, LAYERS, queries * spread, keys, values, [LENGTH], DIM**-0.5)


def most_of_any_clustering(budget):
    """Entries that the bounds of the measured layers allow at any time, beside a layer that is not measured yet."""
    [first] = budget.first(prompt(0, 1), None)
    bounds = [budget.settle(COSINES[:n], [LENGTH], floor=0, layers=LAYERS) for n in range(1, LAYERS)]
    return first + max(sum(n for [n] in bound) for bound in bounds)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MADE)
def test_peak_and_rest(name):
    """Per layer: one layer's full K and V beside the compressed rest. Over the layers: the bound that the method states."""
    pipeline = Pipeline(MADE[name].stages(), LAYERS, reserve=RESERVE)
    mean = int(0.1 * LENGTH)
    room = HEADS * RESERVE * (ENTRY + 4)
    # entries a head over all layers that may be held at once, in units of bytes with their int32 positions
    entries = LAYERS * mean
    if pipeline.wants_residual:  # what k-means could still give the layers; heads keep at most 1.2 of that
        entries = 1.2 * most_of_any_clustering(pipeline.stages.budget)
    held = entries * HEADS * (ENTRY + 4) + LAYERS * room
    if pipeline.stages.budget.deferred:  # beside each entry its score, or where it stood in the prompt
        held = held * 9 / 8 + 8 * (entries * 9 / 8 + LAYERS * RESERVE) * HEADS
    stores = []
    for warm in range(2):  # the first round loads kernels and workspaces
        stores.clear()
        gc.collect()
        pipeline.reset()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores = 0
        for index in range(LAYERS):
            state = prompt(index, 0.2 + index)
            stores.append(pipeline.compress(state))
            if pipeline.wants_residual:
                pipeline.observe_residual(index, COSINES[index].cuda())
            if pipeline.is_waiting:
                scores = (index + 1) * 4 * HEADS * LENGTH  # or the sums that PrefixKV measures
                scores *= 1 + pipeline.stages.budget.across_heads  # beside them the list of all layers
            del state
            rest = torch.cuda.memory_allocated() - start
            assert not warm or rest <= held + scores + 65536, index
        queries = 32 * HEADS * GROUP * DIM * 2
        peak = torch.cuda.max_memory_allocated() - start
        if warm:
            # the prompt's own making doubles one tensor of it
            assert peak <= FULL + held + scores + SCRATCH + 2 * queries + FULL // 2
    rest = torch.cuda.memory_allocated() - start
    reported = sum(store.nbytes for store in stores)
    # blocks of 512 bytes, a handful of tensors a store
    assert reported <= rest <= reported + LAYERS * 8 * 512
    total = sum(sum(store.head_lengths[0]) for store in stores)
    assert abs(total - LAYERS * HEADS * mean) <= HEADS
    # a last cut that frees no more than the room leaves it as room for new tokens
    spare = room if pipeline.stages.budget.deferred else 0
    assert reported <= LAYERS * (mean * HEADS * (ENTRY + 4) + room + spare + 4096) * 1.01
