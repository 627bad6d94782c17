"""Every tensor of a checkpoint of Hugging Face's, and its place in our tree."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ...models.decoder import DecoderConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A module of theirs and the node of our tree that stands for it.

    Attributes:
      module: its name there; ``weight``, and perhaps ``bias`` and ``weight_scale``, follow.
      path: the node here, below ``params``.
      kind: a ``table`` (vocab, width), a ``norm`` (features,), a ``projection`` that ternary
        models quantise or the ``head``, both (out, in) there and (in, out) here.
      shape: of the weight there, not packed.
      bias: it has one.
    """

    module: str
    path: Path
    kind: Literal["table", "norm", "projection", "head"]
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def leaf(self) -> str:
        """What our tree calls the weight."""
        return {"table": "embedding", "norm": "scale"}.get(self.kind, "kernel")


# Their names of the two sub-norms: transformers' BitNet, and the 1bitLLM models.
_SUB_NORMS = {
    False: ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm"),
    True: ("self_attn.inner_attn_ln", "mlp.ffn_layernorm"),
}


def slots(config: DecoderConfig, old: bool = False) -> Iterator[Slot]:
    """All of them, in the order of the network; a tied head has none.

    Args:
      config: the network's shape.
      old: with the sub-norms' names of the 1bitLLM models.

    >>> [s.module for s in slots(DecoderConfig(vocab_size=8, layers=1))][:3]
    ['model.embed_tokens', 'model.layers.0.input_layernorm', 'model.layers.0.self_attn.q_proj']
    """
    c = config
    yield Slot("model.embed_tokens", ("embed",), "table", (c.vocab_size, c.width))
    for i in range(c.layers):
        yield from _block(c, f"model.layers.{i}.", f"layer_{i}", _SUB_NORMS[old])
    yield Slot("model.norm", ("norm",), "norm", (c.width,))
    if not c.tied:
        yield Slot("lm_head", ("head",), "head", (c.vocab_size, c.width))


def _block(c: DecoderConfig, module: str, layer: str, sub: tuple[str, str]) -> Iterator[Slot]:
    norm = lambda name, *path, size: Slot(module + name, (layer, *path), "norm", (size,))
    linear = lambda name, *path, shape, bias=False: Slot(
        module + name, (layer, *path), "projection", shape, bias
    )
    inner, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    yield norm("input_layernorm", "attention_norm", size=c.width)
    for theirs, ours, size in (("q", "query", inner), ("k", "key", keys), ("v", "value", keys)):
        shape = (size, c.width)
        yield linear(f"self_attn.{theirs}_proj", "attention", ours, shape=shape, bias=c.qkv_bias)
    if c.qk_norm:
        yield norm("self_attn.q_norm", "attention", "query_norm", size=c.head_dim)
        yield norm("self_attn.k_norm", "attention", "key_norm", size=c.head_dim)
    if c.sub_norms:
        yield norm(sub[0], "attention", "sub_norm", size=inner)
    yield linear("self_attn.o_proj", "attention", "out", shape=(c.width, inner))
    yield norm("post_attention_layernorm", "mlp_norm", size=c.width)
    yield linear("mlp.gate_proj", "mlp", "gate", shape=(c.hidden, c.width))
    yield linear("mlp.up_proj", "mlp", "up", shape=(c.hidden, c.width))
    if c.sub_norms:
        yield norm(sub[1], "mlp", "sub_norm", size=c.hidden)
    yield linear("mlp.down_proj", "mlp", "down", shape=(c.width, c.hidden))
