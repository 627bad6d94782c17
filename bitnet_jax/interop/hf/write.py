"""A model folder of ours to a folder that transformers loads and runs."""

import collections
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from ...checkpoint import size_on_disk
from ...errors import BitnetError
from ...leaf import Packed, PackedTernary, Quantized, Ternary, is_quantized
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...packed import pack_weight, unpack_weight
from ...progress import counter
from ...quantize import Scheme, dequantize, matrix_values, quantize_weights
from ..export import ExportReport
from .config import CONFIG, Form, render
from .layout import bytes_to_hf, exact_ternary
from .names import Slot, slots
from .read import GROUP
from .text import special_ids, write_tokenizer

_SHARD_BYTES = 2 * 2**30
_ABSMEAN = Scheme("absmean", "tensor")


def save(
    model: ModelFolder,
    out: str | Path,
    *,
    latent: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    console: Console | None = None,
) -> ExportReport:
    """Write a folder that stock transformers loads and runs, all or nothing.

    | of the model                          | is written as                                     |
    |---------------------------------------|---------------------------------------------------|
    | float (``scheme`` None)               | float                                             |
    | ternary, one scale a matrix           | ``autobitlinear``: 2 bits a code, and the scale   |
    | ternary, finer scales; int8, int4     | ``autobitlinear``, unpacked: codes times scale    |
    | latent weights                        | quantised by the model's scheme, then as above    |
    | any ternary one, with ``latent``      | ``autobitlinear`` online, trained on there        |

    All forms round activations to int8 as we do. Matrices are never quantised twice: where latent
    weights are codes times scale already, codes and scale are read out of them, because absmean
    would shrink the scale by the share of zeros.

    Args:
      model: a decoder of ours, float, latent or packed.
      out: a new folder.
      latent: write latent weights. Those of a packed model are made of its codes, density d of
        which are not 0: w = codes * scale / d, whose absmean is the scale and whose codes are the
        codes.
      dtype: of everything that is not packed; transformers computes in what it finds. None takes
        bfloat16 if it holds every value exactly, else float32.
      shard_bytes: start another file after so many bytes.
      console: where to draw a progress bar; None for silence.

    Returns:
      What was written, and why it is larger than it could be.

    Raises:
      BitnetError: if the network is no decoder or has no class in transformers, ``latent`` is asked
        of a scheme that is not transformers' own, or the folder exists or cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        raise BitnetError(f"{out}: exists already; give another folder with --out or remove it")
    if not isinstance(model.config, DecoderConfig):
        raise BitnetError("only a decoder of ours has a place in transformers, not this network")
    writer = _Writer(model, latent, dtype)
    ids = special_ids(model.files, model.tokenizer)
    room = out.with_name(f".{out.name}.saving-{os.getpid()}")
    try:
        room.mkdir(parents=True)
        write_shards(room, writer, shard_bytes, console)
        config = render(model.config, writer.form, ids) | {"dtype": writer.dtype}
        if writer.group:
            config["quantization_config"][GROUP] = writer.group
        (room / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(room, model.tokenizer, model.files, model.config.max_length)
        room.rename(out)
    except OSError as e:
        raise BitnetError(f"{out}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return ExportReport("hf", out, size_on_disk(out), *writer.told())


def write_shards(room: Path, writer: "_Writer", limit: int, console: Console | None) -> None:
    """Tensor after tensor into files of at most ``limit`` bytes, unless one alone is larger."""
    files: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush():
        save_file(held, room / f"part-{len(files)}", {"format": "pt"})
        files.append({name: x.nbytes for name, x in held.items()})
        held.clear()

    with counter(console, "write", len(writer.slots)) as done:
        for slot in writer.slots:
            for name, x in writer.stored(slot).items():
                if held and sum(y.nbytes for y in held.values()) + x.nbytes > limit:
                    flush()
                held[name] = np.ascontiguousarray(x)
            done()
        flush()
    if len(files) == 1:
        (room / "part-0").rename(room / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (room / f"part-{i}").rename(room / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(names.values()) for names in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (room / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _Writer:
    """The tensors of one model in the form that suits it, and what there is to say about it."""

    def __init__(self, model: ModelFolder, latent: bool, dtype: str | None):
        assert isinstance(model.config, DecoderConfig)
        self.model, self.latent = model, latent
        self.slots = list(slots(model.config))
        self.counts: collections.Counter[str] = collections.Counter()
        kernels = {s.module: self._leaf(s) for s in self.slots if s.kind == "projection"}
        float_ = [m for m, x in kernels.items() if model.scheme is None and not is_quantized(x)]
        if len(float_) == len(kernels):
            self.form = Form()
        else:
            # A list of names replaces transformers' own, in which the head is.
            kept = (*float_, "lm_head") if float_ else ()
            self.form = Form("online" if latent else "offline", kept=kept)
        if latent:
            self._check_latent(kernels, bool(float_))
        groups = {x.group for x in kernels.values() if is_quantized(x) and x.group}
        if isinstance(getattr(model.scheme, "scale", None), int):
            groups.add(model.scheme.scale)
        self.group = groups.pop() if len(groups) == 1 and self.form.kind == "offline" else 0
        self.dtype = dtype or ("bfloat16" if self._all_exact() else "float32")
        self.counts.clear()

    def _all_exact(self) -> bool:
        """Whether bfloat16 holds all that is not packed; stops at the first value it does not."""
        each = (x for slot in self.slots for x in self.tensors(slot).values())
        return all(x.dtype == np.uint8 or _exact(x) for x in each)

    def stored(self, slot: Slot) -> dict[str, np.ndarray]:
        """The tensors of a slot in the folder's dtype."""
        found = self.tensors(slot)
        for name, x in found.items():
            if x.dtype != np.uint8:
                self.counts["rounded"] += self.dtype == "bfloat16" and not _exact(x)
                found[name] = x.astype(jnp.dtype(self.dtype))
        return found

    def _check_latent(self, kernels: dict, mixed: bool) -> None:
        if self.form.kind == "float":
            raise BitnetError("the model is float: there are no latent weights to export")
        finer = [m for m, x in kernels.items() if is_quantized(x) and not _one_scale(x)]
        scheme = self.model.scheme
        if any(not is_quantized(x) for x in kernels.values()) and scheme != _ABSMEAN:
            finer = [str(scheme)]
        if finer or mixed:
            raise BitnetError(
                "transformers trains with absmean codes and one scale a matrix in every layer, "
                f"this model has others ({(finer or ['float layers'])[0]}); export without latent"
            )

    def _leaf(self, slot: Slot, name: str | None = None) -> Any:
        node = self.model.params["params"]
        for key in slot.path:
            node = node[key]
        return node[name or slot.leaf]

    def tensors(self, slot: Slot) -> dict[str, np.ndarray]:
        """What transformers' module of a slot holds, by full name."""
        weight, bias = self._leaf(slot), None
        if slot.bias:
            bias = np.asarray(self._leaf(slot, "bias"))
        stays = slot.kind != "projection" or self.form.keeps(slot.module)
        if stays or self.form.kind == "float":
            found = {"weight": self._float(slot, weight)}
        elif self.latent:
            found = {"weight": self._latent(weight)}
        else:
            found = self._offline(weight, slot.shape[0])
        if bias is not None:
            scale = found.get("weight_scale", np.ones(1, np.float32))[0]
            # AutoBitLinear multiplies the bias by the scale too.
            found["bias"] = bias if scale == 1 or not scale else bias.astype(np.float32) / scale
        if slot.kind == "projection" and slot.module.endswith("o_proj") and self._needs_out_bias():
            found["bias"] = np.zeros(slot.shape[0], np.float32)
        return {f"{slot.module}.{name}": x for name, x in found.items()}

    def _needs_out_bias(self) -> bool:
        """The classes whose attention_bias means all four projections, the output's too."""
        c = self.model.config
        return c.qkv_bias and (c.sub_norms or c.qk_norm)  # pyright: ignore

    def _float(self, slot: Slot, x: Any) -> np.ndarray:
        if is_quantized(x):
            if slot.kind == "head":
                self.counts["quantised head"] += 1
            x = dequantize(_unpacked(x))
        x = np.asarray(x, np.float32)
        return x.T if slot.leaf == "kernel" else x

    def _latent(self, x: Any) -> np.ndarray:
        if not is_quantized(x):
            found = exact_ternary(np.asarray(x, np.float32))
            if found is None or found[1].size > 1 or not (found[0] == 0).any():
                return np.asarray(x, np.float32).T
            self.counts["ternary already"] += 1
            codes, scale = found[0], float(found[1][0, 0])
        else:
            weight = _unpacked(x)
            codes, scale = np.asarray(weight.codes), float(np.asarray(weight.scale).flat[0])
            self.counts["made latent"] += 1
        density = max(float(np.abs(codes).mean(dtype=np.float64)), 1e-30)
        return (codes.T * np.float32(scale / density)).astype(np.float32)

    def _offline(self, x: Any, outputs: int) -> dict[str, np.ndarray]:
        """Packed if it has one scale and fits; else values, or codes, unpacked."""
        if not is_quantized(x):
            x = self._quantised(jnp.asarray(x, jnp.float32))
        if isinstance(_unpacked_kind(x), type) and not issubclass(_unpacked_kind(x), Ternary):
            self.counts["integers"] += 1
            return {"weight": self._values(x), "weight_scale": np.ones(1, np.float32)}
        if not _one_scale(x):
            self.counts["finer"] += 1
            return {"weight": self._values(x), "weight_scale": np.ones(1, np.float32)}
        scale = np.asarray(x.scale, np.float32).reshape(-1)[:1]
        if outputs % 4:
            self.counts["not by four"] += 1
            codes = np.asarray(_unpacked(x).codes, np.float32).T
            return {"weight": codes, "weight_scale": scale}
        self.counts["packed"] += 1
        packed = x if isinstance(x, PackedTernary) else pack_weight(_plain(_unpacked(x)))
        return {
            "weight": bytes_to_hf(np.asarray(packed.codes), packed.in_features),
            "weight_scale": scale,
        }

    def _values(self, x: Any) -> np.ndarray:
        return np.asarray(matrix_values(_unpacked(x))).T

    def _quantised(self, latent: jax.Array) -> Quantized:
        scheme = self.model.scheme or _ABSMEAN
        group = scheme.scale if isinstance(scheme.scale, int) else 0
        found = exact_ternary(np.asarray(latent), group)
        if found is not None and (found[0] == 0).any():
            self.counts["ternary already"] += 1
            codes, scale = found
            per_group = group if scale.shape[0] > 1 else 0
            return Ternary(jnp.asarray(codes), jnp.asarray(scale), per_group)
        self.counts["quantised"] += 1
        return quantize_weights(latent, scheme)

    def told(self) -> tuple[str, tuple[str, ...]]:
        """The form in one line, and the notes."""
        n, total = self.counts, sum(s.kind == "projection" for s in self.slots)
        if self.form.kind == "float":
            return f"float weights in {self.dtype}, a plain transformers model", ()
        if self.latent:
            form = f"autobitlinear online: {total} latent matrices, quantised at every call"
        else:
            form = f"autobitlinear offline: {n['packed']} of {total} matrices packed at 2 bits"
        notes = []
        for key, text in _NOTES.items():
            if n[key]:
                notes.append(f"{n[key]} {text.format(dtype=self.dtype, times=self._times())}")
        if self.dtype == "bfloat16":
            told = "all values exactly" if not n["rounded"] else f"{n['rounded']} tensors rounded"
            notes.append(f"{told}, in bfloat16, which transformers then computes in too")
        else:
            notes.append(
                "what is not packed is in float32, which holds it exactly and which transformers "
                "then computes in, as we do; --dtype bfloat16 halves that and rounds"
            )
        return form, tuple(notes)

    def _times(self) -> int:
        return 8 if self.dtype == "bfloat16" else 16


_NOTES = {
    "finer": (
        "matrices have more than one scale, which transformers cannot pack: they stand as codes "
        "times scale in {dtype}, {times} times larger; `bitnet-jax compress --scheme absmean "
        "--scale tensor` trains a model that packs"
    ),
    "integers": "matrices are int8 or int4, which its packed form cannot hold: they stand unpacked",
    "not by four": "matrices have outputs that are no multiple of 4: their codes stand unpacked",
    "quantised": "latent matrices were quantised by the model's scheme; --latent exports them",
    "ternary already": (
        "latent matrices were codes times scale already, and were taken as such: quantising them "
        "again would shrink their scale"
    ),
    "made latent": (
        "latent matrices were made of codes: quantised they are the same codes and scale; the "
        "latent weights of the training are a better start, if they are still there"
    ),
    "quantised head": "head of codes: transformers computes it in float, we with int8 inputs",
}


def _exact(x: np.ndarray) -> bool:
    """Whether bfloat16 holds every value."""
    return np.array_equal(x.astype(jnp.bfloat16).astype(np.float32), x)


def _unpacked(x: Any) -> Quantized:
    return unpack_weight(x) if isinstance(x, Packed) else x


def _unpacked_kind(x: Any) -> type:
    return x.unpacked if isinstance(x, Packed) else type(x)


def _plain(x: Quantized) -> Ternary:
    """A ternary weight of any kind as codes without groups."""
    return Ternary(x.codes, x.scale)


def _one_scale(x: Any) -> bool:
    """Whether all of a matrix is multiplied by the same number."""
    scale = np.asarray(x.scale)
    return issubclass(_unpacked_kind(x), Ternary) and bool((scale == scale.flat[0]).all())
