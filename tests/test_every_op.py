"""What every op owes, walked over the registry: opcheck samples, a fake, a documented function, clear errors.

An op `x` of stage `s` brings `tests/<s>/test_<x>.py` with
- `samples(device)`: argument tuples of `torch.ops.kvcompress.<x>.default` for opcheck;
- `BAD`: wrong calls as `Bad(name, make(device) -> args, words)`; the same words must come from CPU, CUDA and fake.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcompress
from tests import attend, budget, score, select, store

STAGES = (score, budget, select, store, attend)
PLUMBING = {"build_id", "set_debug"}  # no tensors, nothing to check


def op_names() -> list[str]:
    names = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("kvcompress::")
    }
    return sorted(names - PLUMBING)


def module_of(op: str):
    """The op's own test module, or None."""
    name = "test_" + op.rstrip("_")
    for stage in STAGES:
        if name in {module.name for module in pkgutil.iter_modules(stage.__path__)}:
            return importlib.import_module(f"{stage.__name__}.{name}")
    return None


MODULES = {op: module_of(op) for op in op_names()}
OPS = [op for op, module in MODULES.items() if module is not None]
BAD = [(op, bad) for op in OPS for bad in MODULES[op].BAD]


def test_every_op_has_a_test_module():
    assert [op for op, module in MODULES.items() if module is None] == []


def packet(op: str):
    return getattr(torch.ops.kvcompress, op).default


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    samples = MODULES[op].samples(device)
    assert samples
    for args in samples:
        torch.library.opcheck(packet(op), args)


@pytest.mark.parametrize("op", OPS)
def test_documented_function(op):
    function = getattr(kvcompress, op)
    doc = function.__doc__ or ""
    for section in ("Args:", "Raises:", "Example:"):
        assert section in doc, f"kvcompress.{op}: docstring lacks {section}"


@pytest.mark.parametrize("op", OPS)
def test_bad_inputs_exist(op):
    assert len(MODULES[op].BAD) >= 5


def message(op: str, args) -> str:
    with pytest.raises(RuntimeError) as caught:
        packet(op)(*args)
    return str(caught.value)


@pytest.fixture
def debug(request):
    """The debug switch on, for wrong calls that only data shows."""
    kvcompress.set_debug(request.param)
    yield
    kvcompress.set_debug(False)


@pytest.mark.parametrize(
    ("op", "bad", "debug"),
    [(op, bad, bad.reads_data) for op, bad in BAD],
    indirect=["debug"],
    ids=lambda x: getattr(x, "name", x),
)
def test_bad_input(op, bad, debug, device):
    args = bad.make(device)
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    assert bad.words in message(op, args)
    after = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    for x, y in zip(before, after):  # nothing half written
        assert torch.equal(
            x.nan_to_num() if x.is_floating_point() else x, y.nan_to_num() if y.is_floating_point() else y
        )


@pytest.mark.parametrize(
    ("op", "bad"), [(op, bad) for op, bad in BAD if not bad.reads_data], ids=lambda x: getattr(x, "name", x)
)
def test_bad_input_fake(op, bad):
    args = bad.make("cpu")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = torch.utils._pytree.tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, args)
        assert bad.words in message(op, fake)


# --- on a GPU: graphs and streams


def copies(args):
    """The arguments with every tensor cloned, views and overlaps kept by cloning the storage behind them."""

    def clone(x):
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage().clone()
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())

    return torch.utils._pytree.tree_map(clone, args)


def raw(x):
    """The whole storage behind a tensor, as bytes: written to even where the tensor's own strides overlap."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def tensors(*trees):
    return [x for x in torch.utils._pytree.tree_leaves(trees) if isinstance(x, torch.Tensor)]


def assert_same(ours, expected):
    for x, y in zip(tensors(*ours), tensors(*expected), strict=True):
        assert torch.equal(x, y) or (torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num()))


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op):
    """Captured once, replayed: the same bits as eager, outputs and tensors changed in place."""
    for args in MODULES[op].samples("cuda"):
        eager = copies(args)
        expected = packet(op)(*eager)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            packet(op)(*copies(args))  # warm up: lazily loaded kernels may not be loaded during capture
        torch.cuda.current_stream().wait_stream(side)
        captured = copies(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packet(op)(*captured)
        for x, original in zip(tensors(captured), tensors(args), strict=True):
            raw(x).copy_(raw(original))
        graph.replay()
        torch.cuda.synchronize()
        assert_same((out, captured), (expected, eager))


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_two_streams(op):
    """The op runs on the caller's stream: inputs that a busy stream writes late are seen, and two streams do not meet."""
    for args in MODULES[op].samples("cuda"):
        eager = copies(args)
        expected = packet(op)(*eager)
        streams = [torch.cuda.Stream() for _ in range(2)]
        late = [copies(args) for _ in streams]
        for inputs in late:
            for x in tensors(inputs):
                raw(x).zero_()
        torch.cuda.synchronize()
        outs = []
        for stream, inputs in zip(streams, late):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                for x, original in zip(tensors(inputs), tensors(args), strict=True):
                    raw(x).copy_(raw(original))
                outs.append(packet(op)(*inputs))
        torch.cuda.synchronize()
        for out, inputs in zip(outs, late):
            assert_same((out, inputs), (expected, eager))
