"""The production model of Phase 3, made with the reference's initialisation and keys, and measured.

    python -m benchmarks.production make model           # model.safetensors and model.json, 130 MB
    python -m benchmarks.production measure --out benchmarks/results/production

Nothing in it is trained: sizes, speed and formats can be measured on it, quality cannot.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.timing import keep
from bitnet_jax import Scheme, compress
from bitnet_jax.interop import phase3
from bitnet_jax.interop.phase3_keys import shapes
from bitnet_jax.interop.phase3_pair import architecture
from bitnet_jax.models.phase3 import Phase3Config

TARGET = 8.2


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


def seeds_arithmetic(parameters: int, matrix_parameters: int) -> list[tuple[str, str, str]]:
    """(what, the seed's figure, ours): the row "25M, 95 MB to 12 MB, 8.2x", worked out.

    Args:
      parameters: of the production model.
      matrix_parameters: those in the matrices that become ternary.
    """
    tables = parameters - matrix_parameters
    bits = lambda table, matrix: (table * tables + matrix * matrix_parameters) / 8e6
    size = 4 * parameters / 1e6
    at = lambda table, matrix: f"{bits(table, matrix):.1f} MB, {size / bits(table, matrix):.2f}x"
    return [
        ("parameters", "25 M", f"{parameters / 1e6:.1f} M, {tables / parameters:.0%} in tables"),
        ("float32", "95 MB", f"{size:.1f} MB ({size / 1.048576:.1f} MiB)"),
        ("everything in int8, scales not counted", "12 MB, 8.0x", at(8, 8)),
        ("tables in float16, the matrices for nothing", "", at(16, 0)),
        ("tables in float16, 2 bits a matrix weight", "8.2x", at(16, 2)),
        ("tables in int8, 2 bits a matrix weight", "", at(8, 2)),
        ("tables in int4, 2 bits a matrix weight", "", at(4, 2)),
    ]


def _rows(result: dict) -> Iterator[tuple[str, str, str]]:
    yield from seeds_arithmetic(result["parameters"], result["matrix_parameters"])
    disk = result["bytes_on_disk"]
    small = f"{disk['packed'] / 1e6:.1f} MB, {result['ratio_on_disk']:.2f}x"
    yield f"planned for {TARGET}x, the folder, all counted", "12 MB, 8.2x", small
    for name in ("import", "plan", "conversion", "job"):
        yield f"seconds: {name}", "", f"{result['seconds'][name]:.1f}"


def table(result: dict) -> Table:
    found = Table(title="The production model: the seed's row and what was measured")
    for name in ("", "seed", "here"):
        found.add_column(name)
    for row in _rows(result):
        found.add_row(*row)
    return found


def make(base: Path, /, seed: int = 0) -> None:
    """Write BASE.safetensors and BASE.json."""
    print(write_pair(base, seed=seed))


def measure(out: Path | None = None, seed: int = 0) -> None:
    """Import, plan for 8.2x, convert, pack, reload and verify the production model; print it.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      seed: of the weights.
    """
    console, scheme = Console(), Scheme("twn", "channel")
    with tempfile.TemporaryDirectory() as folder:
        file = write_pair(Path(folder) / "production", seed=seed)
        start = time.perf_counter()
        _, variables = phase3.load(file)
        jax.block_until_ready(variables)
        imported = time.perf_counter()
        source = compress.load_source(file, tokenizer="bytes")
        ready = time.perf_counter()
        policy = compress.make_policy("float16", source)
        policy = compress.plan_for(source, scheme, policy, TARGET, console=console)
        planned = time.perf_counter()
        (made := Path(folder) / "out").mkdir()
        result = compress.pack_only(source, made, policy, scheme, file, console)
        result["seconds"] |= {"import": imported - start, "plan": planned - ready}
    names = jax.tree_util.tree_leaves_with_path(source.params)
    result["matrix_parameters"] = sum(
        x.size for path, x in names if jax.tree_util.keystr(path[-1:]) == "['kernel']"
    )
    result = {k: v for k, v in result.items() if k not in ("conversion", "errors")}
    console.print(table(result))
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"make": make, "measure": measure})
