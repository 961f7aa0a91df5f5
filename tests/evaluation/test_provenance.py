"""What is written beside a policy: where it and its figures come from."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_runs import WINDOW, write_text

from autoprune.config import TextConfig
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    source = write_text(tmp_path_factory.mktemp("text"))
    return TextConfig(
        source=source, window=WINDOW, statistics=3, fitness=2, choice=2, report=4
    )


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Path, text: TextConfig) -> Workbench:
    return Workbench.open(
        load_plugins(),
        model=str(tiny_checkpoint),
        task="causal-lm",
        text=text,
        target="packed",
        seed=0,
    )


def test_a_policy_tells_its_model_and_versions(
    bench: Workbench, tiny_checkpoint: Path
) -> None:
    told = made_for(bench, None)
    assert told == {
        "model": {
            "source": str(tiny_checkpoint),
            "revision": bench.checkpoint.revision,
        },
        "task": "causal-lm",
        "reference": None,
        "versions": {
            name: version(name) for name in ("autoprune", "torch", "transformers")
        },
    }


def test_the_reference_can_be_read_again(bench: Workbench) -> None:
    reference = Policy.uniform(bench.inventory.sites, Action.parse("rtn(bits=4)"))
    told = json.loads(json.dumps(made_for(bench, reference)))
    assert Policy.from_dict(told["reference"]) == reference


def test_figures_tell_their_text(bench: Workbench, text: TextConfig) -> None:
    told = measured_on(bench, text, "report")
    assert told["source"] == text.source
    assert told["window"] == WINDOW
    assert (told["split"], told["windows"]) == ("report", 4)
    assert told["fingerprint"] == bench.splits["report"].fingerprint
    other = measured_on(bench, text, "fitness")
    assert other["windows"] == 2
    assert other["fingerprint"] != told["fingerprint"]


def test_windows_are_those_that_there_were(
    tiny_checkpoint: Path, text: TextConfig
) -> None:
    """Not those asked for, where the text is short."""
    many = dict.fromkeys(("statistics", "fitness", "choice", "report"), 1_000)
    asked = text.model_copy(update=many)
    bench = Workbench.open(
        load_plugins(),
        model=str(tiny_checkpoint),
        task="causal-lm",
        text=asked,
        target="packed",
        seed=0,
    )
    told = measured_on(bench, asked, "report")
    assert told["report"] == 1_000
    assert told["windows"] == len(bench.splits["report"].ids) < 1_000
