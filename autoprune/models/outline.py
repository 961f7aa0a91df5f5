"""A model without its weights: enough to know its layers, whatever its size."""

from functools import cache as remembered
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, PreTrainedModel

from autoprune.errors import ModelError
from autoprune.models.checkpoints import DEMO, resolve
from autoprune.models.loading import first_line, quiet


def outline(
    source: str, auto_class: str = "AutoModelForCausalLM", *, cache: Path | None = None
) -> PreTrainedModel:
    """Build a model on no device at all, from its configuration alone.

    Args:
        source: A folder with a ``config.json``, that file, a GGUF file, ``demo``, the
            id of a model on the hub, of which only the configuration is fetched, or the
            name of a shape that ships, such as ``8B``.
        auto_class: Name of the class of transformers.
        cache: Where converted models are kept; the user's by default.

    Raises:
        ModelError: If there is no such model, or its class is not known.
    """
    path = Path(source).expanduser()
    known = shapes() if not path.exists() else {}
    named = source == DEMO or path.suffix == ".gguf"
    place = str(resolve(source, cache=cache).folder) if named else str(path)
    if not named and not path.exists():
        place = source  # the id of a model on the hub, or a mistake
    try:
        with quiet(), torch.device("meta"):
            if source in known:
                shape = known[source]["config"]
                config = AutoConfig.for_model(**shape, dtype="bfloat16")
            else:
                config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            model = getattr(transformers, auto_class).from_config(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"cannot make out the model {source!r}: {first_line(error)}. Name a folder "
            "with a config.json, a GGUF file, a hub id, 'demo', or a size: "
            f"{', '.join(shapes())}"
        ) from error
    made: PreTrainedModel = model
    return made


@remembered
def shapes() -> dict[str, dict[str, Any]]:
    """Read the shapes that ship, by name: what configurations of the hub say."""
    text = files("autoprune.models").joinpath("shapes.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found
