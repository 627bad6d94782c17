"""A decoder of ours to an ONNX graph."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from ...checkpoint import size_on_disk
from ...errors import BitnetError
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ..export import ExportReport
from ..hf.text import special_ids, write_tokenizer
from .genai import FILE as GENAI
from .genai import genai_config
from .graph import onnx
from .network import Network

Form = Literal["2bit", "4bit", "int8", "qdq"]
FORMS: tuple[str, ...] = get_args(Form)
FILE, KEY, VERSION = "model.onnx", "bitnet_jax", 1
# Protobuf's limit is 2 GiB for the whole file; nodes and names take the rest.
_LARGEST = 2**31 - 2**26
_SAID = {
    "2bit": "MatMulNBits, ternary codes at 2 bits",
    "4bit": "MatMulNBits, ternary codes at 4 bits",
    "int8": "MatMulInteger, a byte a code",
    "qdq": "QuantizeLinear and DequantizeLinear in pairs, a byte a code",
}


def save(
    model: ModelFolder,
    out: str | os.PathLike,
    form: Form = "2bit",
    *,
    cache: bool = False,
    external_above: int = _LARGEST,
    console: Console | None = None,
) -> ExportReport:
    """Write a folder with ``model.onnx`` and its tokenizer, all or nothing.

    The graph takes ``input_ids`` int64 (batch, length) to ``logits`` float32 (batch, length,
    vocab_size), batch and length free, and computes what the model computes: activations rounded to
    int8 token by token, times codes, scales after the sum.

    With ``cache`` it also takes ``attention_mask`` int64 (batch, total), 0 for tokens that are not
    there, and each layer's ``past_key_values.{i}.key`` and ``.value`` float32 (batch, kv_heads,
    past, head_dim), total = past + length; and gives them back with the new ones as
    ``present.{i}.key`` and ``.value``. Those are the names that others use, and with the
    ``genai_config.json`` that is written then onnxruntime-genai generates from the folder. A
    token's position is the number of 1s before it: texts of a batch are filled up on the left.

    | form | a ternary matrix is                   | runs in                                     |
    |------|---------------------------------------|---------------------------------------------|
    | 2bit | MatMulNBits, 2 bits a code            | onnxruntime (tested: 1.32)                  |
    | 4bit | MatMulNBits, 4 bits a code            | older onnxruntimes and other readers too    |
    | int8 | MatMulInteger, a byte a code          | whatever knows opset 21                     |
    | qdq  | QuantizeLinear/DequantizeLinear pairs | the same; meant for TensorRT, untried there |

    With one scale a matrix or an output, sums are exact integers in every form; the two of
    MatMulNBits hold 1 code of 0 more for every 31 to 127 to make them so, see
    `bitnet_jax.interop.onnx.blocks.exact_blocks`. With a scale a group they sum in float32 instead,
    for which onnxruntime unpacks a 2-bit matrix at every run: 4bit is faster there. int8 matrices
    go at 8 bits and int4 ones at 4 (8 in int8 and qdq), tables as they are (ternary ones at 4
    bits), all else in the model's floats.

    Args:
      model: a `Decoder`, float, latent (made ternary by its scheme, as when it runs) or packed.
      out: a new folder.
      form: the table above; a float model is the same in all of them.
      cache: whether keys and values of earlier tokens go in and out.
      external_above: bytes of weights from which on they go to a file beside the graph, because
        ONNX's format ends at 2 GB.
      console: where to draw a progress bar; None for silence.

    Returns:
      `ExportReport`.

    Raises:
      BitnetError: if the network is no decoder, a form cannot hold a matrix, or the folder exists
        or cannot be written.
    """
    out = Path(os.path.abspath(out))
    if form not in FORMS:
        raise BitnetError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if out.exists():
        raise BitnetError(f"{out}: exists already; give another folder with --out or remove it")
    if not isinstance(model.config, DecoderConfig):
        raise BitnetError(
            f"ONNX: only a decoder of ours can be exported, float or ternary; this is a "
            f"{type(model.config).__name__.removesuffix('Config')} network"
        )
    network = Network(model.config, model.scheme, model.params["params"], form, cache)
    network.build(console)
    about = {
        "version": VERSION,
        "form": form,
        "config": dataclasses.asdict(model.config),
        "leaves": network.leaves,
    }
    graph = network.graph.model(network.inputs, network.outputs, {KEY: json.dumps(about)})
    room = out.with_name(f".{out.name}.saving-{os.getpid()}")
    try:
        room.mkdir(parents=True)
        _write(graph, room / FILE, external=network.graph.nbytes > external_above)
        write_tokenizer(room, model.tokenizer, model.files, model.config.max_length)
        if cache:
            ids = special_ids(model.files, model.tokenizer)
            told = genai_config(model.config, FILE, ids)
            (room / GENAI).write_text(json.dumps(told, indent=2) + "\n")
        room.rename(out)
    except OSError as e:
        raise BitnetError(f"{out}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return ExportReport("onnx", out, size_on_disk(out), *_told(network))


def _write(graph: Any, path: Path, external: bool) -> None:
    if external:
        onnx.save_model(
            graph, path, save_as_external_data=True, location=f"{FILE}.data", size_threshold=1024
        )
    else:
        onnx.save_model(graph, path)
    onnx.checker.check_model(str(path), full_check=True)


def _told(network: Network) -> tuple[str, tuple[str, ...]]:
    """The form in one line, and what differs from our own model."""
    notes, form, dtype = [], network.form, network.config.dtype
    matrices = [x for path, x in network.leaves.items() if path.endswith("/kernel")]
    if dtype != "float32":
        notes.append(f"activations in float32; our own model computes in {dtype}")
    if any(x["group"] and x["blocks"] and x["blocks"]["bits"] == 2 for x in matrices):
        notes.append(
            "a scale a group: onnxruntime unpacks these matrices at every run; 4bit is faster"
        )
    if form == "qdq" and any(x["kind"] == "Int8" for x in matrices):
        notes.append("int8 matrices are multiplied in float32, because pairs overflow on CPUs")
    return _SAID[form] if matrices else "float", tuple(notes)
