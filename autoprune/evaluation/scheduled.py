"""Policies with a schedule: the banks of what they are after it."""

from autoprune.compression.bank import VariantBank
from autoprune.errors import ConfigError
from autoprune.evaluation.workbench import Workbench
from autoprune.models.recovery_text import RECOVERY
from autoprune.policy import ONE_SHOT, Policy
from autoprune.training.course import Course
from autoprune.training.trained_bank import TrainedBank


def course_of(bench: Workbench, schedule: str) -> Course:
    """Read a schedule with its recoveries; see ``Course.parse``."""
    return Course.parse(schedule, bench.schedules, bench.recoveries)


def own_bank(bench: Workbench, policy: Policy) -> VariantBank:
    """Open the bank of a policy by itself: after its schedule, on its own inputs."""
    is_plain = policy.schedule == ONE_SHOT
    return bench.bank(policy) if is_plain else trained_bank(bench, policy)


def trained_bank(bench: Workbench, policy: Policy) -> VariantBank:
    """Open the bank of a policy after its schedule.

    Raises:
        PolicyError: If the schedule is unknown.
        MethodError: If a parameter of it is impossible.
        ConfigError: If it trains, but no text is set aside for that.
    """
    course = course_of(bench, policy.schedule)
    if course.recoveries and RECOVERY not in bench.splits:
        raise ConfigError(
            f"the schedule {course.text} trains, but no text is set aside for it. Give "
            "windows to text.recovery"
        )
    return TrainedBank.of(
        bench.bank(),
        bench.per_layer(policy),
        course,
        task=bench.task,
        tokenizer=bench.tokenizer,
        windows=bench.splits.get(RECOVERY, bench.splits["statistics"]),
    )
