"""See `bitnet_jax.bench.timing`."""

from bitnet_jax.bench.timing import keep as keep
from bitnet_jax.bench.timing import turns as turns
