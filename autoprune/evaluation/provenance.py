"""Where a policy and its figures come from: what is written beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from autoprune.compression.bank import VariantBank
from autoprune.compression.mixed import MixedBank
from autoprune.config import TextConfig
from autoprune.evaluation.scheduled import trained_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import ONE_SHOT, Policy


@dataclass(frozen=True)
class Mix:
    """Sites whose variants were made on other inputs than those of the rest.

    Attributes:
        reference: The policy whose compressed model gave those inputs; None for dense.
        sites: Their names.
    """

    reference: Policy | None
    sites: tuple[str, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Mix | None":
        """Read it from a record; None if that has none."""
        told = record.get("mix")
        if not told:
            return None
        return cls(_reference_in(told), tuple(told["sites"]))

    def to_dict(self) -> dict[str, Any]:
        """Write it as plain data."""
        reference = self.reference.to_dict() if self.reference else None
        return {"reference": reference, "sites": list(self.sites)}


def bank_of(bench: Workbench, record: Mapping[str, Any]) -> VariantBank:
    """Open the bank that a recorded policy was measured with.

    Args:
        bench: The model.
        record: The policy with what ``made_for`` says of it.
    """
    policy = Policy.from_dict(record)
    if policy.schedule != ONE_SHOT:
        return trained_bank(bench, policy)
    bank, mix = bench.bank(_reference_in(record)), Mix.of(record)
    if mix is None:
        return bank
    sites = bench.inventory.sites_for(policy)
    layers = frozenset(la for s in sites if s.name in mix.sites for la in s.layers)
    return MixedBank.of(bank, bench.bank(mix.reference), layers)


def _reference_in(record: Mapping[str, Any]) -> Policy | None:
    told = record.get("reference")
    return Policy.from_dict(told) if told else None


def made_for(
    bench: Workbench, reference: Policy | None, mix: Mix | None = None
) -> dict[str, Any]:
    """Say what a policy was made for, and with what.

    Args:
        bench: The model it was measured on.
        reference: The policy whose compressed model gave the inputs of its variants.
        mix: The sites for which that is not so.
    """
    packages = ("autoprune", "torch", "transformers")
    return {
        "model": {
            "source": bench.checkpoint.source,
            "revision": bench.checkpoint.revision,
        },
        "task": bench.task.name,
        "reference": reference.to_dict() if reference else None,
        **({"mix": mix.to_dict()} if mix else {}),
        "versions": {name: version(name) for name in packages},
    }


def measured_on(bench: Workbench, text: TextConfig, split: str) -> dict[str, Any]:
    """Say on which text figures were measured."""
    windows = bench.splits[split]
    return text.model_dump() | {
        "split": split,
        "windows": len(windows.ids),
        "fingerprint": windows.fingerprint,
    }
