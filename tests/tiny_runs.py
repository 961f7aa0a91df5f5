"""Whole runs on tiny models: a text, a space, and every family as a checkpoint."""

from pathlib import Path
from typing import Any

from tiny_models import tiny
from transformers import PreTrainedTokenizerFast

from autoprune.config import RunConfig

BLOCKS = ["gptq(bits=[3, 4, 8], group=16)", "magnitude(sparsity=[0.4, 0.5, 0.6, 0.7])"]
EMBEDDING = ["rtn(bits=[4, 8], group=16)", "dense"]
"""Actions whose groups divide the widths of ``tiny_model``."""

WINDOW = 32


def write_text(folder: Path, *, documents: int = 300) -> str:
    """Write a text of many documents; give the name of its source."""
    path = folder / "text.txt"
    path.write_text(
        "\n\n".join(
            f"Chapter {i}. In it {i * i % 97} things happen, and {i % 7} of them twice."
            for i in range(documents)
        )
    )
    return f"file:{path}"


def space_of(model: Path | str, text: str, **changes: Any) -> dict[str, Any]:
    """Give a small space as plain data, as its YAML file would hold it."""
    return {
        "model": str(model),
        "text": {
            "source": text,
            "window": WINDOW,
            "statistics": 4,
            "fitness": 2,
            "choice": 2,
            "report": 2,
        },
        "space": [{"actions": BLOCKS}, {"sites": "embedding", "actions": EMBEDDING}],
        "objective": {"budgets": {"size_bytes": "40%"}},
        "search": {"trials": 6, "finalists": 2},
        **changes,
    }


def config_of(model: Path | str, text: str, **changes: Any) -> RunConfig:
    """Make the configuration of a small space."""
    return RunConfig.from_dict(space_of(model, text, **changes))


def save_tiny(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save the tiny model of a type, with a vocabulary for the tiny tokenizer."""
    # GPT-2 draws its weights a tenth as large, too small for compression to show.
    tiny(kind, vocab_size=256, initializer_range=0.2).save_pretrained(folder)
    mask = tokenizer.convert_ids_to_tokens(1)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        mask_token=mask,
    ).save_pretrained(folder)
    return folder
