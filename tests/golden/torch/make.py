"""Small models written and run in PyTorch: weights as safetensors, inputs and outputs as npz.

Run with torch installed: python tests/golden/torch/make.py
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file, save_model
from torch import nn

HERE = Path(__file__).parent


class Block(nn.Module):
    """Pre-norm block around torch's own attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x, mask):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A causal language model, positions learned, head tied to the embedding."""

    def __init__(self, vocab=61, width=32, heads=4, layers=2, length=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(torch.randn(length, width) * 0.1)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf")), 1)
        x = self.embed(tokens) + self.pos[:length]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU()
        )
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        return self.out(self.net(x))


class Conv(nn.Module):
    """Strides, padding, groups, batch norm, and a Linear on the flattened picture."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, (3, 5), padding=(1, 2), groups=2, bias=False)
        self.hidden = nn.Linear(16 * 4 * 4, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


def main():
    torch.manual_seed(0)
    models = {
        "mlp": (Mlp(), torch.randn(16, 20)),
        "transformer": (Transformer(), torch.randint(0, 61, (3, 12))),
        "conv": (Conv(), torch.randn(6, 3, 16, 16)),
    }
    for name, (model, x) in models.items():
        for p in model.parameters():  # norms that do something
            if p.ndim == 1:
                nn.init.normal_(p, 0.5, 0.3)
        if name != "transformer":
            for _ in range(3):  # running statistics that are not 0 and 1
                model(torch.randn_like(x) * 2 + 0.5)
        model.eval()
        with torch.no_grad():
            y = model(x)
        np.savez(HERE / f"{name}.npz", x=x.numpy(), y=y.numpy())
        save_model(model, str(HERE / f"{name}.safetensors"))
    state = {
        f"module.base_model.{k}": v.bfloat16() for k, v in models["mlp"][0].state_dict().items()
    }
    save_file({k: v for k, v in state.items() if "num" not in k}, HERE / "mlp_bf16.safetensors")


if __name__ == "__main__":
    main()
