"""Data, losses, the training loop and evaluation."""
