"""The reference's names for the tensors of a Phase 3 network, and our variables under them."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..convert import path_name
from ..models.phase3 import Phase3Config

Tree = Any

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_THIRDS = ("query", "key", "value")


@functools.lru_cache(maxsize=1)  # asked for twice a file, and tracing the network takes a while
def abstract(config: Phase3Config) -> Tree:
    """The network's variables as shapes and dtypes, without their numbers."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(config.build(None).init, jax.random.key(0), tokens)


def shapes(config: Phase3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a state dict of this network and its shape, but a tied ``lm_head.weight``.

    >>> found = shapes(Phase3Config(16, 16, 1, 2, 32, 8, d_mem=8, mag_hidden=8))
    >>> found["trm.refiner.feature_attn.in_proj_weight"], found["backbone.ltm.memory_state"]
    ((48, 16), (1, 1, 8))
    """
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract(config))
    return {name: x.shape for name, x in state_dict(zeros).items()}


def state_dict(variables: Tree) -> dict[str, np.ndarray]:
    """Float variables as the reference's state dict: its names, (out, in) matrices, its packing.

    A tied head is left out. The inverse of what `bitnet_jax.interop.phase3` does on the way in.

    Args:
      variables: ``{"params": ..., "buffers": ...}`` of `TRMTitansMAG` or `QuietSTaR`.

    Returns:
      Name to array, of the variables' dtypes.
    """
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, list] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        module, _, leaf = path_name(path).removeprefix("buffers/").rpartition("/")
        x = np.asarray(x).T if leaf == "kernel" else np.asarray(x)
        module, leaf = torch_module(module), _LEAVES.get(leaf, leaf)
        around, _, last = module.rpartition(".")
        if around.endswith("_attn") and last in _THIRDS:
            thirds.setdefault(f"{around}.in_proj_{leaf}", [None] * 3)[_THIRDS.index(last)] = x
            continue
        if around.endswith("_attn") and last == "out":
            module = f"{around}.out_proj"
        found[f"{module}.{leaf}"] = x
    return found | {name: np.concatenate(parts) for name, parts in thirds.items()}


def torch_module(path: str) -> str:
    """A path in our tree as the reference's module.

    >>> torch_module("backbone/layers_3/mlp/w_up"), torch_module("trm/refiner/mlp_0")
    ('backbone.layers.3.mlp.w_up', 'trm.refiner.mlp.0')
    """
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", path.replace("/", "."))


def check(tensors: Mapping[str, np.ndarray], config: Phase3Config) -> str:
    """What does not fit in one line, or an empty string."""
    wanted = shapes(config)
    missing = [n for n in wanted if n not in tensors]
    if missing:
        return f"{_some(missing)} missing"
    extra = [n for n in tensors if n not in wanted]
    if extra:
        return f"{_some(extra)} of no part of the network"
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            return f"{name} has shape {tensors[name].shape}, expected {shape}"
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more are" if len(names) > 3 else ""
    return ", ".join(names[:3]) + (more or (" is" if len(names) == 1 else " are"))
