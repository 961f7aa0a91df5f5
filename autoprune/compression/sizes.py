"""The sizes of a layer's weights, counted: what rankings of whole models need."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.errors import ModelError


@dataclass(frozen=True, eq=False)
class Sizes:
    """How often each size occurs among the weights of a layer, in bfloat16's numbers.

    So a layer is known by a few thousand numbers, and nothing has to be sorted.

    Attributes:
        values: The sizes that occur, ascending.
        counts: How often.
    """

    values: Float[np.ndarray, " sizes"]
    counts: Float[np.ndarray, " sizes"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], name: str) -> "Sizes":
        """Count the sizes of a weight.

        Raises:
            ModelError: If it holds NaN or infinity; names the layer.
        """
        low, high = weight.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(f"the weight of {name} holds NaN or infinity")
        bits = weight.abs().bfloat16().flatten().view(torch.int16)
        counts = torch.bincount(bits.int(), minlength=1)
        found = torch.nonzero(counts).flatten()
        values = found.to(torch.int16).view(torch.bfloat16).double().numpy()
        return cls(values, counts[found].double().numpy())

    @property
    def lamp(self) -> Float[np.ndarray, " sizes"]:
        """Give each size's LAMP score: its square over those of none smaller."""
        squares = self.values**2
        left = np.cumsum((squares * self.counts)[::-1])[::-1]
        return squares / np.where(left > 0, left, 1.0)

    @property
    def mean_square(self) -> float:
        """Mean square of all weights."""
        return float(self.counts @ self.values**2 / self.counts.sum())

    @property
    def entropy(self) -> float:
        """Entropy of the weights' shares of the layer's energy, 1 if all are equal.

        Its exponential counts the weights that matter.
        """
        energy = self.values**2
        whole = float(self.counts @ energy)
        if whole == 0 or self.counts.sum() < 2:
            return 0.0
        shares = energy[energy > 0] / whole
        entropy = -(self.counts[energy > 0] @ (shares * np.log(shares)))
        return float(entropy / np.log(self.counts.sum()))
