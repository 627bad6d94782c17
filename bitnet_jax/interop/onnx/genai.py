"""What onnxruntime-genai reads beside a graph: what is the cache, and how long texts get."""

from typing import Any

from ...models.decoder import DecoderConfig
from .network import IDS, MASK

FILE = "genai_config.json"


def genai_config(config: DecoderConfig, ids: dict[str, Any]) -> dict[str, Any]:
    """``genai_config.json`` for a graph with a cache.

    Args:
      config: of the decoder.
      ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, None for what it has not.

    >>> found = genai_config(DecoderConfig(300), {"eos_token_id": 2})
    >>> found["model"]["decoder"]["inputs"]["past_key_names"]
    'past_key_values.%d.key'
    """
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "inputs": {
            IDS: IDS,
            MASK: MASK,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    known = {name: number for name, number in ids.items() if number is not None}
    end = known.get("eos_token_id", 0)
    known = {"eos_token_id": end, "pad_token_id": end[0] if isinstance(end, list) else end} | known
    model = {
        "type": "llama",  # any decoder: what it computes is in the graph
        "context_length": config.max_length,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # The graph gives the longer cache back in memory of its own.
    search = {"max_length": config.max_length, "past_present_share_buffer": False}
    return {"model": model | known, "search": search}
