"""A Phase 3 network written back as the reference's pair of files: safetensors and JSON."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..errors import BitnetError
from ..models.phase3 import Phase3Config
from .phase3_keys import state_dict

Tree = Any

_TITANS = (
    "d_model", "n_layers", "n_heads", "d_ff", "vocab_size", "max_seq_len", "sw_window", "d_mem",
    "memory_decay", "mag_hidden", "mag_entropy_reg",
)  # fmt: skip
_TRM = ("T_max", "micro_steps", "deep_supervision", "step_weights", "detach_between_steps")
_ACT = ("halt_threshold", "act_loss_weight")


def save_pair(
    base: Path, variables: Tree, config: Phase3Config, description: dict, metadata: dict
) -> None:
    """Write ``base.safetensors`` and ``base.json`` as the reference's own loader reads them.

    Matrices go out in float16, buffers in float32. A tied head is written a second time, as an
    equal copy: the loader asks for every name of the network's state dict.

    Args:
      base: path of both files without their suffix.
      variables: float arrays; every value should be a float16 already.
      config: the network's shape, written into the JSON, where the next phase finds it.
      description: the JSON that came with the weights; what it says is kept.
      metadata: what to add to its ``metadata``.

    Raises:
      BitnetError: if the files cannot be written.
    """
    tensors = {
        name: np.ascontiguousarray(x, np.float32 if _is_buffer(name) else np.float16)
        for name, x in state_dict(variables).items()
    }
    if config.tied:
        prefix = "base_model." if config.quiet_star else ""
        tensors[f"{prefix}lm_head.weight"] = tensors[f"{prefix}backbone.token_emb.weight"].copy()
    told = {
        "config": {**_dict(description, "config"), **architecture(config)},
        "metadata": {**_dict(description, "metadata"), **metadata},
        "has_optimizer": False,
        "has_extra_tensors": False,
        "extra_tensor_keys": [],
    }
    weights, about = (base.with_name(base.name + end) for end in (".safetensors", ".json"))
    try:
        save_file(tensors, weights)
        about.write_text(json.dumps(told, indent=2) + "\n")
        shutil.copymode(about, weights)  # safetensors lets nobody else read it
    except OSError as e:
        raise BitnetError(f"{base}: cannot be written ({e.strerror or e})") from e


def architecture(config: Phase3Config) -> dict:
    """The three sections of the reference's JSON that tell a network's shape.

    >>> sections = architecture(Phase3Config())
    >>> sections["titans_config"]["head_dim"], sections["act_config"]["halt_threshold"]
    (64, 0.95)
    """
    told = dataclasses.asdict(config) | {"step_weights": list(config.step_weights)}
    pick = lambda names: {name: told[name] for name in names}
    return {
        "titans_config": {**pick(_TITANS), "head_dim": config.head_dim},
        "trm_config": pick(_TRM),
        "act_config": pick(_ACT),
    }


def _dict(description: dict, key: str) -> dict:
    found = description.get(key)
    return found if isinstance(found, dict) else {}


def _is_buffer(name: str) -> bool:
    return name.endswith(("memory_state", "ema_step_acc", "step_count"))
