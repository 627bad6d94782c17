"""One optimizer step from one batch, or from several microbatches, as one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ..convert import attach
from ..recipe import Part
from ..recipe import apply as acting
from .loss import Loss

Tree = Any


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    prequantize: Callable[[Tree], Tree] | None = None,
    recipe: Sequence[Part] = (),
    watch: Callable[[Tree, Tree], dict] | None = None,
) -> Callable:
    """A jitted step: (params, opt_state, loss, batch, at) -> (params, opt_state, metrics).

    g = 1/k sum over the k microbatches b of d loss(params, b) / d params,  in float32
    params, opt_state = optimizer(g)

    With losses that are means over windows, g is the gradient of the k microbatches as one batch,
    up to rounding; only one of them is in memory at a time.

    Args:
      model: what the loss applies.
      optimizer: an optax transformation.
      accumulate: k; the batch's rows are a multiple of it.
      prequantize: params -> quantised weights where layers quantise, None elsewhere, as
        `bitnet_jax.convert.prequantize` with the policy and the scheme of the model. It is called
        once a step, and the k microbatches share what it gives; None to let the layers quantise.
      recipe: parts that stand between the parameters and the network, see `bitnet_jax.recipe`.
      watch: (params before, params after) -> metrics, as `bitnet_jax.train.watch`.

    Returns:
      The step. ``at`` counts the steps before it, for the recipe. ``params`` and ``opt_state`` are
      donated: pass on what comes back, do not keep what went in. ``loss`` is a `Loss` that is a
      pytree, see `as_pytree`: its arrays are arguments of the program. ``metrics`` are float32
      scalars, ``loss`` among them.

    >>> double = lambda model, params, batch: ((params["w"] * batch).mean() ** 2, {})
    >>> step = train_step(nn.Module(), optax.sgd(0.25), accumulate=2)
    >>> optimizer, params = optax.sgd(0.25), {"w": jnp.ones(())}
    >>> batch = jnp.array([1.0, 2.0])  # gradients 2 and 8, their mean 5
    >>> step(params, optimizer.init(params), as_pytree(double), batch)[0]["w"].item()
    -0.25
    """

    def step(params, opt_state, loss, batch, at=0):
        weights = None if prequantize is None else prequantize(params)

        def objective(params, rows):
            whole = params if weights is None else attach(params, weights)
            value, metrics = loss(model, acting(recipe, whole, jnp.asarray(at)), rows)
            return value, {"loss": value, **metrics}

        grads, metrics = _mean_gradient(objective, params, batch, accumulate)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        if watch is not None:
            metrics = {**metrics, **watch(params, new)}
        return (*strong((new, opt_state)), metrics)

    return jax.jit(step, donate_argnums=(0, 1))


def _mean_gradient(objective: Callable, params: Tree, batch: jax.Array, k: int):
    """Gradients, in the parameters' dtype, and metrics of ``objective``, meaned over k parts."""
    differentiate = jax.grad(objective, has_aux=True)
    if k == 1:
        grads, metrics = differentiate(params, batch)
        return grads, _wide(metrics)
    parts = batch.reshape(k, -1, *batch.shape[1:])
    shapes = jax.eval_shape(differentiate, params, parts[0])
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, "float32")), shapes
    )

    def add(total, rows):
        return jax.tree.map(jnp.add, total, _wide(differentiate(params, rows))), None

    total, _ = jax.lax.scan(add, zeros, parts)
    grads, metrics = jax.tree.map(lambda x: x / k, total)
    return jax.tree.map(lambda g, like: g.astype(like.dtype), grads, shapes[0]), metrics


def _wide(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def strong(tree: Tree) -> Tree:
    """The same arrays without JAX's weak types, which no checkpoint keeps.

    A state that went through a file must promote as one that did not.

    >>> strong(jnp.asarray(2.0)).weak_type, jnp.asarray(2.0).weak_type
    (False, True)
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)


def as_pytree(loss: Loss) -> Loss:
    """A loss as an argument of a compiled function: a plain function is wrapped, a pytree is not.

    The arrays inside (a teacher's parameters) stay arguments; closed over, they would be constants
    copied into the program.

    >>> jax.tree.leaves(as_pytree(lambda model, params, batch: (0.0, {})))
    []
    """
    if jax.tree_util.all_leaves([loss]):
        return jax.tree_util.Partial(loss)
    return jax.tree.map(jnp.asarray, loss)
