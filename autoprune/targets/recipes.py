"""Policies told to other tools: what each layer asks for, in words that all share.

A tool's own words, and what it cannot say, are in ``recipe_tools``.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from autoprune.compression.storage import Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import in_order
from autoprune.models.layers import Inventory
from autoprune.policy import DENSE, Action, Layer

DIGITS = 6
"""Decimals of a sparsity."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to one layer.

    Attributes:
        pruner: Name of the algorithm that removes weights; None if none does.
        sparsity: Fraction of weights that are removed.
        pattern: ``N:M``, N of M consecutive weights kept; None for any pattern.
        quantizer: Name of the algorithm that rounds; None if none does.
        bits: Of a code; None without a quantizer.
        group: Weights of a row that share a scale; None for a whole row.
        symmetric: True if there are no zero points.
        code: What codes mean; see ``compression.formats``.
    """

    pruner: str | None = None
    sparsity: float = 0.0
    pattern: str | None = None
    quantizer: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool = True
    code: str = "int"

    @property
    def numbers(self) -> "Treatment":
        """The same without names of algorithms, which tools have their own for."""
        return replace(self, pruner=None, quantizer=None)


Treatments = dict[str, Treatment]
"""By names of layers; layers that stay dense are left out."""

LeftOut = dict[str, str]
"""Reason by the name of a layer that cannot be told."""


@dataclass(frozen=True, slots=True)
class Modules:
    """What tools meet in a model.

    Attributes:
        shapes: ``(out, in)`` of every linear module by its name, an untied head's too.
        smoothed: Modules whose outputs may be scaled, each with all the layers that
            read them.
    """

    shapes: Mapping[str, tuple[int, int]]
    smoothed: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, inventory: Inventory) -> "Modules":
        """Look at a model; only Llama's kind is known to be smoothed."""
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        if inventory.hidden is None:
            return cls(shapes)
        smoothed = list(inventory.hidden.readers)
        for group in inventory.groups:
            if group.kind in ("heads", "channels"):
                maker, taker = group.layers[-2:]  # of values, or beside the gate
                if maker.shape[0] == taker.shape[1]:
                    smoothed.append((maker.name, (taker.name,)))
        return cls(shapes, tuple(smoothed))


def asked_for(
    storages: Mapping[Layer, Storage],
    actions: Mapping[Layer, Action],
    modules: Modules | None = None,
) -> tuple[Treatments, LeftOut]:
    """Tell what a policy asks for, layer by layer, in the model's order.

    Args:
        storages: What every layer stores.
        actions: What was done to it; the first step is taken for the one that prunes,
            the last for the one that rounds.
        modules: What tools meet in the model; None for all layers.

    Returns:
        The treatments, and the layers that no tool can be told of.
    """
    treatments: Treatments = {}
    left: LeftOut = {}
    for layer in in_order(storages):
        storage = storages[layer]
        if storage == Storage.dense(layer):
            continue
        found = _treatment(storage, actions.get(layer, DENSE))
        if modules is not None and layer.name not in modules.shapes:
            found = "it is no linear module of its own, which is what tools look for"
        if isinstance(found, str):
            left[layer.name] = found
        else:
            treatments[layer.name] = found
    return treatments, left


def _treatment(storage: Storage, action: Action) -> Treatment | str:
    """Tell what one layer asks for, or why it cannot be told."""
    if storage.hidden is not None:
        return "the hidden state would have to be rotated"
    if storage.low_rank is not None:
        return "factors of low rank cannot be told"
    if storage.units is not None or not storage.kept:
        return (
            "what was removed are units of the model: cut it first, as the target "
            "transformers or per-layer does"
        )
    if storage.permuted:
        return "its pattern follows another order of columns"
    if storage.bias:
        return "a bias that is added cannot be told"
    names = [step.method for step in action.steps] or ["unknown"]
    found = Treatment()
    if storage.mask is not None:
        pattern = storage.mask if ":" in storage.mask else None
        if pattern is None and storage.mask != "bitmap":
            return f"tiles of {storage.mask} cannot be told"
        sparsity = round(storage.sparsity, DIGITS)
        found = Treatment(names[0], sparsity, pattern)
    if storage.bits is None:
        return found
    return replace(
        found,
        quantizer=names[-1],
        bits=storage.bits,
        group=storage.group,
        symmetric=storage.symmetric,
        code=storage.code,
    )


class RecipeTool(ABC):
    """A tool that applies a policy by itself, from a file.

    Attributes:
        name: What people call it.
        file: Name of its file.
    """

    name: ClassVar[str]
    file: ClassVar[str]

    def plan(
        self, treatments: Mapping[str, Treatment], modules: Modules
    ) -> tuple[Treatments, LeftOut]:
        """Tell each layer in the tool's words: its algorithms, or why it cannot."""
        planned: Treatments = {}
        left: LeftOut = {}
        for name, treatment in treatments.items():
            found = self.translate(treatment, modules.shapes[name])
            if isinstance(found, str):
                left[name] = found
            else:
                planned[name] = found
        return planned, left

    @abstractmethod
    def translate(
        self, treatment: Treatment, shape: tuple[int, int]
    ) -> Treatment | str:
        """Give a treatment with the tool's own algorithms, or say why it has none."""

    @abstractmethod
    def text(self, planned: Mapping[str, Treatment], modules: Modules) -> str:
        """Write the file.

        Args:
            planned: The layers as ``plan`` gives them; all others stay as they are.
            modules: What the tool meets in the model.
        """

    @abstractmethod
    def parse(self, text: str) -> Treatments:
        """Read the file again; any exception if it is not what ``text`` writes."""

    def stand_ins(
        self, treatments: Mapping[str, Treatment], planned: Mapping[str, Treatment]
    ) -> Iterator[str]:
        """Tell which algorithms take the place of others that the tool lacks."""
        pairs: dict[tuple[str, str], int] = {}
        for name, mine in planned.items():
            asked = treatments[name]
            for old, new in (
                (asked.pruner, mine.pruner),
                (asked.quantizer, mine.quantizer),
            ):
                if old and new and new not in self.own(old):
                    pairs[old, new] = pairs.get((old, new), 0) + 1
        for (old, new), count in pairs.items():
            yield f"{self.file}: {new} stands in for {old} in {count} layers"

    @abstractmethod
    def own(self, method: str) -> Collection[str]:
        """Give the tool's names for a method of AutoPrune; none if it lacks it."""


def told_left_out(file: str, left: Mapping[str, str]) -> Iterator[str]:
    """Tell which layers a file leaves out, reason by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{file} leaves out {names[0]}{more}: {reason}"


def compare(tool: RecipeTool, folder: Path, wanted: Mapping[str, Treatment]) -> None:
    """Hold that a file says what a policy asks for, layer by layer.

    Raises:
        ExportError: If it does not; names the first layer, and both.
    """
    file = folder / tool.file
    try:
        found: Mapping[str, Any] = tool.parse(file.read_text(encoding="utf-8"))
    except Exception as error:  # whatever a person's hand has left there
        raise ExportError(
            f"{file} cannot be read: {type(error).__name__}: {error}. Export the "
            "policy again"
        ) from error
    names = sorted(wanted.keys() | found.keys())
    if odd := [name for name in names if wanted.get(name) != found.get(name)]:
        raise ExportError(
            f"{file} is not what the policy asks for in {len(odd)} layers; first "
            f"{odd[0]!r}: {found.get(odd[0])}, expected {wanted.get(odd[0])}. Export "
            "the policy again"
        )
