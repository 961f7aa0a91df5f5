"""What tasks score: every next token, or the masked ones."""

from types import SimpleNamespace

import pytest
import torch
from autoprune_plugins.tasks import MASKED_FRACTION, CausalLM, MaskedLM, register_tasks
from transformers import PreTrainedTokenizerFast

from autoprune.errors import ModelError

MASK = SimpleNamespace(mask_token_id=1)


def windows(rng: torch.Generator, length: int = 20) -> torch.Tensor:
    return torch.randint(4, 250, (3, length), generator=rng)


def test_causal_windows_predict_all_tokens_but_the_first(rng: torch.Generator) -> None:
    ids = windows(rng)
    batch = CausalLM().batch(ids, None)
    assert torch.equal(batch.inputs["input_ids"], ids)
    assert batch.inputs["use_cache"] is False
    assert batch.scored.sum(1).tolist() == [19, 19, 19]
    assert not batch.scored[:, -1].any()
    following = torch.cat([row[1:] for row in ids])
    assert torch.equal(batch.labels, following)


def test_masked_windows_predict_what_is_hidden(rng: torch.Generator) -> None:
    ids = windows(rng)
    batch = MaskedLM().batch(ids, MASK)
    shown = batch.inputs["input_ids"]
    assert batch.scored.sum(1).tolist() == [round(MASKED_FRACTION * 20)] * 3
    assert (shown[batch.scored] == 1).all()
    assert torch.equal(shown[~batch.scored], ids[~batch.scored])
    assert torch.equal(batch.labels, ids[batch.scored])


def test_masks_are_the_windows_own(rng: torch.Generator) -> None:
    ids = windows(rng)
    whole = MaskedLM().batch(ids, MASK)
    for row in range(3):
        alone = MaskedLM().batch(ids[row : row + 1], MASK)
        assert torch.equal(alone.scored[0], whole.scored[row])
    assert not torch.equal(whole.scored[0], whole.scored[1])


def test_at_least_one_token_is_hidden(rng: torch.Generator) -> None:
    assert MaskedLM().batch(windows(rng, 2), MASK).scored.sum(1).tolist() == [1, 1, 1]


def test_a_tokenizer_without_a_mask_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, rng: torch.Generator
) -> None:
    with pytest.raises(ModelError, match="no mask token, which task 'masked-lm' needs"):
        MaskedLM().batch(windows(rng), tiny_tokenizer)


def test_tasks_name_the_class_that_loads_their_models() -> None:
    import transformers

    tasks = register_tasks()
    assert [task.name for task in tasks] == ["causal-lm", "masked-lm"]
    assert all(hasattr(transformers, task.auto_class) for task in tasks)
