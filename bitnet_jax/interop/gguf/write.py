"""A model folder as a GGUF file that stock llama.cpp runs: codes and scales as they are."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from ...errors import BitnetError
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...progress import counter
from ..export import ExportReport
from . import tokenizer
from .blocks import size
from .container import TYPE_IDS
from .plan import FLOATS, Plan, Tensor
from .read import NOTE, package

Type = Literal["TQ1_0", "TQ2_0", "Q2_0", "Q4_0"]
# Types that every llama.cpp since August 2024 reads.
OLD = ("TQ2_0", "Q4_0")
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37}


def save(
    model: ModelFolder,
    out: str | os.PathLike,
    *,
    types: Sequence[Type] = OLD,
    floats: Literal["exact", "F16", "BF16"] = "exact",
    scale_tensors: bool = False,
    patched: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Write a model as one GGUF file, for llama.cpp and all that is built on it.

    The architecture follows from the model: ``llama``, ``qwen2`` with biases, ``qwen3`` with query
    and key norms, ``bitnet`` with sub-norms. Codes go as they are, and each matrix takes the first
    of ``types`` whose blocks hold it: TQ1_0 (1.69 bits a weight) and TQ2_0 (2.06) need inputs and
    groups in multiples of 256, Q2_0 (2.25; llama.cpp of 2026) of 64, Q4_0 (4.5) of 32; a matrix
    that none holds goes as its values. int8 and int4 leaves go as Q8_0 and Q4_0.

    A block's scale is a float16. Scales that are none are rounded to it, at most 4.9e-4, and the
    report says so; scales made by `bitnet_jax.half.exact_in_half` already are. One scale a matrix
    can go exactly instead, as a tensor beside it: that is how ``bitnet`` is written always.

    Args:
      model: a `Decoder`, float, latent (made ternary by its scheme, as when it runs) or packed.
      out: the file to write, complete or not at all; a file that is there is replaced.
      types: for ternary matrices, the preferred first.
      floats: ``"exact"`` for the smallest of F16, BF16, F32 that holds a matrix as it is, or the
        one to round to. Norms and biases are float32 always.
      scale_tensors: put scales of whole matrices beside them also for other architectures, which
        llama.cpp reads since 2026; then nothing is rounded.
      patched: for a llama.cpp that reads ``bitnet.hidden_activation``; else squared ReLU is
        refused, because stock llama.cpp would compute SiLU in its place without a word.
      console: where to draw a progress bar; None for silence.

    Returns:
      `ExportReport`.

    Raises:
      BitnetError: if stock llama.cpp has no graph for the network, or no such tokenizer.

    >>> import tempfile, jax, jax.numpy as jnp, bitnet_jax
    >>> from bitnet_jax.train.text import byte_tokenizer
    >>> config = DecoderConfig(256, width=256, layers=1, hidden=256)
    >>> params = config.build(None).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    >>> small = bitnet_jax.convert(params).tree
    >>> folder = ModelFolder(config, bitnet_jax.Scheme(), small, byte_tokenizer())
    >>> with tempfile.TemporaryDirectory() as room:
    ...     save(folder, f"{room}/m.gguf", scale_tensors=True).form
    'llama, matrices 7 TQ2_0, 1 F16'
    """
    gguf, out = package(), Path(out)
    if out.is_dir():
        raise BitnetError(f"{out}: a folder; name the file to write in it, {out / 'model.gguf'}")
    config = model.config
    if not isinstance(config, DecoderConfig):
        raise BitnetError(
            f"{out}: GGUF holds decoders of the Llama and BitNet family, not "
            f"{type(config).__name__.removesuffix('Config')}; export to onnx instead"
        )
    arch = _architecture(config, patched)
    words, notes = tokenizer.write(model.tokenizer, config.vocab_size, model.files)
    plan = Plan(model, arch, tuple(types), floats, scale_tensors or arch == "bitnet")
    tensors = list(plan.tensors())
    main = max(tensors, key=lambda t: t.nbytes * t.name.startswith("blk.")).kind
    writer = gguf.GGUFWriter(None, arch)
    for key, value in (_metadata(config, arch, patched) | words).items():
        _add(gguf, writer, key, value)
    if main in _FILE_TYPES:
        writer.add_file_type(_FILE_TYPES[main])
    writer.add_quantization_version(2)
    scheme = None if model.scheme is None else dataclasses.asdict(model.scheme)
    leaves = {t.name: t.leaf for t in tensors if t.leaf}
    writer.add_string(NOTE, json.dumps({"scheme": scheme, "leaves": leaves}))
    for t in tensors:
        # Any dtype but uint8, so that the shape is taken as the tensor's and not as its bytes'.
        number: Any = TYPE_IDS[t.kind]
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.int8), t.nbytes, number)
    _write(writer, tensors, out, console)
    form = _form(tensors, arch)
    return ExportReport(
        "gguf", out, out.stat().st_size, form, notes + tuple(_notes(tensors, types))
    )


def _write(writer: Any, tensors: list[Tensor], out: Path, console: Console | None) -> None:
    """All tensors, one after another, into a file beside ``out`` that then takes its place."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with counter(console, "write", len(tensors)) as done:
            for t in tensors:
                writer.write_tensor_data(t.make())
                done()
        writer.close()
        os.replace(beside, out)
    finally:
        writer.close()
        beside.unlink(missing_ok=True)


def _architecture(config: DecoderConfig, patched: bool) -> str:
    """The stock graph that is this network.

    Raises:
      BitnetError: with the nearest network that has one.
    """
    if config.activation == "relu2" and not (patched and config.sub_norms):
        raise BitnetError(
            "squared ReLU: stock llama.cpp has no graph with it and would compute SiLU; train with "
            "activation='silu', or export to hf or onnx"
            + (" (patched=True writes it for a llama.cpp that has it)" if config.sub_norms else "")
        )
    if config.sub_norms:
        wrong = {
            "a head of its own": not config.tied,
            "biases": config.qkv_bias,
            "query and key norms": config.qk_norm,
            "scaled positions": bool(config.rope_scaling),
            "another head size": config.head_dim * config.heads != config.width,
        }
        for what, there in wrong.items():
            if there:
                raise BitnetError(
                    f"sub-norms with {what}: llama.cpp's bitnet has none; export to hf or onnx, or "
                    "train without it"
                )
        return "bitnet"
    if config.qk_norm and config.qkv_bias:
        raise BitnetError("query and key norms with biases: llama.cpp has no such graph")
    arch = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if config.rope_scaling and arch != "llama":
        raise BitnetError(f"scaled positions: llama.cpp's {arch} has none; export to hf or onnx")
    return arch


def _metadata(config: DecoderConfig, arch: str, patched: bool) -> dict[str, Any]:
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_base),
    }
    if config.sub_norms:
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
        own |= {"hidden_activation": config.activation}
    return {f"{arch}.{name}": value for name, value in own.items()}


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list | np.ndarray):
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


def _form(tensors: Sequence[Tensor], arch: str) -> str:
    """One line: the architecture, and how many matrices have which type."""
    kinds = collections.Counter(t.kind for t in tensors if len(t.shape) == 2)
    return f"{arch}, matrices " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def _notes(tensors: Sequence[Tensor], types: Sequence[str]) -> Iterator[str]:
    """Why a matrix is larger than it could be, and what is not as it was."""
    for kind in dict.fromkeys(t.kind for t in tensors if t.ternary):
        if kind == types[0]:
            continue
        same = [t for t in tensors if t.ternary and t.kind == kind]
        block, width = (1, FLOATS[kind].itemsize) if kind in FLOATS else size(kind)
        yield (
            f"{len(same)} ternary matrices are {kind}, {8 * width / block:g} bits a weight: "
            f"{same[0].name} of {same[0].shape[1]} inputs does not fit blocks of "
            f"{size(types[0])[0]} under one scale each"
        )
        if kind == "Q4_0" and "Q2_0" not in types and same[0].shape[1] % 64 == 0:
            yield "types=('TQ2_0', 'Q2_0', 'Q4_0') takes 2.25 bits instead, for llama.cpp of 2026"
    moved = [t for t in tensors if t.moved]
    scales = [t for t in moved if t.ternary or t.leaf]
    for what, some in (("scales", scales), ("weights", [t for t in moved if t not in scales])):
        if some:
            yield (
                f"{what} of {len(some)} matrices rounded to float16 or bfloat16, by at most "
                f"{max(t.moved for t in some):.1e} of their size"
            )
    if scales:
        yield (
            "where a whole matrix has one scale, scale_tensors=True keeps it exact, for llama.cpp "
            "of 2026"
        )
    if any(t.ternary for t in tensors):
        yield (
            "llama.cpp rounds activations to 8 bits in blocks of 32 or 256, ours a token at a "
            "time: logits differ by that rounding"
        )
