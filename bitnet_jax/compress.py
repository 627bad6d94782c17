"""The user's model and text, read for the main job and the commands."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from rich.console import Console

from . import checkpoint, phase4
from .convert import keep_what_layers_refuse, path_name
from .errors import BitnetError
from .interop.torch import from_torch
from .models.folder import TOKENIZER, ModelFolder, PythonModule, load_model
from .policy import DEFAULT_RULES, Policy
from .quantize import Scheme
from .train.data import encode, windows
from .train.text import byte_tokenizer, read_text


def load_source(
    path: Path,
    module: str | None = None,
    tokenizer: str | None = None,
    console: Console | None = None,
) -> ModelFolder:
    """A language model from whatever the user has.

    Args:
      path: a model folder of ours; or PyTorch weights (safetensors, sharded too, or .pt), or a
        checkpoint of ours without a network, with ``module``.
      module: ``file.py:Name``, the Linen network the weights are for, see `PythonModule`.
      tokenizer: a ``tokenizer.json``, or ``"bytes"``; by default the one beside the weights.
      console: where to say which tensors were used, tied and left over.

    Raises:
      BitnetError: if files are missing or damaged, or weights and network do not fit.
    """
    if not path.exists():
        raise BitnetError(f"{path}: no such file or folder; give a model folder or PyTorch weights")
    network = None if module is None else PythonModule(module)
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
    if isinstance(source.config, PythonModule):
        if dtype != "float32":
            raise BitnetError(f"--dtype {dtype}: set it in {source.config.source} itself")
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
      length: tokens a window.
      most_held_out: measure on no more windows than this, spread over the held-out text.

    Raises:
      BitnetError: if there is too little text, or it has tokens the model does not know.
    """
    corpus = read_text(path)
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
    logits: Any = jax.eval_shape(source.model.apply, source.params, shape)
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


def make_policy(embeddings: str) -> Policy:
    """The default policy with embeddings and head kept in another format.

    >>> make_policy("int8").format_of("embed/embedding")
    'int8'
    """
    kept = ("embed", "head")
    rules = tuple(
        (pattern, embeddings if any(k in pattern for k in kept) else format)
        for pattern, format in DEFAULT_RULES
    )
    return Policy(rules)


def run(
    source: ModelFolder,
    text: Text,
    out: Path,
    settings: phase4.Settings,
    console: Console | None = None,
    sinks: Sequence[Callable[[dict], None]] = (),
) -> dict:
    """The main job on the user's model and text; arguments and report of `bitnet_jax.phase4.run`.

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
    return phase4.run(
        source, text.train, text.held_out, out, settings, text.prompt, console, sinks=sinks
    )
