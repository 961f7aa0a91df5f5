"""Divergence and loss of one policy, window by window, so that policies pair up."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Quality:
    """Divergence and loss of one policy, window by window.

    Attributes:
        kl: Mean KL to the dense model of each window, in nats a token.
        nll: Mean negative log-likelihood of each window's labels, in nats a token.
    """

    kl: Float[Tensor, " windows"]
    nll: Float[Tensor, " windows"]

    def first(self, windows: int) -> "Quality":
        """Take the first windows."""
        return Quality(self.kl[:windows], self.nll[:windows])

    def __add__(self, other: "Quality") -> "Quality":
        """Put the windows of another behind one's own."""
        pairs = (self.kl, other.kl), (self.nll, other.nll)
        return Quality(*(torch.cat(pair) for pair in pairs))

    @property
    def mean_kl(self) -> float:
        """KL to the dense model, in nats a token."""
        return float(self.kl.double().mean())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood; inf where it overflows."""
        return float(self.nll.double().mean().exp())

    def kl_error(self) -> float:
        """Standard error of the mean KL over windows; NaN for one window."""
        count = len(self.kl)
        return float(self.kl.double().std() / count**0.5) if count > 1 else math.nan
