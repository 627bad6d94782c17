"""Models built on the ternary layers."""
