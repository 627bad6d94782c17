"""``bitnet-jax bench``: our time, the peers', the machine's own limits, in one run."""
