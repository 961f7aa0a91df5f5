"""Language modelling: the next word, or a masked one."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.errors import ModelError
from autoprune.hookspecs import hookimpl
from autoprune.models.task import Batch, Task

MASKED_FRACTION = 0.15
"""Share of masked positions, as BERT was trained with (arXiv:1810.04805, Sec. 3.1)."""


class CausalLM(Task):
    """Causal language modelling: predict each token from those before it.

    Perplexity follows the field's protocol: windows without overlap, each predicting
    all of its tokens but the first.
    """

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"

    def batch(self, ids: Int[Tensor, "windows length"], tokenizer: Any) -> Batch:
        """Score every position but the last, whose next token is not known."""
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, -1] = False
        inputs = {"input_ids": ids, "use_cache": False}
        return Batch(inputs, scored, ids[:, 1:].flatten())


class MaskedLM(Task):
    """Masked language modelling: predict the tokens that were hidden.

    Which ones is drawn from a generator seeded by the window itself, so that all models
    are asked the same. Every one of them shows the mask token; BERT's training left a
    fifth of them as they were or random, which a measurement has no use for.
    """

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"

    def batch(self, ids: Int[Tensor, "windows length"], tokenizer: Any) -> Batch:
        """Hide 15 % of each window's tokens, at least one.

        Raises:
            ModelError: If the tokenizer has no mask token.
        """
        mask_id = tokenizer.mask_token_id
        if mask_id is None:
            raise ModelError(
                "the tokenizer has no mask token, which task 'masked-lm' needs; use "
                "task 'causal-lm' for a model that predicts the next token"
            )
        count = max(1, round(MASKED_FRACTION * ids.shape[1]))
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for row, window in enumerate(ids):
            generator = torch.Generator().manual_seed(int(window.sum()))
            hidden = torch.randperm(ids.shape[1], generator=generator)[:count]
            scored[row, hidden] = True
        return Batch(
            {"input_ids": ids.masked_fill(scored, mask_id)}, scored, ids[scored]
        )


@hookimpl
def register_tasks() -> list[Task]:
    """Register both."""
    return [CausalLM(), MaskedLM()]
