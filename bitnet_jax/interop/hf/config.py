"""config.json to the shape of our decoder and the form of its weights, and back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ...errors import BitnetError
from ...models.decoder import DecoderConfig

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a model_type means where config.json does not say it: its class's own defaults."""

    architecture: str
    activation: str = "silu"
    eps: float = 1e-6
    base: float = 10_000.0
    length: int = 32_768
    qkv_bias: bool = False
    qk_norm: bool = False
    sub_norms: bool = False


FAMILIES = {
    "llama": _Family("LlamaForCausalLM", length=2048),
    "mistral": _Family("MistralForCausalLM"),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", qk_norm=True),
    "bitnet": _Family("BitNetForCausalLM", "relu2", 1e-5, 500_000.0, 2048, sub_norms=True),
}
_ACTIVATIONS: dict[str, Literal["silu", "relu2"]] = {
    "silu": "silu", "swish": "silu", "relu2": "relu2",
}  # fmt: skip
# What our own export adds to quantization_config, for `load` alone.
_GROUP = "scale_group"


@dataclasses.dataclass(frozen=True)
class Form:
    """How the matrices of the layers are stored.

    Attributes:
      kind: ``"float"``; ``"online"``, latent weights that are quantised at every call; or
        ``"offline"``, codes and a scale.
      reciprocal: the scale is stored as 1 / scale (``bitlinear``) instead of as itself
        (``autobitlinear``).
      kept: names of modules, or ends of such names, that stay float.
      old: the sub-norms have the names of the 1bitLLM models.
      group: inputs of an output that share a scale, in unpacked codes times scale; 0 for all.
    """

    kind: Literal["float", "online", "offline"] = "float"
    reciprocal: bool = False
    kept: tuple[str, ...] = ()
    old: bool = False
    group: int = 0

    def keeps(self, module: str) -> bool:
        """Whether a module is one of those that stay float, matched as transformers does."""
        return any(
            module == k or module.startswith(f"{k}.") or module.endswith(k) for k in self.kept
        )


def is_config(data: Any) -> bool:
    """Whether JSON is the config of a transformers model, of whatever family."""
    return isinstance(data, dict) and isinstance(data.get("model_type"), str)


def parse(data: Any, source: Path) -> tuple[DecoderConfig, Form]:
    """The decoder a config describes, and how its weights are stored.

    Args:
      data: what is in config.json.
      source: what to call it in messages.

    Raises:
      BitnetError: naming what the config asks for and our decoder has not.

    >>> config, form = parse({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
    ...     "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}, Path("x"))
    >>> config.head_dim, config.kv_heads, config.norm_eps, form.kind
    (2, 2, 1e-06, 'float')
    """
    refuse: Refuse = lambda what: BitnetError(f"{source}: {what}")
    if not is_config(data):
        raise refuse("is no config of a transformers model (it has no model_type)")
    family = FAMILIES.get(data["model_type"])
    if family is None:
        raise refuse(f"model_type {data['model_type']!r} is not read; known: {', '.join(FAMILIES)}")
    form = _form(data, refuse)
    sub_norms = family.sub_norms or form.old
    activation = _ACTIVATIONS.get(data.get("hidden_act", family.activation))
    if activation is None:
        raise refuse(
            f"hidden_act {data['hidden_act']!r} is not read; known: {', '.join(_ACTIVATIONS)}"
        )
    count = lambda name, default=None: _count(data, name, default, refuse)
    number = lambda name, default: _number(data, name, default, refuse)
    heads, length = count("num_attention_heads"), count("max_position_embeddings", family.length)
    _refuse_what_we_lack(data, length, refuse)
    base, scaling = _rope(data, family.base, length, refuse)
    try:
        config = DecoderConfig(
            vocab_size=count("vocab_size"),
            width=count("hidden_size"),
            layers=count("num_hidden_layers"),
            heads=heads,
            kv_heads=count("num_key_value_heads", heads),
            hidden=count("intermediate_size"),
            max_length=length,
            rope_base=base,
            norm_eps=number("rms_norm_eps", family.eps),
            activation=activation,
            sub_norms=sub_norms,
            tied=bool(data.get("tie_word_embeddings", False)),
            head_size=count("head_dim", 0 if data["model_type"] != "qwen3" else 128),
            qkv_bias=family.qkv_bias or bool(data.get("attention_bias", False)),
            qk_norm=family.qk_norm,
            rope_scaling=scaling,
        )
    except ValueError as e:
        raise e if isinstance(e, BitnetError) else BitnetError(f"{source}: {e}") from e
    # The usual case says nothing, so that it equals a config of our own.
    if config.head_size * config.heads == config.width:
        config = dataclasses.replace(config, head_size=0)
    return config, form


Refuse = Callable[[str], BitnetError]


def _count(data: dict, name: str, default: int | None, refuse: Refuse) -> int:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise refuse(f"has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default != 0 else 0):
        raise refuse(f"{name} {value!r} is no number of things")
    return int(value)


def _number(data: dict, name: str, default: float, refuse: Refuse) -> float:
    value = data.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise refuse(f"{name} {value!r} is no number above 0")
    return float(value)


def _refuse_what_we_lack(data: dict, length: int, refuse: Refuse) -> None:
    if data.get("mlp_bias"):
        raise refuse("mlp_bias: biases in the MLP are not supported")
    kinds = data.get("layer_types") or []
    if other := [k for k in kinds if k != "full_attention"]:
        raise refuse(f"layer_types: {other[0]!r} is not supported, only full attention")
    window = data.get("sliding_window")
    windowed = data["model_type"] == "mistral" or data.get("use_sliding_window")
    if windowed and window is not None and not (isinstance(window, int) and window >= length):
        raise refuse(f"sliding_window {window!r} is not supported, only attention to all before")
    for name in ("num_experts", "num_local_experts"):
        if data.get(name):
            raise refuse(f"{name} {data[name]!r}: mixtures of experts are not supported")


def _rope(data: dict, base: float, length: int, refuse: Refuse):
    """Base and scaling of the positions, as transformers 4 and 5 write them."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = data.get(name) or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise refuse(
                f"{name} {given!r} is not supported, only one kind of positions for all layers"
            )
        found |= given
    base = _number({"rope_theta": data.get("rope_theta", base)} | found, "rope_theta", base, refuse)
    if (data | found).get("partial_rotary_factor", 1) not in (1, None):
        raise refuse("partial_rotary_factor: positions in a part of each head are not supported")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return base, ()
    if kind != "llama3":
        raise refuse(f"rope_type {kind!r} is not supported; known: default, llama3")
    get = lambda name: _number(found, name, -1, refuse)
    first = _number(found, "original_max_position_embeddings", length, refuse)
    scaling = (get("factor"), get("low_freq_factor"), get("high_freq_factor"), first)
    if not scaling[1] < scaling[2]:
        raise refuse("rope_scaling: low_freq_factor must be below high_freq_factor")
    return base, scaling


def _form(data: dict, refuse: Refuse) -> Form:
    """How the weights are stored, by quantization_config or by the keys of the 1bitLLM models."""
    quantised = data.get("quantization_config")
    old = "BitnetForCausalLM" in (data.get("architectures") or []) or "weight_bits" in data
    if not quantised:
        if old and (data.get("weight_bits", 1), data.get("input_bits", 8)) != (1, 8):
            raise refuse("weight_bits and input_bits: only 1 (ternary) and 8 are read")
        return Form("online", old=True) if old else Form()
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "bitnet":
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise refuse(
            f"quantization_config: {method!r} is not read, only 'bitnet'; give the float model"
        )
    if quantised.get("use_rms_norm"):
        raise refuse(
            "quantization_config: use_rms_norm, a norm for each projection, is not supported"
        )
    linear, mode = quantised.get("linear_class", "bitlinear"), quantised.get("quantization_mode")
    if linear not in ("bitlinear", "autobitlinear") or mode not in (None, "online", "offline"):
        raise refuse(
            f"quantization_config: linear_class {linear!r}, quantization_mode {mode!r}: unknown"
        )
    kept = _kept(quantised.get("modules_to_not_convert"), refuse)
    online = linear == "autobitlinear" and mode == "online"
    group = quantised.get(_GROUP, 0)
    if not isinstance(group, int) or not 0 <= group < 2**31:
        raise refuse(f"quantization_config: {_GROUP} {group!r} is no number of inputs")
    return Form("online" if online else "offline", linear == "bitlinear", kept, old, group)


def _kept(names: Any, refuse: Refuse) -> tuple[str, ...]:
    """modules_to_not_convert, whose default is the head; a list replaces that."""
    told = "quantization_config: modules_to_not_convert"
    if names is None:
        return ("lm_head",)
    if not isinstance(names, list) or not all(isinstance(k, str) and k for k in names):
        raise refuse(f"{told} is no list of names")
    kept = tuple(k.removesuffix(".weight") for k in names)
    if special := [k for k in kept if not k.replace(".", "").replace("_", "").isalnum()]:
        raise refuse(f"{told} {special[0]!r}: patterns are not read")
    if not Form(kept=kept).keeps("lm_head"):
        raise refuse(f"{told} lacks lm_head: a quantised head is not supported")
    return kept


def render(config: DecoderConfig, form: Form, ids: dict[str, Any]) -> dict[str, Any]:
    """config.json for a decoder of ours, for transformers 4 and 5.

    Args:
      config: its shape.
      form: how its weights will be stored; ``reciprocal`` and ``old`` are not written.
      ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, None for what it has not.

    Raises:
      BitnetError: if no class of transformers has all that the decoder has.
    """
    square = config.heads * config.head_dim == config.width
    if config.sub_norms and (config.qk_norm or not square):
        raise BitnetError(
            "Hugging Face's BitNet has no norms of queries and keys and its heads fill the width: "
            "a model with sub-norms and these has no class there"
        )
    name = (
        "bitnet" if config.sub_norms
        else "qwen3" if config.qk_norm
        else "qwen2" if config.qkv_bias
        else "llama"
    )  # fmt: skip
    written: dict[str, Any] = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        **ids,
    }
    if config.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = dict(zip(names, config.rope_scaling))
        first = int(config.rope_scaling[3])
        scaling |= {"rope_type": "llama3", "original_max_position_embeddings": first}
        written["rope_scaling"] = scaling
    if name in ("qwen2", "qwen3"):
        written |= {"use_sliding_window": False, "sliding_window": None}
    if form.kind != "float":
        written["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": form.kind,
            "modules_to_not_convert": list(form.kept) or None,
        } | ({_GROUP: form.group} if form.group else {})
    return written
