"""The model card says what was done and measured, and nothing more."""

from typing import Any

import pytest
import yaml
from autoprune_plugins.packed import Packed

from autoprune.reporting.card import model_card

ABOUT: dict[str, Any] = {
    "format": 1,
    "actions": {"blocks.0.qkv": "dense"},
    "target": "packed",
    "usage": 'autoprune.load("FOLDER")',
    "loads_in": Packed.loads_in,
    "seed": 3,
    "model": {
        "source": "owner/name-1B",
        "revision": "0123456789abcdef",
        "licence": "apache-2.0",
        "auto_class": "AutoModelForCausalLM",
    },
    "versions": {"autoprune": "0.1.0", "torch": "2.13.0"},
    "text": {
        "source": "builtin",
        "split": "report",
        "windows": 8,
        "window": 512,
        "fingerprint": "feedfacefeedface",
    },
    "summary": [
        {
            "action": "gptq(bits=4)",
            "sites": 3,
            "layers": 5,
            "weights": 300,
            "bytes": 160,
        },
        {"action": "dense", "sites": 1, "layers": 1, "weights": 100, "bytes": 200},
    ],
    "figures": {
        "dense": {"perplexity": 10.0, "size_bytes": 800_000, "own_metric": 1.0},
        "compressed": {
            "perplexity": 11.25,
            "kl": 0.0625,
            "size_bytes": 360_000,
            "sparsity": 0.5,
            "bits_per_weight": 7.2,
            "gflop_per_token": 0.21,
            "compression_ratio": 2.2222,
            "own_metric": 0.75,
        },
    },
    "sizes": {
        "packed": {"dense": 800_000, "compressed": 360_000},
        "transformers": {"dense": 800_100, "compressed": 800_100},
    },
    "rivals": [
        {
            "name": "uniform gptq(bits=4)",
            "kl": 0.03,
            "perplexity": 10.5,
            "size_bytes": 1,
        },
        {"name": "magnitude", "kl": None, "perplexity": None, "size_bytes": 359_000},
    ],
    "verified": {
        "perplexity": 11.25,
        "expected_perplexity": 11.25,
        "size_bytes": 360_000,
        "seconds": 4.0,
        "layers": 14,
        "logits": 0.001,
    },
}


def head(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_head_is_what_hubs_read() -> None:
    assert head(model_card(ABOUT)) == {
        "base_model": "owner/name-1B",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["autoprune"],
    }


def test_a_local_model_is_no_base_model_of_a_hub() -> None:
    card = model_card({**ABOUT, "model": {"source": "/home/somebody/mine: v2/"}})
    assert head(card).keys() == {"library_name", "tags"}
    assert "The model `mine: v2` under" in card
    assert "somebody" not in card


@pytest.mark.parametrize(
    "row",
    [
        "| `gptq(bits=4)` | 3 | 5 | 75.0% | 4.27 |",
        "| `dense` | 1 | 1 | 25.0% | 16.00 |",
        "| Perplexity | 10 | 11.25 |",
        "| KL to the dense model, nats a token |  | 0.0625 |",
        "| Weight file, bytes | 800,000 | 360,000 |",
        "| Compression ratio |  | 2.222 |",
        "| Zeros in the compressed layers |  | 0.5 |",
        "| Stored bits a weight, compressed layers |  | 7.2 |",
        "| GFLOP a token, zeros not counted |  | 0.21 |",
        "| `own_metric` | 1 | 0.75 |",
        "| `packed` (this folder) | 800,000 | 360,000 | 2.222 |",
        "| `transformers` | 800,100 | 800,100 | 1.000 |",
        "| uniform gptq(bits=4) | 0.03 | 10.5 | 1 |",
        "| magnitude | not finite | not finite | 359,000 |",
        "Measured on 8 windows of 512 tokens of `builtin`, split `report` (fingerprint "
        "`feedfacefeedface`).",
        "revision `0123456789abcdef`",
        "seed 3",
        "made with autoprune 0.1.0, torch 2.13.0",
        "loaded again in a fresh process: perplexity 11.25 (measured before: 11.25), "
        "14 layers to the bit, log-probabilities within 0.001 nats, 360000 bytes of "
        "weights, as predicted.",
        "What loads it: autoprune.load, as a model",
        'autoprune.load("FOLDER")',
    ],
)
def test_every_figure_stands_on_the_card(row: str) -> None:
    assert row in model_card(ABOUT)


def test_what_the_target_made_of_the_actions_is_told() -> None:
    notes = ["left out blocks 0 of 3, counted from 0", "heads stay as zeros"]
    card = model_card({**ABOUT, "notes": notes})
    assert f"In the target `packed`: {notes[0]}; {notes[1]}." in card
    assert "In the target" not in model_card(ABOUT)


def test_speed_is_not_claimed() -> None:
    words = model_card(ABOUT).lower()
    assert "save neither memory nor time" in words
    assert not any(
        claim in words for claim in ("faster", "speed", "latency", "tokens/s")
    )


def test_what_is_not_known_is_left_out() -> None:
    card = model_card({"target": "packed"})
    assert "None" not in card
    assert "Rival" not in card
    assert "fresh process" not in card
    assert "\n\n\n" not in card
