"""What the benchmark of methods measures: every method in its settings, a cell each.

``covered`` checks that no registered method is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from autoprune.compression.method import CompressionMethod
from autoprune.models.statistics import STATISTICS
from autoprune.policy import Action

LEVELS = {"50": "sparsity=0.5", "2-4": "pattern=2:4", "70": "sparsity=0.7"}
BITS = (8, 4, 3)

ALL, MLP, HEADS = "blocks.*", "blocks.*.mlp", "blocks.*.attention"
WEIGHTS = ("blocks.*.qkv", "blocks.*.o")
"""The matrices of attentions: narrow enough for methods that go weight by weight."""

SPARE_BLOCKS = 8
"""Blocks of 30 that are left out: what is nearest to 25 %, rounded up."""


@dataclass(frozen=True)
class Setting:
    """One cell: actions for all blocks.

    Attributes:
        name: Of the cell.
        rules: Globs over sites, each with its action; sites of none stay dense.
        drop: ``similar`` or ``spaced`` to leave out blocks instead; see ``measured``.
    """

    name: str
    rules: Mapping[str, str] = field(default_factory=dict)
    drop: str | None = None

    @property
    def methods(self) -> set[str]:
        """Names of the methods that it takes."""
        if self.drop:
            return {"drop"}
        actions = [Action.parse(text) for text in self.rules.values()]
        return {step.method for action in actions for step in action.steps}


def settings() -> list[Setting]:
    """List every cell."""
    return [*_pruning(), *_quantizing(), *_structured(), *_joint(), *_low_rank()]


def covered(methods: Mapping[str, CompressionMethod]) -> list[Setting]:
    """List the cells whose methods there are, cheap ones first.

    Raises:
        LookupError: If a registered method stands in no setting.
    """
    every = settings()
    used = set().union(*(one.methods for one in every))
    if left_out := sorted(methods.keys() - used):
        raise LookupError(
            f"{len(left_out)} registered methods have no setting: "
            f"{', '.join(left_out)}. Add them to results/methods/settings.py."
        )
    found = [one for one in every if one.methods <= methods.keys()]
    return sorted(found, key=lambda one: cpu_seconds(one, methods))


def cpu_seconds(setting: Setting, methods: Mapping[str, CompressionMethod]) -> float:
    """Foresee the CPU seconds of a cell, for the order and for ``--list``.

    Measuring alone, with the inputs that are passed on, and what the solvers add.
    """
    seconds = EVALUATION
    needs: set[str] = set()
    for name in setting.methods:
        needs |= methods[name].needs
        seconds += SOLVERS.get(name, 2.0)
    whole = any(methods[name].kinds for name in setting.methods)
    if whole or needs & STATISTICS:
        seconds += PASSES
    backward = 0.0 if needs <= STATISTICS else BACKWARD
    return seconds + backward + (HESSIANS if "hessian" in needs else 0.0)


EVALUATION, PASSES, HESSIANS, BACKWARD = 16.0, 36.0, 15.0, 60.0
SOLVERS = {
    "admm": 60.0,
    "activation_svd": 60.0,
    "alps": 300.0,
    "awq": 60.0,
    "dsnot": 20.0,
    "eora": 60.0,
    "gptq": 20.0,
    "hqq": 20.0,
    "obc": 800.0,
    "slim_lora": 40.0,
    "sparsegpt": 20.0,
    "svd": 40.0,
    "ziplm": 60.0,
}
"""CPU seconds on one core of an AMD EPYC with AVX-512; guessed where not measured."""


def _everywhere(name: str, action: str) -> Setting:
    return Setting(name, {ALL: action})


def _pruning() -> Iterator[Setting]:
    one_by_one = "random magnitude wanda ria obd sparsegpt admm alps".split()
    gradients = "synflow gradient taylor fisher gblm grasp".split()
    for level, how in LEVELS.items():
        for method in [*one_by_one, *gradients]:
            yield _everywhere(f"{method}-{level}", f"{method}({how})")
        for first in ("magnitude", "wanda"):
            yield _everywhere(f"{first}-dsnot-{level}", f"{first}({how}) + dsnot")
    for level in ("50", "70"):
        how = LEVELS[level]
        yield _everywhere(f"magnitude-layer-{level}", f"magnitude({how}, per=layer)")
        yield _everywhere(f"wanda-layer-{level}", f"wanda({how}, per=layer)")
        yield _everywhere(f"ria-row-{level}", f"ria({how}, per=row)")
    for method in ("magnitude", "wanda", "sparsegpt"):
        yield _everywhere(f"{method}-4-8", f"{method}(pattern=4:8)")
    for method in ("magnitude", "wanda"):
        yield _everywhere(f"{method}-1x8-50", f"{method}(sparsity=0.5, tile=1x8)")
    for method in ("magnitude", "wanda", "sparsegpt", "obc"):
        for level in ("50", "2-4"):
            action = f"{method}({LEVELS[level]})"
            yield Setting(f"{method}-attention-{level}", dict.fromkeys(WEIGHTS, action))


def _quantizing() -> Iterator[Setting]:
    for bits in BITS:
        for method in ("rtn", "hqq", "slim_quant", "smoothquant", "awq", "gptq"):
            action = f"{method}(bits={bits}, group=64)"
            yield _everywhere(f"{method}-{bits}bit", action)
        action = f"rtn(bits={bits}, group=64, symmetric=true)"
        yield _everywhere(f"rtn-symmetric-{bits}bit", action)
        action = f"gptq(bits={bits}, group=64, act_order=false)"
        yield _everywhere(f"gptq-in-order-{bits}bit", action)
    for method in ("int8_dynamic", "fp8"):
        yield _everywhere(f"{method}-8bit", method)
    for method in ("nf4", "mxfp4", "nvfp4"):
        yield _everywhere(f"{method}-4bit", method)


def _structured() -> Iterator[Setting]:
    """A quarter of the channels; one of the three groups of heads, as fewer is none."""
    for method in ("channels", "taylor_channels", "flap", "ziplm"):
        yield Setting(f"{method}-mlp-25", {MLP: f"{method}(keep=0.75)"})
    action = "channels(keep=0.75, score=magnitude)"
    yield Setting("channels-magnitude-mlp-25", {MLP: action})
    for method in ("heads", "taylor_heads", "flap", "ziplm"):
        yield Setting(f"{method}-heads-33", {HEADS: f"{method}(keep=0.67)"})
    action = "heads(keep=0.67, score=magnitude)"
    yield Setting("heads-magnitude-heads-33", {HEADS: action})
    yield Setting("slicegpt-hidden-25", {"hidden": "slicegpt(keep=0.75)"})
    yield Setting("drop-similar-25", drop="similar")
    yield Setting("drop-spaced-25", drop="spaced")


def _joint() -> Iterator[Setting]:
    """2:4 and 4 bits, 3.3 stored bits a weight as ``gptq-3bit`` has; then 4.1 bits."""
    four = "bits=4, group=64"
    for name, action in {
        "magnitude-rtn": f"magnitude(pattern=2:4) + rtn({four})",
        "wanda-rtn": f"wanda(pattern=2:4) + rtn({four})",
        "wanda-gptq": f"wanda(pattern=2:4) + gptq({four})",
        "sparsegpt-rtn": f"sparsegpt(pattern=2:4) + rtn({four})",
        "sparsegpt-gptq": f"sparsegpt(pattern=2:4) + gptq({four})",
        "sparsegpt-at-once": f"sparsegpt(pattern=2:4, {four})",
    }.items():
        yield _everywhere(f"{name}-joint-3.3", action)
    for name, action in {
        "obc-at-once": f"obc(pattern=2:4, {four})",
        "sparsegpt-at-once": f"sparsegpt(pattern=2:4, {four})",
        "obc-gptq": f"obc(pattern=2:4) + gptq({four})",
    }.items():
        rules = dict.fromkeys(WEIGHTS, action)
        yield Setting(f"{name}-attention-joint-3.3", rules)
    for name, action in {
        "jsq": "jsq(pattern=2:4)",
        "wanda-smoothquant": "wanda(pattern=2:4) + smoothquant",
        "sparsegpt-smoothquant": "sparsegpt(pattern=2:4) + smoothquant",
    }.items():
        yield _everywhere(f"{name}-joint-8bit", action)
    # A twentieth of 16 bits for factors, or as much for finer codes.
    for first in ("rtn", "gptq"):
        yield _everywhere(f"{first}-4.1", f"{first}(bits=4, group=192)")
        for second in ("slim_lora", "eora"):
            action = f"{first}(bits=3, group=64) + {second}(size=0.05)"
            yield _everywhere(f"{first}-{second}-4.1", action)
    for first in ("rtn", "slim_quant"):
        for second in ("slim_lora", "eora"):
            action = f"wanda(pattern=2:4) + {first}({four}) + {second}(size=0.05)"
            yield _everywhere(f"wanda-{first}-{second}-4.1", action)


def _low_rank() -> Iterator[Setting]:
    for size in (75, 50):
        for method in ("svd", "activation_svd"):
            yield _everywhere(f"{method}-{size}", f"{method}(size=0.{size})")
