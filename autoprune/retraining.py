"""The part of a run that trains its finalists, where that was asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from autoprune.conclusion import Recover
from autoprune.evaluation.scheduled import course_of
from autoprune.reporting.observer import Observer
from autoprune.searching.courses import CourseSpace, shortened
from autoprune.searching.finals import Finalist
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.recovering import PART, RecoverySearch


def check_recovery(plan: Plan) -> None:
    """Refuse what could not be carried out, before anything is searched.

    Raises:
        ConfigError: If a course trains nothing.
        PolicyError: If a schedule or a recovery is unknown.
        MethodError: If a parameter is impossible.
    """
    if asked := plan.config.recovery:
        parse = partial(course_of, plan.bench)
        for course in CourseSpace.parse(asked.schedules, parse).courses:
            shortened(course, asked.short, parse)


def recovery_of(
    plan: Plan,
    folder: Path,
    observer: Observer,
    *,
    left: Callable[[], float],
    now: Callable[[], float],
    stop: Callable[[], bool],
) -> Recover | None:
    """Give what trains the finalists of a run; None if that was not asked for.

    Args:
        plan: Of the first round.
        folder: The run folder.
        observer: Hears of stages and trials.
        left: Tells how many seconds there are for it.
        now: Gives seconds by the same clock.
        stop: Asked between trials; what is trained by then is compared.
    """
    if plan.config.recovery is None:
        return None
    asked = plan.config.recovery
    told = asked.model_dump(mode="json", include={"schedules", "short", "price"})

    def recover(finalists: Sequence[Finalist]) -> list[Finalist]:
        starts = finalists[: asked.candidates]
        fingerprint = plan.fingerprint | {"recovery": told}
        observer.stage("training finalists")
        with Ledger.open(
            folder, fingerprint, url=plan.config.ledger, part=PART
        ) as ledger:
            search = RecoverySearch(
                plan,
                ledger,
                plan.cost("fitness"),
                starts,
                left,
                now,
                observer.note,
                observer.trial,
                observer.advance,
                stop,
            )
            search.run()
            ledger.write_tables()
            observer.stage("choosing among what was trained")
            return search.best(plan.config.search.finalists)

    return recover
