"""A folder of Hugging Face's to a model folder of ours, leaf by leaf."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from rich.console import Console

from ...errors import BitnetError
from ...leaf import PackedTernary
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...progress import counter
from ...quantize import Scheme
from ..mapped import Mapped, open_folder, read_json
from .config import CONFIG, Form, is_config, parse
from .layout import bytes_from_hf, bytes_of, exact_ternary
from .names import Slot, slots
from .text import carried, read_tokenizer

Tree = Any


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of a transformers model, of whatever family."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return is_config(read_json(path / CONFIG))
    except BitnetError:
        return False


def load(
    folder: str | Path,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    console: Console | None = None,
) -> ModelFolder:
    """A language model from a local Hugging Face folder, exactly.

    The Llama family (Llama, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen3) and BitNet in all its forms:

    | stored as                             | becomes                                           |
    |---------------------------------------|---------------------------------------------------|
    | float                                 | a float model, ``scheme`` None                    |
    | ``bitlinear`` (codes, 1 / scale)      | packed leaves, the same codes                     |
    | ``autobitlinear`` (codes, scale)      | packed leaves, the same codes and scale           |
    | ``autobitlinear`` offline, unpacked   | packed leaves; codes and scale read out exactly   |
    | ``autobitlinear`` online, 1bitLLM     | latent weights, ``Scheme("absmean", "tensor")``   |

    The file is mapped into memory and read tensor by tensor; packed codes never are anything but
    packed. Float weights become float32 (exact), packed ones stay at 2 bits.

    Args:
      folder: with config.json, ``*.safetensors`` (and their index) and tokenizer.json.
      tokenizer: instead of the folder's own.
      console: where to draw a progress bar; None for silence.

    Returns:
      The model with its tokenizer, and in ``files`` the tokenizer's config, chat template and
      special tokens' numbers.

    Raises:
      BitnetError: if a file is missing, damaged or hostile, or the model has something that ours
        has not: the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BitnetError(f"{folder}: no such folder")
    data = read_json(folder / CONFIG)
    config, form = parse(data, folder / CONFIG)
    tensors = open_folder(folder)
    own = read_tokenizer(folder) if tokenizer is None else tokenizer
    tree, kernels = _tree(tensors, config, form, console)
    scheme = Scheme("absmean", "tensor") if form.kind == "online" else _scheme(kernels)
    return ModelFolder(config, scheme, {"params": tree}, own, carried(folder, data))


_HEAD = "lm_head.weight"


def _tree(
    tensors: Mapped, config: DecoderConfig, form: Form, console: Console | None
) -> tuple[Tree, list]:
    """The parameters, and the kernels of all projections."""
    reader, tree, kernels = _Reader(tensors, form), {}, []
    with counter(console, "read", len(tensors.entries)) as done:
        for slot in slots(config, form.old):
            node = reader.node(slot)
            if slot.kind == "projection":
                kernels.append(node[slot.leaf])
            _put(tree, slot.path, node)
            done()
    reader.check_nothing_is_left(config.tied)
    return tree, kernels


def _scheme(kernels: list) -> Scheme | None:
    """What the layers would be trained on with; None if some are float and have to stay so."""
    if any(isinstance(k, jax.Array) for k in kernels):
        return None
    if groups := {k.group for k in kernels if k.group}:
        return Scheme("absmean", groups.pop())
    return Scheme("absmean", "tensor" if all(k.scale.size == 1 for k in kernels) else "channel")


def _put(tree: Tree, path: Iterable[str], node: dict) -> None:
    for key in path:
        tree = tree.setdefault(key, {})
    tree.update(node)


class _Reader:
    """Takes tensors by name, remembers which, and says what does not fit."""

    def __init__(self, tensors: Mapped, form: Form):
        self.tensors, self.form = tensors, form
        self.taken: set[str] = set()

    def node(self, slot: Slot) -> dict[str, Any]:
        """What stands at a place of our tree: the weight, and the bias if it has one."""
        offline = self.form.kind == "offline" and slot.kind == "projection"
        if slot.kind == "projection" and self.form.keeps(slot.module):
            if self.form.kind == "online":
                raise self.error(
                    f"{slot.module} stays float while others are latent: not supported"
                )
            offline = False
        if offline:
            return self._quantised(slot)
        weight = self._float(f"{slot.module}.weight", slot.shape)
        weight = weight.T if slot.leaf == "kernel" else weight
        node = {slot.leaf: jnp.array(weight, jnp.float32)}
        if slot.bias:
            bias = self._float(f"{slot.module}.bias", slot.shape[:1])
            node["bias"] = jnp.array(bias, jnp.float32)
        return node

    def _quantised(self, slot: Slot) -> dict[str, Any]:
        name = f"{slot.module}.weight"
        scale = self._scale(f"{slot.module}.weight_scale")
        out, size = slot.shape
        if self._entry(name).dtype == np.uint8:
            if out % 4:
                raise self.error(f"{name}: {out} outputs cannot be packed four to a byte")
            packed = self._take(name, (out // 4, size))
            try:
                codes = bytes_from_hf(packed)
            except BitnetError as e:
                raise self.error(f"{name}: {e}") from e
            leaf = PackedTernary(jnp.asarray(codes), jnp.full((1, 1), scale), size)
        elif self.form.reciprocal:
            raise self.error(f"{name}: is not packed, as linear_class 'bitlinear' has it")
        else:
            leaf = self._values(name, slot.shape, scale)
        node = {slot.leaf: leaf}
        if slot.bias:
            bias = self._float(f"{slot.module}.bias", slot.shape[:1]).astype(np.float32)
            # AutoBitLinear adds the bias before it multiplies by the scale.
            node["bias"] = jnp.array(bias if self.form.reciprocal else bias * scale)
        return node

    def _values(self, name: str, shape: tuple[int, ...], scale: np.float32) -> Any:
        """Codes times scale, stored in float: AutoBitLinear takes any values."""
        found = exact_ternary(self._float(name, shape).astype(np.float32).T, self.form.group)
        if found is None:
            raise self.error(
                f"{name}: holds values that are no codes times a scale a matrix or an output; "
                "only ternary ones are read"
            )
        codes, scales = found
        group = self.form.group if scales.shape[0] > 1 else 0
        packed, scales = jnp.array(bytes_of(codes)), jnp.array(scales * scale)
        return PackedTernary(packed, scales, len(codes), group)

    def _scale(self, name: str) -> np.float32:
        raw = self._float(name, (1,)).astype(np.float32)[0]
        if not np.isfinite(raw) or (self.form.reciprocal and raw == 0):
            raise self.error(f"{name}: {raw} is no scale")
        return np.float32(1) / raw if self.form.reciprocal else raw

    def _float(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = self._take(name, shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise self.error(f"{name}: is {x.dtype}, expected float")
        return x

    def _entry(self, name: str):
        if name not in self.tensors.entries:
            raise self.error(f"{name} is missing")
        return self.tensors.entries[name]

    def _take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = self._entry(name).shape
        if found != shape:
            raise self.error(f"{name} has shape {found}, the config asks for {shape}")
        self.taken.add(name)
        return self.tensors.read(name)

    def check_nothing_is_left(self, tied: bool) -> None:
        """What the network has and our decoder has no place for would change its results."""
        for name in self.tensors.entries.keys() - self.taken:
            if name.endswith(".rotary_emb.inv_freq") or (tied and name == _HEAD):
                continue
            zeros = name.endswith(".o_proj.bias") and not self.tensors.read(name).any()
            if not zeros:
                raise self.error(f"holds {name}, for which our decoder has no place")

    def error(self, what: str) -> BitnetError:
        """An error about these tensors."""
        return BitnetError(f"{self.tensors.source}: {what}")
