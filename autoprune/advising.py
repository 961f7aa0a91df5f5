"""What each format would gain on a device, layer by layer, before anything is made."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autoprune.compression.storage import Storage
from autoprune.compression.structured import kept_units
from autoprune.evaluation.anatomy import Anatomy
from autoprune.evaluation.timed import notes_on, read_workloads
from autoprune.latency.device import Device
from autoprune.latency.estimate import Estimate, Ratio, Term, compare
from autoprune.latency.opening import open_device
from autoprune.latency.shape import Linear, ModelShape
from autoprune.latency.workload import Workload
from autoprune.models.layers import inventory
from autoprune.models.outline import outline
from autoprune.models.task import output_layer
from autoprune.plugins import load_plugins

FORMATS = (
    "2:4",
    "int8",
    "fp8-row",
    "int4-g64",
    "2:4+int8",
    "2:4+fp8-row",
    "2:4+int4-g64",
)
"""What is asked for by default."""

UNSTRUCTURED, NARROW, SHALLOW = "50 % zeros", "half the MLP", "half the blocks"
"""What is told for the model as a whole beside formats."""

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True)
class Gain:
    """What one change would gain in one phase of a workload.

    Attributes:
        where: Role of the layers and their shape, or ``whole model``.
        count: How many such layers there are.
        workload: Name of the workload.
        phase: ``prefill``, ``decode`` (one step), or ``total``.
        change: The format, or what is removed.
        ratio: Time over the dense time.
        low: Lower end of the interval that holds it in 80 of 100 cases.
        high: Upper end.
        verdict: ``pays``, ``cannot be told``, ``does not pay`` or ``no kernel``.
        tier: How the worst-known part of it is known.
    """

    where: str
    count: int
    workload: str
    phase: str
    change: str
    ratio: float
    low: float
    high: float
    verdict: str
    tier: str


@dataclass(frozen=True, eq=False)
class Advice:
    """What was found for a model on a device.

    Attributes:
        model: The model, as it was named.
        device: Name of the device.
        basis: What times come from.
        notes: What a user should know.
        dense_ms: Milliseconds of the dense model, by workload.
        gains: Layer by layer, then for the whole model.
    """

    model: str
    device: str
    basis: str
    notes: tuple[str, ...]
    dense_ms: dict[str, float]
    gains: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data, ready for JSON."""
        return asdict(self)


def advise(
    model: str,
    device: str = "auto",
    *,
    workloads: Sequence[str] = ("decode", "serve", "prefill"),
    formats: Sequence[str] = FORMATS,
) -> Advice:
    """Tell what formats would gain on a device; only the configuration is read.

    Args:
        model: Folder, ``config.json``, GGUF file, hub id, or ``demo``.
        device: A GPU such as ``h100``, ``cpu``, ``auto``, or a profile.
        workloads: Names of workloads.
        formats: See ``latency.shape.Linear``.

    Raises:
        ModelError: If the model is unknown.
        ProfileError: If nothing is known of the device, or of a workload's type on it.
        ConfigError: If a workload is unknown.
    """
    plugins = load_plugins()
    opened = open_device(device, plugins.objects["latency_backends"].values())
    asked = read_workloads(workloads, opened)
    anatomy = anatomy_of(model)
    shape = _narrowed(anatomy, 1.0)
    others = {
        UNSTRUCTURED: shape,  # no kernel skips them
        NARROW: _narrowed(anatomy, 0.5),
        SHALLOW: replace(shape, blocks=shape.blocks[: len(shape.blocks) // 2]),
    }
    others = {form: shape.in_format(form) for form in formats} | others
    dense_ms, gains = {}, list[Gain]()
    for work in asked:
        dense = opened.predictor.forecast(shape, work)
        dense_ms[work.name] = dense.total.ms
        for name, count, linear in _distinct(shape):
            gains += _layer_gains(opened, work, name, count, linear, formats)
        gains += _model_gains(opened, work, shape, others)
    notes = tuple(notes_on(opened))
    return Advice(model, opened.name, opened.basis, notes, dense_ms, tuple(gains))


def anatomy_of(model: str) -> Anatomy:
    """Tell what time depends on in a model, from its configuration.

    Raises:
        ModelError: If the model is unknown.
    """
    empty = outline(model)
    described = list(load_plugins().objects["architectures"].values())
    vocabulary = output_layer(empty).weight.shape[0]
    found = inventory(empty, described)
    return Anatomy.of(empty.config, found, vocabulary=vocabulary)


def _narrowed(anatomy: Anatomy, keep: float) -> ModelShape:
    """Give the shape of the model with a part of the channels of every MLP."""
    storages = {}
    for layer in anatomy.inventory.layers:
        stored, cut = Storage.dense(layer), layer.cut
        if keep < 1 and cut is not None and cut.kind == "channels":
            units = kept_units(cut, keep)
            stored = replace(stored, kept=layer.numel // cut.units * units, units=units)
        storages[layer] = stored
    return anatomy.shape(storages)


def _distinct(shape: ModelShape) -> Iterator[tuple[str, int, Linear]]:
    """Give the different layers of the blocks: role and shape, how many, and one."""
    found: dict[str, list[Linear]] = {}
    for block in shape.blocks:
        for linear in block.linears:
            role = linear.name.rpartition(".")[2]
            found.setdefault(f"{role} {linear.n} x {linear.k}", []).append(linear)
    for name, linears in found.items():
        yield name, len(linears), linears[0]


def _layer_gains(
    device: Device,
    work: Workload,
    where: str,
    count: int,
    linear: Linear,
    formats: Sequence[str],
) -> Iterator[Gain]:
    for phase, new in ((PREFILL, work.prompt), (DECODE, 1)):

        def time(form: str, tokens: int = work.batch * new) -> Term:
            one = replace(linear, format=form)
            return device.predictor.linear(one, tokens, work.dtype)

        dense = Estimate({time(linear.format): 1.0})
        for form in formats:
            changed = Estimate({time(form): 1.0})
            ratio = compare(changed, dense)
            missing = f"no kernel for {form} "
            without = any(told.startswith(missing) for told in changed.warnings)
            yield _gain(where, count, work, phase, form, ratio, changed, without)


def _model_gains(
    device: Device, work: Workload, shape: ModelShape, others: Mapping[str, ModelShape]
) -> Iterator[Gain]:
    dense = device.predictor.forecast(shape, work)
    for name, other in others.items():
        found = device.predictor.forecast(other, work)
        ratio, whole = found.over(dense), found.total
        without = any(
            told.startswith(f"no kernel for {name} ") for told in whole.warnings
        )
        yield _gain("whole model", 1, work, "total", name, ratio, whole, without)


def _gain(
    where: str,
    count: int,
    work: Workload,
    phase: str,
    change: str,
    ratio: Ratio,
    found: Estimate,
    without: bool,
) -> Gain:
    verdict = "pays" if ratio.high < 1 else "does not pay"
    if ratio.low < 1 <= ratio.high and ratio.value != 1:
        verdict = "cannot be told"
    if without:
        verdict = "no kernel"
    sizes = ratio.value, ratio.low, ratio.high
    tier = str(found.tier)
    return Gain(where, count, work.name, phase, change, *sizes, verdict, tier)
