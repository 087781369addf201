"""attend against float64: bounds of every kind, grouped queries, rows that see nothing."""

from __future__ import annotations

import pytest
import torch

from kvcompress.attend import attend, attend_with_lse

DTYPES = [torch.float32, torch.bfloat16]


def reference(q, k, v, starts, ends):
    """One query at a time, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                last = ends[b] - (q.shape[2] - 1 - i)
                if last <= starts[b]:
                    continue
                keys, values = (t[b, h // group, starts[b] : last] for t in (k, v))
                out[b, h, i] = torch.softmax(keys @ q[b, h, i] * q.shape[3] ** -0.5, 0) @ values
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_heads", "heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("queries", "seq_len", "starts", "ends"),
    [
        (1, 40, [0, 0, 0], [40, 40, 40]),  # decode
        (1, 40, [0, 0, 0], [33, 33, 33]),  # decode in a buffer with room
        (1, 40, [0, 0, 0], [40, 7, 1]),  # rows of unequal length
        (1, 40, [0, 3, 0], [40, 7, 0]),  # a row without entries
        (12, 12, [0, 0, 0], [12, 12, 12]),  # prompt
        (12, 12, [0, 5, 11], [12, 12, 12]),  # left-padded prompt
        (12, 12, [0, 12, 4], [12, 12, 12]),  # a row of padding only
        (5, 40, [0, 0, 0], [37, 37, 37]),  # drafts, second turn
        (5, 40, [0, 0, 0], [40, 9, 3]),  # the same over unequal rows, one shorter than the queries
        (20, 60, [0, 0, 0], [60, 44, 21]),  # a longer turn over unequal rows
        (20, 60, [0, 0, 0], [60, 44, 15]),  # one shorter than the queries
        (70, 100, [0, 0, 0], [100, 90, 71]),  # too long for a mask of each row
    ],
)
def test_against_float64(queries, seq_len, starts, ends, q_heads, heads, dtype, device):
    q = torch.randn(3, queries, q_heads, 16, device=device, dtype=dtype).transpose(1, 2)
    buffer = torch.randn(2, 3, heads, seq_len + 8, 16, device=device, dtype=dtype)  # views of a longer buffer
    k, v = (t[:, :, :seq_len] for t in buffer)
    out = attend(q, k, v, starts=starts, ends=ends)
    expected = reference(q, k, v, starts, ends)
    plain = torch.softmax(q.double() @ k.repeat_interleave(q_heads // heads, 1).double().mT * 0.25, -1).to(dtype)
    floor = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * (1 + plain.float().max().item())
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max().item() <= floor * max(1.0, v.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_lies_outside_the_bounds_does_not_matter(value, device):
    """Equal rows are views, so even NaN behind them is never read."""
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (1, 20, 20))
    wanted = attend(q, k[:, :, :10], v[:, :, :10])
    k[:, :, 10:], v[:, :, 10:] = value, value
    assert torch.equal(attend(q, k, v, ends=[10, 10]), wanted)


def test_masks_come_in_blocks(monkeypatch, device):
    """Many queries behind many entries: the same result whatever the block."""
    import kvcompress.attend as module

    q, k, v = (torch.randn(1, heads, n, 16, device=device) for heads, n in ((4, 50), (2, 90), (2, 90)))
    whole = attend(q, k, v)
    monkeypatch.setattr(module, "_MASK_ELEMENTS", 90 * 7)
    torch.testing.assert_close(attend(q, k, v), whole, rtol=0, atol=1e-6)


def test_rows_of_a_batch_equal_that_row_alone(device):
    q, k, v = (torch.randn(3, heads, n, 16, device=device) for heads, n in ((4, 5), (2, 30), (2, 30)))
    ends = [30, 12, 4]
    together = attend(q, k, v, ends=ends)
    for row, end in enumerate(ends):
        one = slice(row, row + 1)
        assert torch.equal(together[one], attend(q[one], k[one], v[one], ends=[end]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("q_heads", "heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 21, 69], [0, 70, 4]])
def test_log_sum_exp(starts, head_dim, q_heads, heads, dtype, device):
    """The output to the bit, and the log-sum-exp to the error of float32; None where torch's is less exact than that."""
    q, k, v = (
        torch.randn(3, 70, h, head_dim, device=device, dtype=dtype).transpose(1, 2) for h in (q_heads, heads, heads)
    )
    out, lse = attend_with_lse(q, k, v, starts=starts)
    assert torch.equal(out, attend(q, k, v, starts=starts))
    if (device == "cpu") == (dtype != torch.float32):
        assert lse is None
        return
    assert lse is not None
    assert lse.is_contiguous()
    position = torch.arange(70, device=device)
    hidden = position > position[:, None]
    for row, start in enumerate(starts):
        keys = k[row].double().repeat_interleave(q_heads // heads, 0)
        logits = q[row].double() @ keys.mT * head_dim**-0.5
        exact = logits.masked_fill(hidden | (position < start), -torch.inf).logsumexp(-1)
        assert torch.isposinf(lse[row, :, :start]).all()
        # a running dot product is rounded once a step: as a random walk, eps / 2 of sum |q_d k_d|
        walk = (q[row].double().abs() @ keys.abs().mT).max() * head_dim**-0.5
        error = (lse[row, :, start:].double() - exact[:, start:]).abs().max() if start < 70 else 0.0
        assert error <= torch.finfo(torch.float32).eps * (8 + walk)


def test_log_sum_exp_of_few_tokens_and_of_none(device):
    q, k, v = (torch.randn(1, heads, 5, 16, device=device) for heads in (4, 2, 2))
    out, lse = attend_with_lse(q, k, v)
    assert torch.equal(out, attend(q, k, v))
    logits = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(
        ~torch.ones(5, 5, device=device).tril().bool(), -torch.inf
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    _, none = attend_with_lse(
        torch.randn(1, 4, 12, 16, device=device), *(torch.randn(1, 2, 40, 16, device=device) for _ in "kv")
    )
    assert none is None  # queries behind older entries
    q.requires_grad_()
    out, none = attend_with_lse(q.repeat(1, 1, 3, 1), k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))
    assert none is None
    assert out.requires_grad
