"""Compute kernels, one file a target. An op knows arrays, never models, layers or schemes."""

from .xla import integer_product as integer_product
