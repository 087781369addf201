"""A decode loop without any framework: each layer's cache is cut to `BUDGET` entries right after its own prefill.

The model is a toy with random weights (attention only, no positions), so its text means nothing; what is real is the
cache: scored, cut in place, appended to. Run it: python examples/plain_loop.py
"""

import torch
import torch.nn.functional as F

import kvcompress

VOCAB, HIDDEN, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 256, 128, 4, 8, 2, 16
PROMPT, BUDGET, WINDOW, NEW_TOKENS = 1000, 100, 16, 20


class Layer:
    """One attention layer: its weights, and a cache that is cut once and then appended to."""

    def __init__(self, generator):
        sizes = [(Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN]
        self.qkv = torch.randn(sizes, generator=generator) / HIDDEN**0.5
        self.out = torch.randn(HIDDEN, Q_HEADS * HEAD_DIM, generator=generator) / HIDDEN**0.5

    def project(self, x):
        """[B, S, hidden] -> q [B, Hq, S, D], k and v [B, Hkv, S, D]."""
        heads = (x @ self.qkv.T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        return heads.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)

    def attend(self, x, q, k, v, causal):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return x + out.transpose(1, 2).flatten(2) @ self.out.T

    def prefill(self, x):
        q, k, v = self.project(x)
        y = self.attend(x, q, k, v, causal=True)
        # score: what do the last queries look at?  select: the best, and the window itself
        scores = kvcompress.window_scores(q[:, :, -WINDOW:], k, pool="max", kernel_size=7)
        index = kvcompress.topk(scores, BUDGET, window=WINDOW)
        # store: a smaller buffer with room for what comes; compact_([k, v], index) would cut within the old one
        self.k, self.v, self.positions = kvcompress.gather(
            [k, v, torch.arange(k.shape[2], dtype=torch.int32).expand(k.shape[:3]).contiguous()],
            index,
            capacity=BUDGET + NEW_TOKENS,
        )
        self.length = BUDGET
        return y

    def decode(self, x):
        q, k, v = self.project(x)
        slots = torch.full((len(x), 1), self.length, dtype=torch.int32)
        kvcompress.append_([self.k, self.v], [k, v], slots)
        self.length += 1
        return self.attend(x, q, self.k[:, :, : self.length], self.v[:, :, : self.length], causal=False)


@torch.inference_mode()
def main():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    layers = [Layer(generator) for _ in range(LAYERS)]
    tokens = torch.randint(VOCAB, (1, PROMPT), generator=generator)
    x = embedding[tokens]
    for layer in layers:
        x = layer.prefill(x)
    for _ in range(NEW_TOKENS):
        tokens = torch.cat([tokens, (x[:, -1:] @ embedding.T).argmax(-1)], dim=1)
        x = embedding[tokens[:, -1:]]
        for layer in layers:
            x = layer.decode(x)
    for number, layer in enumerate(layers):
        kept = layer.positions[0, 0, :BUDGET]
        print(
            f"layer {number}: {layer.length} entries for {tokens.shape[1]} tokens, head 0 kept {kept[:6].tolist()} ..."
        )
    return layers


if __name__ == "__main__":
    main()
