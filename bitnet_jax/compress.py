"""The user's model and text, read for the main job and the commands."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from rich.console import Console

from . import checkpoint, handoff, phase4, shrink
from . import plan as planning
from .convert import keep_what_layers_refuse, path_name
from .errors import BitnetError
from .interop import foreign, phase3
from .interop.torch import from_torch
from .models.decoder import DecoderConfig
from .models.folder import TOKENIZER, ModelFolder, PythonModule, load_model
from .models.phase3 import Phase3Config
from .policy import DEFAULT_RULES, Policy
from .quantize import Scheme
from .train.agreement import agreement
from .train.data import encode, windows
from .train.loss import logits_of
from .train.text import BYTES, byte_tokenizer, read_text


def load_source(
    path: Path,
    module: str | None = None,
    tokenizer: str | None = None,
    console: Console | None = None,
    architecture: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> ModelFolder:
    """A language model from whatever the user has.

    Args:
      path: a model folder of ours; a Hugging Face folder or a .gguf file; a Phase 3 checkpoint; or
        PyTorch weights (safetensors, sharded too, or .pt), or a checkpoint of ours without a
        network, with ``module``.
      module: ``file.py:Name``, the Linen network the weights are for, see `PythonModule`.
      tokenizer: a ``tokenizer.json``, or ``"bytes"``; by default the one beside the weights.
      console: where to say which tensors were used, tied and left over, what was assumed.
      architecture, overrides: what a Phase 3 checkpoint does not tell, see
        `bitnet_jax.interop.phase3.load`.

    Raises:
      BitnetError: if files are missing or damaged, or weights and network do not fit.
    """
    network = None if module is None else PythonModule(module)
    if network is None and foreign.kind_of(path) is not None:
        _only_phase3(path, architecture, overrides)
        own = None if tokenizer is None else _tokenizer(path, tokenizer)
        return foreign.load(path, own, console)
    if network is None and phase3.is_phase3(path):
        return _phase3(path, tokenizer, console, architecture, overrides)
    _only_phase3(path, architecture, overrides)
    if not path.exists():
        raise BitnetError(f"{path}: no such file or folder; give a model folder or PyTorch weights")
    if (path / "manifest.json").is_file():
        if "model" in checkpoint.read_manifest(path)["metadata"]:
            found = load_model(path, network)
            own = found.tokenizer if tokenizer is None else _tokenizer(path, tokenizer)
            return dataclasses.replace(found, tokenizer=own)
        network = _needed(path, network)
        shapes, tree = _shapes(network), checkpoint.load(path).tree
        _check_fit(path, tree, shapes)
        return ModelFolder(network, None, tree, _tokenizer(path, tokenizer))
    network = _needed(path, network)
    shapes = _shapes(network)
    imported = from_torch(path, like=shapes)
    for line in imported.report.lines() if console else []:
        console.print(line, highlight=False)  # pyright: ignore[reportOptionalMemberAccess]
    return ModelFolder(network, None, imported.tree, _tokenizer(path, tokenizer))


def _phase3(
    path: Path,
    tokenizer: str | None,
    console: Console | None,
    architecture: Path | None,
    overrides: Mapping[str, Any],
) -> ModelFolder:
    """A Phase 3 checkpoint; bytes are its tokens where no tokenizer is known."""
    found = phase3.read_phase3(path, architecture, **overrides)
    told = found.lines()
    folder = path if path.is_dir() else path.parent
    if tokenizer is None and not (folder / TOKENIZER).is_file():
        if found.config.vocab_size < BYTES:
            raise BitnetError(
                f"{folder}: no {TOKENIZER} in it, and {found.config.vocab_size} tokens are too "
                "few for bytes; give --tokenizer FILE"
            )
        tokenizer = "bytes"
        told.append(f"no {TOKENIZER} beside it: bytes are its tokens; say otherwise by --tokenizer")
    for line in told if console else []:
        console.print(f"[yellow]{line}[/]", highlight=False)  # pyright: ignore
    return ModelFolder(found.config, None, found.variables, _tokenizer(path, tokenizer))


def _only_phase3(path: Path, architecture: Path | None, overrides: Mapping[str, Any]) -> None:
    if architecture or overrides:
        raise BitnetError(f"{path}: is no Phase 3 checkpoint; leave out --architecture and --set")


def _needed(path: Path, network: PythonModule | None) -> PythonModule:
    if network is None:
        raise BitnetError(
            f"{path}: holds weights, but not which network they are for; give --module FILE.py:NAME"
            " (a flax.linen module from tokens to logits)"
        )
    return network


def _shapes(network: PythonModule):
    """The network's variables as shapes, without computing them."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    try:
        return jax.eval_shape(network.build(None).init, jax.random.key(0), tokens)
    except BitnetError:
        raise
    except Exception as e:
        first = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise BitnetError(
            f"--module {network.source}: does not run on tokens of shape (1, 8): {first}"
        ) from e


def _check_fit(path: Path, tree: Any, shapes: Any) -> None:
    """Raise `BitnetError` naming the first leaf that the network has and the weights have not."""
    given, wanted = (
        {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, shapes)
    )
    for name, shape in sorted(wanted.items()):
        if given.get(name) != shape:
            found = f"has shape {given[name]}" if name in given else "is missing"
            raise BitnetError(f"{path}: {name} {found}, the network needs {shape}")


def _tokenizer(path: Path, given: str | None) -> tokenizers.Tokenizer:
    if given == "bytes":
        return byte_tokenizer()
    folder = path if path.is_dir() else path.parent
    file = Path(given) if given else folder / TOKENIZER
    if not file.is_file():
        where = f"--tokenizer {given}: no such file" if given else f"{folder}: no {TOKENIZER} in it"
        raise BitnetError(f"{where}; give --tokenizer FILE, or 'bytes' if its tokens are bytes")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:
        raise BitnetError(f"{file}: is no tokenizer of the tokenizers library") from e


def computed_in(source: ModelFolder, dtype: str) -> ModelFolder:
    """The same model with its activations in another dtype.

    Raises:
      BitnetError: for a network of the user's, which has its own way to say that.
    """
    if not isinstance(source.config, DecoderConfig):
        if dtype != "float32":
            told = getattr(source.config, "source", "a Phase 3 network is computed in float32")
            raise BitnetError(f"--dtype {dtype}: not for this network ({told})")
        return source
    config = dataclasses.replace(source.config, dtype=dtype)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(source, config=config)


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of tokens to train and to measure on, and where they are from."""

    train: np.ndarray
    held_out: np.ndarray
    name: str
    prompt: str


def load_text(path: Path, source: ModelFolder, length: int, most_held_out: int = 400) -> Text:
    """The user's text as windows of the model's tokens.

    Args:
      path: as `bitnet_jax.train.text.read_text`.
      source: whose tokenizer and vocabulary to use.
      length: tokens a window, at most as many as a Phase 3 network has positions.
      most_held_out: measure on no more windows than this, spread over the held-out text.

    Raises:
      BitnetError: if there is too little text, or it has tokens the model does not know.
    """
    corpus, length = read_text(path), min(length, getattr(source.config, "max_seq_len", length))
    parts = ((corpus.train, "to train on"), (corpus.held_out, "held out"))
    tokens = [encode(source.tokenizer, documents) for documents, _ in parts]
    for x in tokens:
        check_tokens(path, source, x)
    train, held_out = (
        windows(x, length, f"{path}, text {what}") for x, (_, what) in zip(tokens, parts)
    )
    held_out = held_out[:: max(len(held_out) // most_held_out, 1)][:most_held_out]
    return Text(train, held_out, corpus.name, source.tokenizer.decode(held_out[0][:16].tolist()))


def check_tokens(path: Path, source: ModelFolder, tokens: np.ndarray) -> None:
    """Raise `BitnetError` if there are tokens the model has no logit for."""
    shape = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    logits = jax.eval_shape(lambda p, x: logits_of(source.model.apply(p, x)), source.params, shape)
    largest, known = int(tokens.max(initial=0)), logits.shape[-1]
    if largest >= known:
        raise BitnetError(
            f"{path}: tokens go up to {largest}, but the model knows {known}; "
            "give the tokenizer that belongs to the model with --tokenizer"
        )


def room(source: ModelFolder, prompt: int, wanted: int) -> int:
    """How many tokens can follow a prompt of so many: what is wanted, or what the model has left.

    Raises:
      BitnetError: if there is no prompt or no room.
    """
    if not prompt:
        raise BitnetError("--prompt: is empty; give some text to continue")
    longest = getattr(source.config, "max_length", prompt + wanted)
    if prompt >= longest:
        raise BitnetError(f"--prompt: {prompt} tokens, but the model has room for {longest}")
    return min(wanted, longest - prompt)


def defaults(source: ModelFolder) -> dict[str, Any]:
    """What is another default of `bitnet_jax.phase4.Settings` for this family; {} for most.

    A Phase 3 network is to agree with the float model as it came, so that one is the teacher, and
    training starts from what the conversion by data reached rather than from the float weights.
    """
    if not isinstance(source.config, Phase3Config):
        return {}
    return {"teacher": "source", "compare": False, "keep": 0.0, "learning_rate": 5e-4}


def parse_fields(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of a Phase 3 network from ``name=value``.

    >>> parse_fields(["n_heads=5", "step_weights=0.5,1", "tied=false"])
    {'n_heads': 5, 'step_weights': [0.5, 1], 'tied': False}

    Raises:
      BitnetError: for what is no pair, or a value that is no number.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            several = "," in value
            found[name] = json.loads(f"[{value}]" if several else value.lower())
        except ValueError:
            equals = ""
        if not equals:
            raise BitnetError(f"--set {pair}: expected NAME=VALUE, as in n_heads=5")
    return found


def load_weights(
    path: Path,
    module: str | None = None,
    tokenizer: str | None = None,
    console: Console | None = None,
    architecture: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Weights to be packed without running them: a model folder, or the variables alone.

    The variables alone are numpy arrays in the file's dtypes, which stay in a safetensors file
    until they are touched, so that the model may be larger than memory.

    Arguments as of `load_source`; weights of no network we know are laid out by their names and
    shapes.

    Raises:
      BitnetError: if files are missing or damaged.
    """
    ours = (path / "manifest.json").is_file()
    known = ours or foreign.kind_of(path) is not None or phase3.is_phase3(path)
    if module is not None or known:
        return load_source(path, module, tokenizer, console, architecture, overrides)
    _only_phase3(path, architecture, overrides)
    imported = from_torch(path, mapped=True)
    for line in imported.report.lines() if console else []:
        console.print(line, highlight=False)  # pyright: ignore[reportOptionalMemberAccess]
    return imported.tree


# What Orbax's metadata and our manifest take for each array (780 to 860 measured), and besides.
_ARRAY_BYTES, _FOLDER_BYTES = 1000, 2000


def plan_for(
    source: Any,
    scheme: Scheme,
    policy: Policy,
    target_ratio: float,
    damage: Callable[[str, str], float] | None = None,
    console: Console | None = None,
) -> Policy:
    """Plan a model's formats for a size on disk, and show the plan.

    Args:
      source: a model folder, or the variables of any network.
      scheme: of ternary matrices.
      policy: of which only ``inputs`` count, and what a Phase 3 network keeps.
      target_ratio: float32 bytes over bytes of the packed folder.
      damage: see `bitnet_jax.plan.plan`.
      console: where to show it.

    Raises:
      BitnetError: if it cannot be reached.
    """
    folder = isinstance(source, ModelFolder)
    params, overhead, formats = source, _FOLDER_BYTES, planning.FORMATS
    fixed = policy.rules[:0]
    if folder:
        # Layers would make a float16 kernel ternary as they make latent weights: 8 bits at most.
        params, formats = source.params, ("ternary", "int4", "int8")
        overhead += len(source.tokenizer.to_str().encode())
        overhead += sum(len(data) for data in source.files.values())
        fixed = _PHASE3_RULES if isinstance(source.config, Phase3Config) else ()
    leaves = jax.tree.leaves(params)
    overhead += _ARRAY_BYTES * (len(leaves) + sum(x.ndim > 1 for x in leaves))
    found = planning.plan(
        params, target_ratio, scheme,
        fixed=fixed, inputs=policy.inputs, formats=formats, overhead=overhead, damage=damage,
    )  # fmt: skip
    if console is not None:
        console.print(planning.table(found))
    return found.policy


def planned(
    source: ModelFolder,
    text: Text,
    settings: phase4.Settings,
    target_ratio: float,
    console: Console | None = None,
) -> phase4.Settings:
    """The settings with a planned policy; its damage is measured on some of the text.

    damage(component, format) = mean KL(float || the float model with that component rounded)
    """
    model, tokens = source.config.build(None), text.train[:_PLAN_WINDOWS]
    names = jax.tree_util.tree_map_with_path(lambda p, _: path_name(p), source.params)

    def damage(component: str, format: str) -> float:
        if format == "float16":
            return 0.0
        part = Policy(((".*", format),), settings.policy.inputs)
        chosen = lambda name, x: (
            planning.rounded(name, x, part, settings.scheme)
            if planning.component(name) == component and planning.is_matrix(name, x, part)
            else x
        )
        params = jax.tree.map(chosen, names, source.params)
        return agreement(model, params, model, source.params, tokens, len(tokens))["kl"]

    status = (console or Console(quiet=True)).status("measuring each part", spinner="line")
    with status:
        policy = plan_for(source, settings.scheme, settings.policy, target_ratio, damage, console)
    return dataclasses.replace(settings, policy=policy)


# Windows a plan measures each part and format on: enough to tell orders of magnitude apart.
_PLAN_WINDOWS = 4


def pack_only(
    source: Any,
    out: Path,
    policy: Policy,
    scheme: Scheme,
    origin: Path | None = None,
    console: Console | None = None,
) -> dict:
    """`bitnet_jax.shrink.run`; a Phase 3 network is also handed on, in ``out/phase5``.

    Raises:
      BitnetError: if the model is quantised already.
    """
    if isinstance(source, ModelFolder) and source.scheme is not None:
        raise BitnetError("the model is ternary already; give the float model it was made from")
    result = shrink.run(source, out, policy, scheme, console)
    if isinstance(source, ModelFolder) and isinstance(source.config, Phase3Config):
        hand_on(out, policy, origin)
    return result


def make_scheme(rule: str, scale: str | int | None) -> Scheme:
    """The scheme of two flags; each rule has a scale that suits it: absmean's is the whole matrix.

    >>> make_scheme("int4", None)
    Scheme(rule='int4', scale=32, threshold=None)

    Raises:
      BitnetError: for a scale that does not exist.
    """
    if scale is None:
        scale = {"int4": 32, "absmean": "tensor"}.get(rule, "channel")
    try:
        return Scheme(rule, scale)  # pyright: ignore[reportArgumentType]
    except ValueError as e:
        raise BitnetError(f"--scheme and --scale: {e}") from None


# The memory is what the network is at, no weight of it; a matrix of one output is no ternary layer.
_PHASE3_RULES = (
    (r"^buffers/", "float32"),
    (r"(^|/)(w_halt|syntactic_mlp_2|predictive_head)/", "float16"),
)


def make_policy(embeddings: str, source: ModelFolder | None = None) -> Policy:
    """The default policy with embeddings and head kept in another format.

    >>> make_policy("int8").format_of("embed/embedding")
    'int8'
    """
    own = isinstance(source, ModelFolder) and isinstance(source.config, Phase3Config)
    kept = ("embed", "head")
    rules = tuple(
        (pattern, embeddings if any(k in pattern for k in kept) else format)
        for pattern, format in DEFAULT_RULES
    )
    return Policy((_PHASE3_RULES if own else ()) + rules)


def run(
    source: ModelFolder,
    text: Text,
    out: Path,
    settings: phase4.Settings,
    console: Console | None = None,
    sinks: Sequence[Callable[[dict], None]] = (),
    origin: Path | None = None,
    latent: bool = False,
) -> dict:
    """The main job on the user's model and text; arguments and report of `bitnet_jax.phase4.run`.

    A Phase 3 network is also handed on, in ``out/phase5``, see `bitnet_jax.handoff`: ``origin`` is
    where it came from, and with ``latent`` the hand-off holds the latent weights too.

    Raises:
      BitnetError: if the model is quantised already, or as the main job.
    """
    if source.scheme is not None:
        raise BitnetError("the model is ternary already; give the float model it was made from")
    screen = console or Console(quiet=True)
    tokens = jnp.zeros((1, 8), jnp.int32)
    policy, refused = keep_what_layers_refuse(
        lambda params: source.config.build(settings.scheme).apply(params, tokens),
        source.params,
        settings.policy,
        settings.scheme,
    )
    settings = dataclasses.replace(settings, policy=policy)
    for name in refused:
        screen.print(f"[yellow]kept in float16: {name}[/] (its layer takes no packed leaf)")
    size = sum(x.size for x in jax.tree.leaves(source.params.get("params", source.params)))
    screen.print(
        f"[bold]model[/] {size:,} parameters   [bold]text[/] {text.name}: "
        f"{text.train[:, 1:].size:,} tokens to train on, {text.held_out[:, 1:].size:,} held out",
        highlight=False,
    )
    result = phase4.run(
        source, text.train, text.held_out, out, settings, text.prompt, console, sinks=sinks
    )
    if isinstance(source.config, Phase3Config):
        trained = latent and result["packed_is"] != "converted"
        kept = checkpoint.load(out / "latent" / result["packed_is"]).tree if trained else None
        hand_on(out, settings.policy, origin, kept, result["scores"])
    return result


def hand_on(
    out: Path, policy: Policy, origin: Path | None, latent: Any = None, scores: dict | None = None
) -> dict:
    """Write ``out/phase5`` from ``out/packed``; see `bitnet_jax.handoff.write`."""
    return handoff.write(
        out / "phase5",
        load_model(out / "packed"),
        policy,
        latent=latent,
        description={} if origin is None else phase3.description(origin),
        beside=None if origin is None else origin if origin.is_dir() else origin.parent,
        scores=scores,
    )
