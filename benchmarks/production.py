"""The production model of Phase 3, made with the reference's initialisation and keys.

    python -m benchmarks.production model            # model.safetensors and model.json, 130 MB

Nothing in it is trained: sizes, speed and formats can be measured on it, quality cannot.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bitnet_jax.interop.phase3_keys import shapes
from bitnet_jax.interop.phase3_pair import architecture
from bitnet_jax.models.phase3 import Phase3Config


def tensors(config: Phase3Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict, without the tied head: N(0, 0.02) in the backbone, torch's defaults behind it.

    torch's Linear draws weights and biases from U(-b, b), b = 1 / sqrt(inputs); its attention draws
    the packed projection from Xavier's U(-a, a), a = sqrt(6 / (inputs + outputs)), biases are 0.
    """
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    sizes = shapes(config)
    for name, shape in sizes.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("memory_state", "ema_step_acc", "step_count"):
            x = np.zeros(shape)
        elif module.rpartition(".")[2] in ("norm", "norm1", "norm2"):
            x = np.ones(shape) if leaf == "weight" else np.zeros(shape)
        elif name.startswith("backbone."):
            x = random.normal(0, 0.02, shape) if leaf == "weight" else np.zeros(shape)
        elif leaf == "in_proj_weight":
            x = random.uniform(-1, 1, shape) * np.sqrt(6 / sum(shape))
        elif "_attn" in module and leaf.endswith("bias"):
            x = np.zeros(shape)
        else:
            inputs = sizes[f"{module}.weight"][1]
            x = random.uniform(-1, 1, shape) / np.sqrt(inputs)
        found[name] = x.astype(np.float32)
    return found


def write_pair(base: Path, config: Phase3Config = Phase3Config(), seed: int = 0) -> Path:
    """Write ``base.safetensors`` and ``base.json`` as the reference's writer would; the former."""
    file = base.with_name(base.name + ".safetensors")
    save_file(tensors(config, seed), file)
    told = {
        "config": architecture(config),
        "metadata": {"phase": 3},
        "has_optimizer": False,
        "has_extra_tensors": False,
        "extra_tensor_keys": [],
    }
    base.with_name(base.name + ".json").write_text(json.dumps(told, indent=2) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_pair(args.base, seed=args.seed))


if __name__ == "__main__":
    main()
