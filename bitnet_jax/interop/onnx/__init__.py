"""ONNX: a decoder as a graph that onnxruntime and others run, its codes stored at their size.

`save` writes one, `codes_of` reads codes and scales back. Needs the package ``onnx``; to run the
graph, ``onnxruntime``.
"""

from .read import codes_of
from .write import FORMS, save

__all__ = ["FORMS", "codes_of", "save"]
