"""What onnxruntime-genai reads beside a graph: what is the cache, and how long texts get."""

from typing import Any

from ...models.decoder import DecoderConfig
from .network import IDS, MASK, PAST, PRESENT

FILE = "genai_config.json"


def genai_config(config: DecoderConfig, graph: str, ids: dict[str, Any]) -> dict[str, Any]:
    """``genai_config.json`` for a graph with a cache.

    Args:
      config: of the decoder.
      graph: the file's name, beside this one.
      ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, None for what it has not.

    >>> found = genai_config(DecoderConfig(300), "model.onnx", {"eos_token_id": 2})
    >>> found["model"]["decoder"]["inputs"]["past_key_names"]
    'past_key_values.%d.key'
    """
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "inputs": {
            IDS: IDS,
            MASK: MASK,
            "past_key_names": f"{PAST}.%d.key",
            "past_value_names": f"{PAST}.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.%d.key",
            "present_value_names": f"{PRESENT}.%d.value",
        },
    }
    model = {
        "type": "llama",  # any decoder: what it computes is in the graph
        "context_length": config.max_length,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # The graph gives the longer cache back in memory of its own.
    search = {"max_length": config.max_length, "past_present_share_buffer": False}
    # No end at all for a model that has none: a number of ours would end texts at a word.
    known = {name: number for name, number in ids.items() if number is not None}
    return {"model": model | known, "search": search}
