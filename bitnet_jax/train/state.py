"""The whole state of a training on disk: what a killed run needs to end as if never stopped."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import checkpoint
from ..errors import BitnetError
from .fingerprint import differences, is_key, plain
from .step import strong

Tree = Any

_HISTORY = "history.jsonl"


@dataclasses.dataclass
class State:
    """All that the next step of a training depends on.

    Attributes:
      params, opt_state: the two trees.
      history: every entry so far.
      step: steps taken.
      seconds: time they took, over all sittings.
      best, best_step: lowest held-out loss, and after which step it was.
      stale: epochs since then.
      stopped: why the training ended before its last step, or None.
      total: steps to take.
      log_start: bytes of the log file that this training found there.
    """

    params: Tree
    opt_state: Tree
    history: list[dict] = dataclasses.field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    stopped: str | None = None
    log_start: int = 0
    total: int = 0

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        return self.stopped is not None or self.step == self.total


_NUMBERS = [f.name for f in dataclasses.fields(State)][3:]


def save(folder: Path, state: State, fingerprint: dict) -> None:
    """Replace the state in ``folder/state``, all or nothing, by `bitnet_jax.checkpoint.save`.

    Args:
      folder: of the training, made if missing.
      state: what to keep.
      fingerprint: what the training was given, see `bitnet_jax.train.fingerprint`.

    Raises:
      BitnetError: if it cannot be written.
    """
    # A checkpoint holds dicts; an optimizer's state is any pytree, so its leaves go by number.
    tree = {"params": _leaves(state.params), "opt_state": _leaves(state.opt_state)}
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    lines = "".join(json.dumps(entry) + "\n" for entry in state.history)
    checkpoint.save(
        folder / "state",
        {name: leaves for name, leaves in tree.items() if leaves},
        {"kind": "training state", "numbers": numbers, "fingerprint": fingerprint},
        {_HISTORY: lines.encode()},
        overwrite=True,
    )


def load(folder: Path, fresh: State, fingerprint: dict) -> State | None:
    """The state in ``folder/state``, or None if there is none.

    Args:
      folder: given to `save`.
      fresh: a state of the same training before its first step, for structure and placement.
      fingerprint: what the training is given now.

    Raises:
      BitnetError: if the folder is damaged, or holds a training that was given something else.
    """
    path = folder / "state"
    if not checkpoint.exists(path):
        return None
    stored = checkpoint.load(path)
    if stored.metadata.get("kind") != "training state":
        raise BitnetError(f"{path}: holds no state of a training; give another folder")
    then = stored.metadata["fingerprint"]
    if then != fingerprint:
        raise BitnetError(
            f"{folder}: holds another training ({differences(then, fingerprint)}); "
            "give the same arguments, or another folder to start anew"
        )
    history = [json.loads(line) for line in stored.files[_HISTORY].decode().splitlines()]
    params = _refill(fresh.params, stored.tree.get("params", {}))
    opt_state = _refill(fresh.opt_state, stored.tree.get("opt_state", {}))
    return State(params, opt_state, history, **stored.metadata["numbers"])


def cut_back(log: Path, state: State) -> None:
    """Leave in the log what was there before this training, and the entries of its saved state.

    A killed run wrote entries after its last save, perhaps half a line; they will come again.

    Raises:
      BitnetError: if the file cannot be written.
    """
    lines = "".join(json.dumps(entry) + "\n" for entry in state.history).encode()
    try:
        with open(log, "r+b" if log.exists() else "w+b") as f:
            state.log_start = min(state.log_start, f.seek(0, 2))
            f.truncate(state.log_start)
            f.seek(state.log_start)
            f.write(lines)
    except OSError as e:
        raise BitnetError(f"{log}: cannot be written ({e.strerror})") from e


def _leaves(tree: Tree) -> dict[str, np.ndarray]:
    return {f"{i:05d}": plain(x) for i, x in enumerate(jax.tree.leaves(tree))}


def _refill(tree: Tree, leaves: dict) -> Tree:
    """``tree`` with stored leaves in place of its own, on the devices where its own lie."""
    old, structure = jax.tree.flatten(tree)
    new = [_like(leaves[name], x) for name, x in zip(sorted(leaves), old, strict=True)]
    return jax.tree.unflatten(structure, new)


def _like(x: jax.Array, old: jax.Array) -> jax.Array:
    if is_key(old):
        x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(old))
    return jax.device_put(x, old.sharding)


def committed(tree: Tree) -> Tree:
    """The same arrays, bound to their devices as a compiled function's results are.

    A function is compiled apart for arrays that are and that are not: the second step of a
    training, whose arguments are the first one's results, would compile once more. So would the
    first, after it was lowered for the fingerprint.

    >>> committed({"w": np.ones(2)})["w"].committed
    True
    """
    return jax.tree.map(lambda x: jax.device_put(x, jnp.asarray(x).sharding), tree)


def begin(
    params: Tree, optimizer: optax.GradientTransformation, total: int, log: Path | None
) -> State:
    """A training before its first step: copies of the parameters, the optimizer's first state.

    All of them are `committed`.
    """
    params = strong(jax.tree.map(lambda x: jnp.array(x, copy=True), params))
    size = log.stat().st_size if log is not None and log.exists() else 0
    params, opt_state = committed((params, strong(optimizer.init(params))))
    return State(params, opt_state, log_start=size, total=total)


class Keeper:
    """Saves a training's state now and then; does nothing without a folder.

    Args:
      folder: see `save`.
      every: least seconds from the end of one save to the start of the next.
    """

    def __init__(self, folder: Path | None, every: float):
        self.folder, self.every = folder, every
        self.mark, self.step, self.at = {}, -1, 0.0

    def open(self, fresh: State, mark: Callable[[], dict], log: Path | None) -> State:
        """The state to go on from: the saved one, its log cut back to it, or the fresh one, saved.

        Args:
          fresh: a training before its first step.
          mark: makes its fingerprint; only called with a folder.
          log: its JSONL file.

        Raises:
          BitnetError: as `load`, `save` and `cut_back`.
        """
        if self.folder is None:
            return fresh
        self.mark = mark()
        run = load(self.folder, fresh, self.mark)
        if run is None:
            # At once, so that the log is cut back to where it began even if no step is saved.
            self(fresh, now=True)
            return fresh
        self.step, self.at = run.step, time.perf_counter()
        # What follows a finished training in its log is another one's.
        if log is not None and not run.finished:
            cut_back(log, run)
        return run

    def __call__(self, run: State, now: bool = False) -> None:
        """Save if it is time, or ``now`` if this step is not saved yet."""
        due = now or time.perf_counter() - self.at >= self.every
        if self.folder is not None and due and run.step != self.step:
            save(self.folder, run, self.mark)
            self.step, self.at = run.step, time.perf_counter()
