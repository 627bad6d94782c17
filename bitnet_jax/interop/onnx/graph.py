"""An ONNX graph under construction: values by name, constants made where they are used."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import BitnetError

try:
    import onnx
    from onnx import helper, numpy_helper
except ModuleNotFoundError as e:  # one clear line, instead of Python's
    raise BitnetError("ONNX files need the package onnx; pip install 'bitnet-jax[onnx]'") from e

# The first opset with 4-bit tensors; IR version 10 came with it. onnxruntime reads it since 1.18.
OPSET, IR_VERSION = 21, 10
# Operators that are onnxruntime's own, by name.
_DOMAINS = {"MatMulNBits": "com.microsoft"}


@dataclasses.dataclass(frozen=True)
class Value:
    """What a graph is given or gives.

    Attributes:
      shape: numbers, and names for axes that are free.
      dtype: ONNX's number for it.
      made: of what the graph gives: the result that is it.
    """

    shape: tuple[int | str, ...]
    dtype: int = onnx.TensorProto.FLOAT
    made: str = ""


class Graph:
    """Nodes and constants in the order they are added.

    >>> g = Graph()
    >>> g.op("Add", g.op("Mul", "x", 2.0), 1.0)
    'Add_1'
    >>> [node.op_type for node in g.nodes]
    ['Mul', 'Add']
    """

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._made: dict[Any, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(len(tensor.raw_data) for tensor in self.constants.values())

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant of the graph, an initializer, under a name that is kept in the file."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave the first time it was asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node of one output.

        Args:
          kind: the operator.
          inputs: names of values; or numbers, lists and arrays, which become constants: float32
            for floats, int64 for integers.
          attributes: the operator's.

        Returns:
          The name of the result.
        """
        name = f"{kind}_{len(self.nodes)}"
        names = [x if isinstance(x, str) else self._small(x) for x in inputs]
        domain = _DOMAINS.get(kind, "")
        self.nodes.append(helper.make_node(kind, names, [name], name, domain=domain, **attributes))
        return name

    def _small(self, value: Any) -> str:
        x = np.asarray(value)
        if not isinstance(value, np.ndarray | np.generic):
            x = x.astype(np.float32 if x.dtype.kind == "f" else np.int64)
        name = f"constant/{x.dtype.name}/{'x'.join(map(str, x.shape))}/{x.tobytes().hex()}"
        return self.constant(name, x)

    def model(
        self, inputs: Mapping[str, Value], outputs: Mapping[str, Value], metadata: dict[str, str]
    ) -> Any:
        """The whole graph.

        Args:
          inputs: what it is given, by the names that nodes use.
          outputs: what it gives, by the names that others will use.
          metadata: what the file says of itself.
        """
        told = lambda values: [
            helper.make_tensor_value_info(name, x.dtype, x.shape) for name, x in values.items()
        ]
        named = [helper.make_node("Identity", [x.made], [k], k) for k, x in outputs.items()]
        nodes, constants = [*self.nodes, *named], list(self.constants.values())
        graph = helper.make_graph(nodes, "decoder", told(inputs), told(outputs), constants)
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in set(_DOMAINS.values())]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="bitnet_jax"
        )
        helper.set_model_props(model, metadata)
        return model
