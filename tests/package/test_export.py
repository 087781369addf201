"""Every op can be exported with free sizes, saved, loaded, and run at other sizes."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.test_every_op import MODULES, OPS, packet


class Call(torch.nn.Module):
    """One op as a module: its tensors are inputs, all else is fixed. In-place ops return what they wrote."""

    def __init__(self, op: str, args: tuple) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(args)
        self.op, self.fixed = packet(op), [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaves[i] for i in self.places]

    def forward(self, *tensors):
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        out = self.op(*pytree.tree_unflatten(leaves, self.spec))
        return [tensor.clone() for tensor in tensors] if out is None else out


@pytest.mark.parametrize("op", OPS)
def test_export_save_load(op):
    for args in MODULES[op].samples("cpu"):
        call = Call(op, args)
        free = tuple({dim: torch.export.Dim.AUTO for dim in range(t.dim())} for t in call.tensors)
        program = torch.export.export(call, tuple(t.clone() for t in call.tensors), dynamic_shapes=(free,))
        inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        assert any(isinstance(size, torch.SymInt) for t in inputs if isinstance(t, torch.Tensor) for size in t.shape)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        expected = call(*(t.clone() for t in call.tensors))
        out = loaded(*(t.clone() for t in call.tensors))
        for x, y in zip(pytree.tree_leaves(out), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
