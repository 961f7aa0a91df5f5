"""The model that a policy was made on, opened again for its statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoprune.compression.bank import VariantBank
from autoprune.compression.reusing import ReusingBank
from autoprune.config import TextConfig
from autoprune.errors import ModelError, PolicyError, TextError
from autoprune.evaluation.provenance import bank_of, made_for
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import Plugins

_KEYS = ("model", "task", "seed", "text", "reference", "mix")
"""What the record of a policy says of the inputs of its variants."""

ANEW = "Take statistics anew, without --statistics reuse"


@dataclass(frozen=True, eq=False)
class Origin:
    """A model whose statistics another one takes over.

    Attributes:
        bank: Its bank: the inputs that the policy's variants were made on.
        told: What says so in a record; plain data.
    """

    bank: VariantBank
    told: Mapping[str, Any]

    @classmethod
    def open(
        cls, plugins: Plugins, record: Mapping[str, Any], *, target: str
    ) -> "Origin":
        """Load the model of a policy's record, and the text of its statistics.

        Where the policy's own statistics were another model's, it is that one.

        Args:
            plugins: Where task, methods and text are looked up.
            record: What a run or an export wrote into ``policy.json``.
            target: An export target that is installed.

        Raises:
            PolicyError: If the record does not say, or the model or its text is no
                longer there, or no longer the same.
        """
        told = _told(record)
        source, revision = told["model"]["source"], told["model"]["revision"]
        split, fingerprint = told["text"]["split"], told["text"]["fingerprint"]
        try:
            bench = Workbench.open(
                plugins,
                model=source,
                task=told["task"],
                text=_text_of(told),
                target=target,
                seed=told["seed"],
            )
        except (ModelError, TextError) as error:
            raise PolicyError(
                f"the statistics of {source} cannot be reused: {error}. {ANEW}"
            ) from error
        for what, found, known in (
            ("model", bench.checkpoint.revision, revision),
            ("text", bench.splits[split].fingerprint, fingerprint),
        ):
            if found != known:
                raise PolicyError(
                    f"the statistics of {source} cannot be reused: its {what} was "
                    f"{known} when the policy was made, and is {found} now. {ANEW}"
                )
        inputs = {key: told.get(key) for key in ("reference", "mix")}
        return cls(bank_of(bench, {**record, **inputs}), told)

    def bank_for(self, bench: Workbench) -> VariantBank:
        """Give the bank of another model that takes these statistics over."""
        return ReusingBank.of(bench.bank(), self.bank)

    def record_for(self, bench: Workbench) -> dict[str, Any]:
        """Say what a policy on that other model was made with; see ``made_for``."""
        inputs = {key: self.told.get(key) for key in ("reference", "mix")}
        return made_for(bench, None) | inputs | {"statistics": dict(self.told)}


def _told(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find what a record says of the inputs of a policy's variants.

    Raises:
        PolicyError: If it does not say enough.
    """
    told = record.get("statistics") or {key: record.get(key) for key in _KEYS}
    wanted = {"model": ("source", "revision"), "text": ("split", "fingerprint")}
    for key in ("model", "task", "seed", "text"):
        found = told.get(key)
        whole = isinstance(found, Mapping) and found.keys() >= set(wanted.get(key, ()))
        if found is None or (key in wanted and not whole):
            raise PolicyError(
                "the policy does not say whose statistics could be reused: its "
                f"{key!r} is {found!r}. Give the policy.json of a run or an export. "
                f"Or t{ANEW[1:]}"
            )
    return told


def _text_of(told: Mapping[str, Any]) -> TextConfig:
    """Give the text that was measured on; its fingerprint tells what else differs."""
    text = told["text"]
    return TextConfig(
        **{key: text[key] for key in TextConfig.model_fields if key in text}
    )
