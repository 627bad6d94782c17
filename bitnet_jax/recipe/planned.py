"""Leaves that a plan keeps in 8 or 4 bits, or tables in ternary, trained as they will be packed."""

import dataclasses
from typing import Any

import jax

from ..convert import path_name
from ..leaf import Prequantized, is_quantized
from ..policy import Policy, is_table, is_ternary_matrix, quantized_format, scheme_of
from ..quantize import Scheme, dequantize, quantize_kernel, straight_through
from .part import Part

Tree = Any


@dataclasses.dataclass(frozen=True)
class Planned(Part):
    """What the policy does not leave to the layers, quantised in front of them.

    Layers make latent kernels ternary by their own scheme. A kernel that the policy makes int8 or
    int4 meets its inputs as that instead, and a table is looked up rounded:

    q(w) = codes scale of the leaf's own format,  d/dw = the identity (straight through)

    Attributes:
      policy, scheme: of the training.

    >>> import jax.numpy as jnp
    >>> part = Planned(Policy(((".*", "int8"),)))
    >>> tree = part.apply({"up": {"kernel": jnp.eye(4)}}, jnp.asarray(0))
    >>> type(tree["up"]["kernel"].weight).__name__
    'Int8'
    """

    policy: Policy = Policy()
    scheme: Scheme = Scheme()

    def concerns(self, params: Tree) -> bool:
        """Whether there is any such leaf among the parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
        return any(self._format(path_name(path), x) for path, x in leaves)

    def _format(self, name: str, x: Any) -> str:
        if is_quantized(x) or is_ternary_matrix(name, x, self.policy):
            return ""
        return quantized_format(name, x, self.policy)

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        def one(path, x):
            name = path_name(path)
            if not (format := self._format(name, x)):
                return x
            scheme = scheme_of(format, name, self.scheme)
            inputs = self.policy.inputs_of(name, x.ndim)
            weight = quantize_kernel(jax.lax.stop_gradient(x), scheme, inputs)
            if is_table(name):
                return straight_through(x, dequantize(weight))
            return Prequantized(x, weight)

        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)
