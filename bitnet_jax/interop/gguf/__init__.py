"""GGUF, the files of llama.cpp and all that is built on it: models in and out.

    model = gguf.load("model.gguf")
    report = gguf.save(model, "small.gguf")

Needs the `gguf` package: ``pip install 'bitnet-jax[gguf]'``.
"""

from .read import load
from .write import save

__all__ = ["load", "save"]
