"""NNX's layers with the ternary operator put in, and NNX modules as trees.

Stock layers need no class of ours, two arguments do:

    nnx.LinearGeneral(64, (4, 16), dot_general=bitnet_jax.dot_general,
                      promote_dtype=bitnet_jax.nnx.promote_dtype, rngs=rngs)
    nnx.MultiHeadAttention(4, 64, qkv_dot_general=bitnet_jax.dot_general,
                           qkv_promote_dtype=bitnet_jax.nnx.promote_dtype, ...the same with out_)

``dot_general`` makes the layer ternary, ``promote_dtype`` lets it take packed leaves.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .conv import conv_with_scheme
from .dot import with_scheme
from .embed import attend, take
from .errors import BitnetError
from .leaf import is_quantized
from .linen import promote_activations
from .quantize import Scheme

Tree = Any


def promote_dtype(arrays: tuple, *, dtype: Any = None, inexact: bool = True) -> tuple:
    """NNX's dtype promotion for (inputs, kernel, bias), leaving the kernel as it is.

    See `bitnet_jax.linen.promote_activations`.
    """
    x, kernel, bias = arrays
    return promote_activations(x, kernel, bias, dtype=dtype)


class BitLinear(nnx.Linear):
    """A drop-in for `flax.nnx.Linear` whose kernel acts ternary.

    y = (codes_x @ codes_w) * scale_w * scale_x + bias, see `bitnet_jax.dot_general`.

    Linear's arguments, initial values and metadata, with ``scheme`` (how latent weights become
    codes and scale; None leaves them in float) added. The parameter decides what the layer does: a
    float ``kernel`` is latent weights, a packed leaf in its place is multiplied as it is.

    Input (..., in_features), output (..., out_features).

    >>> import bitnet_jax, jax.numpy as jnp
    >>> layer, x = BitLinear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 8))
    >>> y = layer(x)
    >>> update(layer, bitnet_jax.convert(variables(layer)).tree)
    >>> type(layer.kernel[...]).__name__, bool((layer(x) == y).all())
    ('PackedTernary', True)
    """

    def __init__(
        self, in_features: int, out_features: int, *, scheme: Scheme | None = Scheme(), **kwargs
    ):
        ours = {"dot_general": with_scheme(scheme), "promote_dtype": promote_dtype}
        super().__init__(in_features, out_features, **(ours | kwargs))


class BitConv(nnx.Conv):
    """A drop-in for `flax.nnx.Conv` whose kernel acts ternary, see `bitnet_jax.conv`.

    Conv's arguments with ``scheme`` added. Input (batch, *spatial, in_features), output (batch,
    *spatial, out_features).
    """

    def __init__(self, *args, scheme: Scheme | None = Scheme(), **kwargs):
        ours = {"conv_general_dilated": conv_with_scheme(scheme), "promote_dtype": promote_dtype}
        super().__init__(*args, **(ours | kwargs))


class BitEmbed(nnx.Embed):
    """A drop-in for `flax.nnx.Embed` whose table may be a quantised leaf, int8 or int4 say.

    A float table behaves as in Embed. Input int (...), output (..., features); ``attend``:
    (..., features) to (..., num_embeddings).
    """

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        table: Any = self.embedding[...]
        if is_quantized(table):
            return take(table, inputs, self.dtype)
        return super().__call__(inputs, out_sharding)

    def attend(self, query: jax.Array, out_sharding=None) -> jax.Array:
        table: Any = self.embedding[...]
        return attend(query, table) if is_quantized(table) else super().attend(query, out_sharding)


_COLLECTIONS = ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats"))


def _linen_path(path: tuple) -> tuple[str, ...]:
    """An NNX path with list positions joined to the name before, as Linen names them.

    >>> _linen_path(("layers", 0, "up", "kernel"))
    ('layers_0', 'up', 'kernel')
    """
    text = "/".join(str(part) for part in path)
    return tuple(re.sub(r"/(\d+)(?=/|$)", r"_\1", text).split("/"))


def _parts(model: nnx.Module | nnx.State) -> list[tuple[tuple[str, ...], Any]]:
    """Parameters and batch statistics with the paths they have in Linen's variables."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return [
        ((name, *_linen_path(path)), variable)
        for path, variable in nnx.to_flat_state(state)
        for kind, name in _COLLECTIONS
        if isinstance(variable, kind)
    ]


def variables(model: nnx.Module | nnx.State) -> Tree:
    """An NNX module's parameters as the plain tree that Linen's ``init`` would give.

    ``{"params": {...}, "batch_stats": {...}}`` with names as keys; lists of layers become
    ``layers_0``, ``layers_1``. It is what `bitnet_jax.convert` and the optimizers' path rules read,
    and the one layout checkpoints have on disk. Other state (dropout keys, caches) is left out.

    >>> import jax.numpy as jnp
    >>> jax.tree.map(jnp.shape, variables(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    {'params': {'bias': (3,), 'kernel': (2, 3)}}
    """
    tree: dict = {}
    for path, variable in _parts(model):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = variable[...]
    return tree


def pure(model: nnx.Module) -> Callable:
    """The module as a pure function (tree, *inputs) -> outputs, for `bitnet_jax.calibrate`.

    >>> import bitnet_jax, jax.numpy as jnp
    >>> layer, x = BitLinear(8, 4, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (9, 8))
    >>> update(layer, bitnet_jax.calibrate(variables(layer), pure(layer), [x]))
    >>> type(layer.kernel[...]).__name__
    'Ternary'
    """

    def apply(tree, *inputs):
        copy = nnx.clone(model)
        update(copy, tree)
        return copy(*inputs)  # pyright: ignore[reportCallIssue]

    return apply


def update(model: nnx.Module, tree: Tree) -> None:
    """Put a tree into an NNX module: float, packed, from a checkpoint, from a Linen model.

    Args:
      model: the module; its parameters are replaced, as `flax.nnx.update` does.
      tree: as `variables` gives it, or only its ``params``; every parameter must be there, with the
        shape the module has.

    Raises:
      BitnetError: naming what is missing, left over or of another shape; the module is unchanged.
    """
    tree = tree if "params" in tree else {"params": tree}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    given = {tuple(str(key.key) for key in path): x for path, x in leaves}
    parts = _parts(model)
    wanted = {path for path, _ in parts}
    missing, unknown = wanted - given.keys(), given.keys() - wanted
    for what, paths in (("missing", missing), ("unknown", unknown)):
        if paths:
            first = "/".join(min(paths))
            raise BitnetError(f"{first}: {what} (1 of {len(paths)}); give a tree of this module")
    for path, variable in parts:
        if tuple(given[path].shape) != tuple(variable[...].shape):
            raise BitnetError(
                f"{'/'.join(path)}: has shape {tuple(given[path].shape)}, the module needs "
                f"{tuple(variable[...].shape)}"
            )
    for path, variable in parts:
        variable.set_value(given[path])
