"""Hugging Face's folders: read exactly, and written for stock transformers.

>>> from bitnet_jax.interop import hf
>>> model = hf.load("SmolLM2-135M")  # doctest: +SKIP
>>> hf.save(model, "out").form  # doctest: +SKIP
'float weights in bfloat16, a plain transformers model'
"""

from .read import is_folder, load
from .write import save

__all__ = ["is_folder", "load", "save"]
