"""Foresees a run: what it will take of memory, disk and hours on a named device."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from autoprune.config import RunConfig
from autoprune.models.outline import shapes
from autoprune.planning import disk
from autoprune.planning.memory import Memory, driver_memory, worker_memory
from autoprune.planning.outlined import Outlined
from autoprune.planning.phases import Phase, phases_of, trial
from autoprune.planning.rates import Span, find_rates, total
from autoprune.planning.training import checkpoint_bytes, courses_of, trained
from autoprune.planning.work import Work
from autoprune.plugins import Plugins, load_plugins

TRIALS = 100
"""Trials that are planned where a run ends by the time and no trial is foreseen."""

ON_GPU = (
    "this version searches on processors. Hours of a GPU are those that the same "
    "operations would take there"
)


@dataclass(frozen=True, eq=False)
class Foreseen:
    """What a run will take.

    Attributes:
        model: As it was named.
        device: Whose hours these are.
        basis: Where rates come from.
        workers: Who evaluates; 0 for the driver alone.
        sites: Sites with a choice.
        variants: How many.
        trials: How many are planned.
        trial: Seconds of one.
        phases: All of the run, in seconds of one thread or one GPU.
        driver: Its memory.
        worker: Memory of each worker.
        disk: Bytes, by what they are for.
        export: Bytes of the smallest and the largest export within the budgets.
        memory_bytes: What the device has.
        notes: What a user should know.
        misfit: Why it does not fit on the device, and what does; empty if it fits.
    """

    model: str
    device: str
    basis: str
    workers: int
    sites: int
    variants: int
    trials: int
    trial: Span
    phases: tuple[Phase, ...]
    driver: Memory
    worker: Memory
    disk: Mapping[str, int]
    export: tuple[int, int]
    memory_bytes: float
    notes: tuple[str, ...]
    misfit: str = ""

    @property
    def busy(self) -> Span:
        """Seconds of all workers and the driver together."""
        return total([phase.span for phase in self.phases])

    @property
    def wall(self) -> Span:
        """Seconds until it ends: workers share the trials, the driver does the rest."""
        alone = [phase.span for phase in self.phases if not phase.shared]
        shared = total([phase.span for phase in self.phases if phase.shared])
        return total(alone) + shared * (1 / max(1, self.workers))

    @property
    def machine_bytes(self) -> float:
        """Memory of one machine that has the driver and all workers."""
        shared = max(self.driver.shared, self.worker.shared)
        return shared + self.driver.own + self.workers * self.worker.own

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data, ready for JSON."""
        both = {"busy_s": asdict(self.busy), "wall_s": asdict(self.wall)}
        about = asdict(self)
        for name, own in (("driver", self.driver), ("worker", self.worker)):
            about[name] |= {"own_bytes": own.own, "shared_bytes": own.shared}
        return about | both | {"machine_bytes": self.machine_bytes}


def foresee(
    config: RunConfig,
    device: str = "auto",
    *,
    workers: int = 0,
    export: bool = True,
    plugins: Plugins | None = None,
) -> Foreseen:
    """Foresee a run from its configuration; only the model's shape is read.

    Args:
        config: What is asked for; its model may be a size that ships, such as ``8B``.
        device: ``cpu`` or ``auto`` for this machine, a GPU such as ``h100``, or the
            path of a record.
        workers: Who evaluates beside the driver.
        export: Whether the winner is exported and verified.
        plugins: What is installed; looked up by default.

    Raises:
        ModelError: If the model is unknown.
        ProfileError: If nothing is known of the device.
        ConfigError: If the configuration is wrong or no policy meets the budgets.
    """
    rates = find_rates(device)
    plugins = plugins or load_plugins(config.plugins)
    outlined = Outlined.of(config, plugins)
    work = Work(outlined, rates)
    trials, told = _trials(work, workers, export)
    driver = driver_memory(work, workers=workers)
    worker = worker_memory(work)
    derived: Mapping[str, str] = rates.record["derived"]
    space, choices = outlined.problem.space, outlined.problem.space.choices
    found = Foreseen(
        config.model,
        rates.device,
        rates.basis,
        workers,
        sum(len(choices[site.name]) > 1 for site in space.sites),
        len(work.pairs),
        trials,
        trial(work),
        tuple(phases_of(work, trials, export=export)),
        driver,
        worker,
        {
            "variants": disk.variants_bytes(outlined, derived),
            "finalists solved anew": disk.anew_bytes(outlined),
            "teachers": disk.teachers_bytes(outlined, rates.compute),
            "ledger": disk.ledger_bytes(outlined, trials),
            "checkpoints": checkpoint_bytes(outlined),
            "export": disk.export_bytes(outlined)[1] if export else 0,
        },
        disk.export_bytes(outlined),
        rates.memory_bytes,
        (*told, *_notes(work)),
    )
    return _with_misfit(found)


def _trials(work: Work, workers: int, export: bool) -> tuple[int, list[str]]:
    """Tell how many trials there will be: as asked for, or as fit into the time."""
    search = work.outlined.config.search
    rounds = search.rounds
    if search.trials is not None:
        return search.trials * rounds, []
    if search.budget is None:
        note = f"the run ends at a time of day: {TRIALS} trials are planned for"
        return TRIALS, [note]
    fixed = total([phase.span for phase in phases_of(work, 0, export=export)]).middle
    each = trial(work).middle / max(1, workers)
    count = math.floor((search.budget - fixed) / each)
    if count < 1:
        return 1, [
            f"the budget of {search.budget / 3600:.3g} h ends before the first trial: "
            f"what is beside trials takes about {fixed / 3600:.3g} h by itself"
        ]
    return count, [f"{count} trials are what fits into {search.budget / 3600:.3g} h"]


def _notes(work: Work) -> list[str]:
    """Say what a user should know."""
    outlined = work.outlined
    notes = list(outlined.bench.inventory.notes)
    if work.rates.sheet is not None:
        notes.append(ON_GPU)
    if unknown := work.unknown():
        notes.append(
            f"never recorded: {', '.join(unknown)}; taken to be as slow as the slowest"
        )
    needed = disk.variants_bytes(outlined, {})
    cap = outlined.bench.store.cap_bytes
    if needed > cap:
        notes.append(
            f"the variants take {needed / 1e9:.1f} GB, the cap of the store is "
            f"{cap / 1e9:.1f} GB: raise it with search: {{disk: ...}} or "
            "AUTOPRUNE_STORE_GB, or the run is refused"
        )
    if outlined.config.prefilter:
        notes.append("prefilter leaves choices out: it will take less than told here")
    if courses := courses_of(outlined):
        tokens = [course.tokens for course in courses]
        each = trained(work, max(tokens)).middle / 3600
        notes.append(
            f"{len(courses)} courses of {min(tokens)} to {max(tokens)} tokens may be "
            f"trained, the longest for about {each:.2g} h; all in short, the best "
            "third in full"
        )
    return notes


def _with_misfit(found: Foreseen) -> Foreseen:
    """Say what of a run fits where not all of it does."""
    has = found.memory_bytes
    alone = found.driver.shared + found.driver.own
    if alone > has:
        machines = math.ceil(alone / has)
        why = (
            f"{found.model} needs {alone / 1e9:.1f} GB in one process, and "
            f"{found.device} has {has / 1e9:.1f} GB: nothing of it runs there. It "
            f"would take the memory of {machines} such machines in one, as a model is "
            f"not divided; {_smaller(found)}"
        )
        return replace(found, misfit=why)
    if found.machine_bytes <= has:
        return found
    spare = has - found.driver.shared - found.driver.own
    fit = int(max(0.0, spare) // found.worker.own)
    elsewhere = max(1, int((has - found.worker.shared) // found.worker.own))
    machines = 1 + math.ceil((found.workers - fit) / elsewhere)
    why = (
        f"{found.workers} workers and the driver need {found.machine_bytes / 1e9:.1f} "
        f"GB, and {found.device} has {has / 1e9:.1f} GB: {fit} fit beside the driver. "
        f"All of them take {machines} such machines, with --engine ray"
    )
    return replace(found, misfit=why)


def _smaller(found: Foreseen) -> str:
    """Say what fits, of the sizes that ship."""
    own = found.driver.model
    share = found.memory_bytes / (found.driver.shared + found.driver.own)
    return (
        f"about {share * own / 2e9:.2g} billion weights fit. Sizes that can be planned "
        f"for: {', '.join(shapes())}"
    )
