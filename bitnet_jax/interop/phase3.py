"""Phase 3 checkpoints of the pipeline: PyTorch weights and JSON to a network and its variables.

A file is read whatever form its writer gave it: safetensors or torch's own, with or without the
JSON, with prefixes of wrappers, with a tied head left out, copied or grown apart, with tokens added
to the vocabulary, in half precision, with the optimizer's or extra tensors among the weights.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BitnetError
from ..models.phase3 import Phase3Config
from . import phase3_keys, unpickle
from .tensors import Tensors, from_state_dict, inside, read
from .torch import ImportReport, from_torch

Tree = Any

_TORCH = (".pt", ".pth", ".bin")
_FIRST = "backbone.token_emb.weight"
_WRAPPERS = re.compile(r"((module|base_model|_orig_mod|model)\.)*")
# What the reference's writer puts beside the weights, and its second name of the wrapped network.
_ASIDE = re.compile(r"^(extra_|opt_state_)|(^|\.)thought_generator\.")
_THINKING = ("coherence_scorer.", "mixing_head.")
_SECTIONS = ("titans_config", "trm_config", "act_config")
_BUFFERS = ("backbone.ltm.memory_state", "act_head.ema_step_acc", "act_head.step_count")
_IN_SHAPES = (
    "vocab_size", "d_model", "n_layers", "d_ff", "max_seq_len", "d_mem", "mag_hidden", "tied",
    "quiet_star",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Phase3:
    """A Phase 3 checkpoint, read.

    Attributes:
      config: the network's shape; ``config.build(None)`` is the module.
      variables: ``{"params": ..., "buffers": ...}``, float32.
      report: what became of every tensor.
      assumed: fields of the config that neither the files nor the caller tell, as assumed.
      notes: sentences about what was not as the JSON says.
      description: the JSON, empty without one.
    """

    config: Phase3Config
    variables: Tree
    report: ImportReport
    assumed: dict[str, Any]
    notes: tuple[str, ...]
    description: dict

    def lines(self) -> list[str]:
        """Sentences for a person."""
        told = list(self.notes)
        if self.assumed:
            taken = ", ".join(f"{k}={_short(v)}" for k, v in self.assumed.items())
            told.append(
                f"not in the files, so the reference's defaults were taken: {taken}; "
                "say otherwise if the model was trained with others"
            )
        return told


def load(path: str | Path, architecture: Any = None, **overrides: Any):
    """The network of a Phase 3 checkpoint and its variables.

    ``module.apply(variables, input_ids, memory_state)`` gives the reference's outputs under the
    reference's names, see `bitnet_jax.models.phase3.TRMTitansMAG`.

    Args:
      path: safetensors, torch's .pt or .pth, the JSON beside them, their common name, or a folder.
      architecture: a JSON file, or what is in it, with ``titans_config``, ``trm_config``,
        ``act_config``, where the weights' own JSON does not have them.
      overrides: fields of `Phase3Config` that the files do not tell, ``n_heads=2`` say. What is
        told by nobody is the reference's default, and a warning is logged that lists it.

    Returns:
      (module, variables).

    Raises:
      BitnetError: as `read_phase3`.
    """
    found = read_phase3(path, architecture, **overrides)
    for line in found.lines():
        logging.getLogger("bitnet_jax").warning("%s: %s", path, line)
    return found.config.build(None), found.variables


def read_phase3(path: str | Path, architecture: Any = None, **overrides: Any) -> Phase3:
    """As `load`, with all that was found out on the way.

    Raises:
      BitnetError: in one line, if files are missing or damaged or hold code, tensors are missing,
        of another shape or of no part of the network, or the files or ``overrides`` contradict the
        weights.
    """
    path = Path(path)
    weights = _weights(path)
    description = _description(weights)
    if weights.suffix in _TORCH:
        stored = unpickle.load(weights)
        if not isinstance(stored, Mapping):
            raise BitnetError(f"{weights}: holds a {type(stored).__name__}, not a state dict")
        description = description or {
            k: v for k, v in stored.items() if k in ("config", "metadata")
        }
        tensors = from_state_dict(stored, str(weights))
    else:
        tensors = read(weights)
    state = _unwrapped(weights, tensors)
    told = _architecture(description) | _architecture(_loaded(architecture))
    config, assumed, notes = _config(weights, state, told, overrides)
    state, more = _completed(weights, state, config)
    if wrong := phase3_keys.check(state, config):
        raise BitnetError(f"{weights}: not this Phase 3 network: {wrong}")
    imported = from_torch(state, like=phase3_keys.abstract(config))
    return Phase3(config, imported.tree, imported.report, assumed, notes + more, description)


def is_phase3(path: Path) -> bool:
    """Whether these files look like a Phase 3 checkpoint, by the names of their tensors."""
    try:
        names = read(_weights(Path(path))).arrays
    except BitnetError:
        return False
    return any(n.endswith(_FIRST) for n in names) and any(".refiner." in n for n in names)


def description(path: Path) -> dict:
    """The JSON that lies beside these weights; empty without one."""
    return _description(_weights(Path(path)))


def _weights(path: Path) -> Path:
    """The file with the weights."""
    if path.is_dir():
        return inside(path)
    if path.suffix == ".json" or not path.suffix or not path.exists():
        base = path.with_suffix("") if path.suffix == ".json" else path
        for suffix in (".safetensors", *_TORCH):
            if (file := base.with_name(base.name + suffix)).is_file():
                return file
    if not path.is_file():
        raise BitnetError(f"{path}: no such file; give a Phase 3 model's .safetensors or .pt")
    return path


def _description(weights: Path) -> dict:
    """The JSON beside the weights, if there is one."""
    for file in (weights.with_suffix(".json"), weights.with_name("config.json")):
        if file.is_file():
            return _loaded(file)
    return {}


def _loaded(source: Any) -> dict:
    """A dict, or the one in a JSON file."""
    if source is None or isinstance(source, Mapping):
        return dict(source or {})
    try:
        found = json.loads(Path(source).read_text())
    except (ValueError, OSError) as e:
        raise BitnetError(f"{source}: is no JSON that can be read ({e})") from e
    return found if isinstance(found, dict) else {}


def _unwrapped(weights: Path, tensors: Tensors) -> dict[str, np.ndarray]:
    """The network's tensors by their names without wrappers' prefixes.

    Of Quiet-STaR's ``base_model.`` stays: it has parts beside the network.
    """
    arrays = {n: tensors.arrays[tensors.tied.get(n, n)] for n in (*tensors.arrays, *tensors.tied)}
    arrays = {n: x for n, x in arrays.items() if not _ASIDE.search(n)}
    first = next((n for n in arrays if n.endswith(_FIRST)), None)
    if first is None:
        some = ", ".join(list(arrays)[:3])
        raise BitnetError(f"{weights}: not a Phase 3 network: no {_FIRST} in it, but {some}, ...")
    prefix = first.removesuffix(_FIRST)
    if not _WRAPPERS.fullmatch(prefix):
        raise BitnetError(
            f"{weights}: its names begin with {prefix!r}; a Phase 3 network's begin with "
            "backbone., trm., act_head., or these behind module. or base_model.; rename its tensors"
        )
    if any(part in n for n in arrays for part in _THINKING):
        prefix = prefix.removesuffix("base_model.")
    strangers = [n for n in arrays if not n.startswith(prefix)]
    if strangers:
        raise BitnetError(
            f"{weights}: {strangers[0]} does not begin with {prefix!r} as {first} does; "
            "it is of no part of the network"
        )
    return {n.removeprefix(prefix): x for n, x in arrays.items()}


def _config(weights: Path, state: dict, told: dict, overrides: dict):
    """The network's shape, what of it was assumed, and what is worth saying."""
    fields = {f.name: f for f in dataclasses.fields(Phase3Config)}
    if unknown := [k for k in overrides if k not in fields]:
        raise BitnetError(
            f"{unknown[0]}: no field of a Phase 3 network; there are {', '.join(fields)}"
        )
    shapes, notes = _from_shapes(weights, state), []
    for source, given in (("the JSON", told), ("you", overrides)):
        for name in shapes.keys() & given.keys():
            grown = name == "vocab_size" and source == "the JSON" and given[name] < shapes[name]
            if grown:
                more = shapes[name] - given[name]
                notes.append(f"the vocabulary grew by {more} tokens after the JSON was written")
            elif given[name] != shapes[name]:
                say = "says" if source == "the JSON" else "say"
                raise BitnetError(
                    f"{weights}: {source} {say} {name} is {given[name]}, "
                    f"its weights have {shapes[name]}"
                )
    known = {**told, **overrides, **shapes}
    width, assumed = shapes["d_model"], {}
    for name in fields.keys() - known.keys():
        default = fields[name].default
        # The reference's heads have 64 features.
        assumed[name] = max(width // 64, 1) if name == "n_heads" else default
    assumed = {name: assumed[name] for name in fields if name in assumed}
    try:
        return Phase3Config(**known, **assumed), assumed, tuple(notes)
    except (TypeError, ValueError) as e:
        raise BitnetError(f"{weights}: {e}") from None


def _from_shapes(weights: Path, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the tensors' shapes tell."""
    wrapped = any(n.startswith(_THINKING) for n in state)
    base = "base_model." if wrapped else ""

    def size(name: str, axis: int) -> int:
        x = state.get(base + name)
        if x is None or x.ndim != 2:
            raise BitnetError(f"{weights}: not a Phase 3 network: no matrix {base}{name} in it")
        return x.shape[axis]

    table, head = state[base + _FIRST], state.get(f"{base}lm_head.weight")
    if table.ndim != 2 or (head is not None and head.shape != table.shape):
        other = "" if head is None else f", lm_head.weight {head.shape}"
        raise BitnetError(
            f"{weights}: wrong vocabulary: {_FIRST} has shape {table.shape}{other}; "
            "they must be equal"
        )
    layers = (re.search(r"(?:^|\.)backbone\.layers\.(\d+)\.", n) for n in state)
    return {
        "vocab_size": table.shape[0],
        "d_model": table.shape[1],
        "n_layers": max((int(m[1]) + 1 for m in layers if m), default=0),
        "d_ff": size("backbone.layers.0.mlp.w_gate.weight", 0),
        "max_seq_len": size("backbone.pos_emb.weight", 0),
        "d_mem": size("backbone.ltm.w_down.weight", 0),
        "mag_hidden": size("backbone.mag_gate.w_concat.weight", 0),
        "tied": head is None or np.array_equal(head, table),
        "quiet_star": wrapped,
    }


def _architecture(description: Any) -> dict[str, Any]:
    """The fields that the JSON tells, wherever its writer put them."""
    if not isinstance(description, dict):
        return {}
    if any(section in description for section in _SECTIONS):
        names = {f.name for f in dataclasses.fields(Phase3Config)} - {"tied", "quiet_star"}
        sections = (description.get(section) for section in _SECTIONS)
        merged = {k: v for part in sections if isinstance(part, dict) for k, v in part.items()}
        return {k: v for k, v in merged.items() if k in names}
    found = (_architecture(description[k]) for k in ("config", "model_config") if k in description)
    return next((x for x in found if x), {})


def _completed(weights: Path, state: dict, config: Phase3Config):
    """The tensors with a tied head dropped and the buffers in their shapes."""
    base = "base_model." if config.quiet_star else ""
    state, notes = dict(state), ()
    if config.tied:
        state.pop(f"{base}lm_head.weight", None)
    sizes = ((1, 1, config.d_mem), (10,), (10,))
    absent = [n for n in _BUFFERS if base + n not in state]
    if absent:
        notes = (f"zeros were taken for what is not in the file: {', '.join(absent)}",)
    for name, shape in zip(_BUFFERS, sizes):
        x = state.get(base + name, np.zeros(shape, np.float32))
        if name.endswith("memory_state"):
            if x.shape[-1:] != (config.d_mem,):
                raise BitnetError(f"{weights}: {name} has shape {x.shape}, expected {shape}")
            x = x.reshape(-1, 1, config.d_mem)[:1]  # older files hold one a sequence of the batch
        state[base + name] = x
    return state, notes


def _short(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
