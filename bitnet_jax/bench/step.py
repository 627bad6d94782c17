"""A training step of a 25M-parameter decoder, ours and PyTorch's of the same shape.

12 layers of width 384, SwiGLU of 1,024, 16,384 tied tokens, AdamW, a batch of 8 x 128 tokens.
"""

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import optax

from ..models.decoder import DecoderConfig
from ..quantize import Scheme
from ..train.loss import next_token
from ..train.state import committed
from ..train.step import as_pytree, train_step
from .peers import bit_linear

LAYERS, WIDTH, HIDDEN, HEADS, VOCAB = 12, 384, 1024, 6, 16384
BATCH, LENGTH = 8, 128


def tokens() -> np.ndarray:
    """int32 (batch, length + 1)."""
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)


def operations() -> float:
    """Of the products with weights, the head included, forward and twice backward.

    >>> f"{operations() / 1e9:.0f} G"
    '169 G'
    """
    matrices = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + VOCAB * WIDTH
    return 6.0 * matrices * BATCH * LENGTH


def parameters() -> int:
    """Of the decoder, norms included.

    >>> f"{parameters() / 1e6:.1f} M"
    '27.5 M'
    """
    layer = 4 * WIDTH**2 + 3 * WIDTH * HIDDEN + 2 * WIDTH
    return LAYERS * layer + VOCAB * WIDTH + WIDTH


def by_us(
    ternary: bool,
    dtype: Literal["float32", "bfloat16"] = "float32",
    precision: Literal["float32", "tensorfloat32"] = "float32",
) -> Callable:
    """A call that takes one step."""
    config = DecoderConfig(
        vocab_size=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, hidden=HIDDEN,
        dtype=dtype, precision=precision,
    )  # fmt: skip
    model, optimizer = config.build(Scheme() if ternary else None), optax.adamw(1e-3)
    batch = tokens()
    params = model.init(jax.random.key(0), batch[:1, :-1])
    state = [committed((params, optimizer.init(params)))]
    take, loss = train_step(model, optimizer), as_pytree(next_token)

    def call() -> float:
        params, opt_state, metrics = take(*state[0], loss, batch, 0)
        state[0] = params, opt_state
        return float(metrics["loss"])

    return call


def by_torch(ternary: bool = False, autocast: bool = False) -> Callable:
    """A call that takes one step; without rotary positions, which cost next to nothing."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)

    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(*(bit_linear(x, self.weight) if ternary else (x, self.weight)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
            linear = lambda i, o: Linear(i, o, bias=False)
            self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH) for _ in range(4))
            self.gate, self.up = (linear(WIDTH, HIDDEN) for _ in range(2))
            self.down = linear(HIDDEN, WIDTH)

        def forward(self, x):
            y = self.norm1(x)
            split = lambda a: a.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    embed = nn.Embedding(VOCAB, WIDTH)
    blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.RMSNorm(WIDTH, 1e-6))
    optimizer = torch.optim.AdamW([*embed.parameters(), *blocks.parameters()], 1e-3)
    rows = torch.from_numpy(tokens()).long()

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = F.linear(blocks(embed(rows[:, :-1])), embed.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return call
