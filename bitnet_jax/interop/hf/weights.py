"""A model's tensors in the form of transformers' that suits them, and what to say of it."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import BitnetError
from ...leaf import Packed, PackedTernary, Quantized, Ternary, is_quantized
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...packed import unpack_weight
from ...quantize import Scheme, quantize_weights
from .config import Form
from .layout import bytes_of, bytes_to_hf, exact_ternary, unpack_fours
from .names import Slot, slots

_ABSMEAN = Scheme("absmean", "tensor")
_quantize = jax.jit(quantize_weights, static_argnums=1)


class Weights:
    """The tensors of one model in the form that suits it, and what there is to say about it."""

    def __init__(self, model: ModelFolder, latent: bool, dtype: str | None):
        assert isinstance(model.config, DecoderConfig)
        self.model, self.config, self.latent = model, model.config, latent
        self.slots = list(slots(model.config))
        self.counts: collections.Counter[str] = collections.Counter()
        kernels = {s.module: self._leaf(s) for s in self.slots if s.kind == "projection"}
        float_ = [m for m, x in kernels.items() if model.scheme is None and not is_quantized(x)]
        if len(float_) == len(kernels):
            self.form = Form()
        else:
            # A list of names replaces transformers' own, in which the head is.
            kept = (*float_, "lm_head") if float_ else ()
            kind = "online" if latent else "offline"
            self.form = Form(kind, kept=kept, group=0 if latent else self._group(kernels))
        if latent:
            self._check_latent(kernels, bool(float_))
        self.dtype = dtype or ("bfloat16" if self._all_exact() else "float32")
        self.counts.clear()

    def _group(self, kernels: dict) -> int:
        """Inputs that share a scale; 0 unless it is the same number everywhere."""
        groups = {x.group for x in kernels.values() if is_quantized(x) and x.group}
        if self.model.scheme is not None and isinstance(self.model.scheme.scale, int):
            groups.add(self.model.scheme.scale)
        return groups.pop() if len(groups) == 1 else 0

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
            found["bias"] = bias.astype(np.float32) / scale
        if slot.kind == "projection" and slot.module.endswith("o_proj") and self._needs_out_bias():
            found["bias"] = np.zeros(slot.shape[0], np.float32)
        return {f"{slot.module}.{name}": x for name, x in found.items()}

    def _needs_out_bias(self) -> bool:
        """The classes whose attention_bias means all four projections, the output's too."""
        return self.config.qkv_bias and (self.config.sub_norms or self.config.qk_norm)

    def _float(self, slot: Slot, x: Any) -> np.ndarray:
        if is_quantized(x):
            if slot.kind == "head":
                self.counts["quantised head"] += 1
            x = _values(x)
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
            codes, scale = _codes(x), float(np.asarray(x.scale).flat[0])
            self.counts["made latent"] += 1
        return latent_of(codes, scale).T

    def _offline(self, x: Any, outputs: int) -> dict[str, np.ndarray]:
        """Packed if it has one scale and fits; else values, or codes, unpacked."""
        if not is_quantized(x):
            x = self._quantised(jnp.asarray(x, jnp.float32))
        if not _one_scale(x):
            self.counts["finer" if _is_ternary(x) else "integers"] += 1
            return {"weight": _values(x).T, "weight_scale": np.ones(1, np.float32)}
        scale = np.asarray(x.scale, np.float32).reshape(-1)[:1]
        if not scale:  # it would multiply the bias too
            values = np.zeros((outputs, x.shape[0]), np.float32)
            return {"weight": values, "weight_scale": np.ones(1, np.float32)}
        if outputs % 4:
            self.counts["not by four"] += 1
            return {"weight": _codes(x).T.astype(np.float32), "weight_scale": scale}
        self.counts["packed"] += 1
        ours = np.asarray(x.codes) if isinstance(x, PackedTernary) else bytes_of(_codes(x))
        return {"weight": bytes_to_hf(ours, x.shape[0]), "weight_scale": scale}

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
        return _quantize(latent, scheme)

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


def latent_of(codes: np.ndarray, scale: float) -> np.ndarray:
    """Latent weights that absmean quantises to these codes and this scale, for a start of training.

    w = code * a where the code is not 0, else s / 1024 with either sign in turn, so that absmean is
    d a + (1 - d) s / 1024 = s,  with d the share of codes that are not 0

    (With zeros instead they could be mistaken for codes times scale already.)

    Args:
      codes: int8 (in, out).
      scale: s.

    Returns:
      float32 (in, out).

    >>> latent_of(np.array([[1, 0], [0, -1]], np.int8), 1.0).tolist()
    [[1.9990234375, 0.0009765625], [-0.0009765625, -1.9990234375]]
    """
    small = scale / 1024
    density = max(float(np.abs(codes).mean(dtype=np.float64)), 1e-30)
    large = (scale - (1 - density) * small) / density
    signs = 1.0 - 2.0 * (np.cumsum(codes == 0).reshape(codes.shape) % 2 == 0)
    return np.where(codes, codes * large, signs * small).astype(np.float32)


def _exact(x: np.ndarray) -> bool:
    """Whether bfloat16 holds every value."""
    return np.array_equal(x.astype(jnp.bfloat16).astype(np.float32), x)


def _codes(x: Any) -> np.ndarray:
    """int8 (in, out), on the host."""
    if isinstance(x, PackedTernary):
        return unpack_fours(np.asarray(x.codes))[: x.in_features].astype(np.int8) - np.int8(1)
    return np.asarray(unpack_weight(x).codes if isinstance(x, Packed) else x.codes)


def _values(x: Any) -> np.ndarray:
    """Codes times scale, float32 (in, out)."""
    scale, size = np.asarray(x.scale, np.float32), x.shape[0]
    return _codes(x) * np.repeat(scale, x.group or max(size, 1), axis=0)[:size]


def _is_ternary(x: Any) -> bool:
    return issubclass(x.unpacked if isinstance(x, Packed) else type(x), Ternary)


def _one_scale(x: Any) -> bool:
    """Whether all of a matrix is multiplied by the same number."""
    scale = np.asarray(x.scale)
    return _is_ternary(x) and bool((scale == scale.flat[0]).all())
