"""What llama.cpp calls our leaves, for each architecture of it that our decoder is."""

import dataclasses

import numpy as np

from ...models.decoder import DecoderConfig

# Matrices of a block, and where they lie in ours.
KERNELS = {
    "attn_q": ("attention", "query"),
    "attn_k": ("attention", "key"),
    "attn_v": ("attention", "value"),
    "attn_output": ("attention", "out"),
    "ffn_gate": ("mlp", "gate"),
    "ffn_up": ("mlp", "up"),
    "ffn_down": ("mlp", "down"),
}
BIASED = ("attn_q", "attn_k", "attn_v")


@dataclasses.dataclass(frozen=True)
class Arch:
    """One of llama.cpp's architectures.

    Attributes:
      neighbours: queries and keys rotate features 2i and 2i + 1; ours rotate halves.
      sub_norms, qk_norm: has those norms.
      activation: what its graph computes between gate and down.
    """

    neighbours: bool = False
    sub_norms: bool = False
    qk_norm: bool = False
    activation: str = "silu"


ARCHS = {
    "llama": Arch(neighbours=True),
    "qwen2": Arch(),
    "qwen3": Arch(qk_norm=True),
    "bitnet": Arch(sub_norms=True),
    # Microsoft's fork and its published files; stock llama.cpp does not know the names.
    "bitnet-b1.58": Arch(sub_norms=True, activation="relu2"),
    "bitnet-25": Arch(sub_norms=True, activation="relu2"),
}


def norms(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Norms of a block, and where they lie in ours."""
    found: dict[str, tuple[str, ...]] = {}
    found |= {"attn_norm": ("attention_norm",), "ffn_norm": ("mlp_norm",)}
    if config.sub_norms:
        found |= {"attn_sub_norm": ("attention", "sub_norm"), "ffn_sub_norm": ("mlp", "sub_norm")}
    if config.qk_norm:
        found |= {
            "attn_q_norm": ("attention", "query_norm"),
            "attn_k_norm": ("attention", "key_norm"),
        }
    return found


def shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's matrices."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width, hidden = config.width, config.hidden
    return {
        "attn_q": (query, width),
        "attn_k": (key, width),
        "attn_v": (key, width),
        "attn_output": (width, query),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }


def row_order(name: str, config: DecoderConfig, arch: str) -> np.ndarray | None:
    """Which of our rows llama.cpp has at each place of a query or key; None where they agree.

    Where it rotates neighbours, rows 0, 2, 4, ... of each head are our first half and rows 1, 3, 5,
    ... our second.

    >>> row_order("attn_q", DecoderConfig(8, width=8, heads=2, kv_heads=1), "llama").tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name)
    if heads is None or not ARCHS[arch].neighbours:
        return None
    return np.arange(heads * config.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def rope_divisors(config: DecoderConfig) -> np.ndarray:
    """What llama.cpp divides each pair's frequency by, for Llama 3's scaled positions.

    With f and g the `bitnet_jax.models.decoder.frequencies` without and with scaling: f / g.

    >>> config = DecoderConfig(8, width=8, heads=1, kv_heads=1,
    ...     rope_scaling=(8.0, 1.0, 4.0, 8192))
    >>> [round(float(x), 3) for x in rope_divisors(config)]
    [1.0, 1.0, 1.0, 4.681]
    """
    half = config.head_dim // 2
    f = config.rope_base ** (-np.arange(half) / half)
    factor, low, high, length = config.rope_scaling
    kept = np.clip((length / (2 * np.pi) * f - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)
