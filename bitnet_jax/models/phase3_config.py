"""The shape of a Phase 3 network."""

import dataclasses

import flax.linen as nn

from ..quantize import Scheme

# The refiner's attention has these many heads, whatever n_heads is.
REFINER_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Phase3Config:
    """The shape of a Phase 3 network, under the reference's names; the defaults are its own.

    Attributes:
      vocab_size, d_model, n_layers, n_heads, d_ff, max_seq_len: of the backbone.
      sw_window: a token sees those at most ``sw_window // 2`` away, on both sides.
      d_mem, memory_decay: features and decay d of the long-term memory.
      mag_hidden, mag_entropy_reg: features inside the gate, weight of its entropy in the loss.
      T_max, micro_steps: steps of the recursion, refinements of z in each.
      deep_supervision, step_weights: cross entropy after every step, weighted, or after the last.
      detach_between_steps: as the reference trains: no gradient flows from one step to the next, so
        the logits that are returned train no weight of the backbone. Fine-tuning turns it off.
      halt_threshold: of the halting probability.
      act_loss_weight: of the number of steps in the loss.
      tied: the head is the embedding's transpose.
      quiet_star: the network is wrapped in `bitnet_jax.models.quiet_star`.

    Raises:
      ValueError: if heads do not divide the width.

    >>> Phase3Config().head_dim
    64
    """

    vocab_size: int = 50257
    d_model: int = 320
    n_layers: int = 8
    n_heads: int = 5
    d_ff: int = 1280
    max_seq_len: int = 2048
    sw_window: int = 1024
    d_mem: int = 160
    memory_decay: float = 0.99
    mag_hidden: int = 160
    mag_entropy_reg: float = 0.001
    T_max: int = 3
    micro_steps: int = 2
    deep_supervision: bool = True
    step_weights: tuple[float, ...] = (0.33, 0.5, 0.75, 1.0)
    detach_between_steps: bool = True
    halt_threshold: float = 0.95
    act_loss_weight: float = 0.01
    tied: bool = True
    quiet_star: bool = False

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}")
        if self.d_model % REFINER_HEADS:
            raise ValueError(
                f"d_model {self.d_model}: the refiner's {REFINER_HEADS} heads do not divide it"
            )
        object.__setattr__(self, "step_weights", tuple(self.step_weights))  # JSON has lists

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self.max_seq_len

    def build(self, scheme: Scheme | None) -> nn.Module:
        """The network of this shape, float for None."""
        if self.quiet_star:
            from .quiet_star import QuietSTaR

            return QuietSTaR(self, scheme)
        from .phase3 import TRMTitansMAG

        return TRMTitansMAG(self, scheme)
