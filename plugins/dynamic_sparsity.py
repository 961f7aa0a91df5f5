"""Recoveries that move masks while they train, with as many zeros as the policy wants.

Only zeros whose places are free move: those of single weights and of ``N:M`` groups.
Masks of units, tiles and experts stay as they are.
"""

from collections.abc import Mapping
from typing import ClassVar

from autoprune.compression.method import Parameter, Settings
from autoprune.errors import ConfigError
from autoprune.hookspecs import hookimpl
from autoprune.training.goals import Goal
from autoprune.training.mask_rules import DropAndGrow, StraightThrough
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MovingMasks
from autoprune.training.ramps import RAMPS, Ramp
from autoprune.training.recovery import Pupil, RecoveryMethod
from autoprune.training.whole_model import OF_DENSE, TRAINING, WholeModelRecovery

_INTERVAL = Parameter("interval", int, 10, "Steps between two changes.", 1, 10**9)
_STOP = Parameter(
    "stop", float, 0.75, "Share of the steps after which masks stay.", 0, 1
)


class SetRecovery(WholeModelRecovery):
    """Drop the smallest weights of each layer, and let as many random ones grow."""

    name = "set"
    reference = "Mocanu et al. 2018, arXiv:1707.04780, Alg. 1"
    growth: ClassVar[str] = "random"
    checkpoint_bytes = 26.0  # a mask more, also twice
    parameters = (
        *TRAINING,
        *OF_DENSE,
        _INTERVAL,
        _STOP,
        Parameter("fraction", float, 0.3, "Of the weights, dropped at first.", 0, 1),
    )

    def masks(
        self, pupil: Pupil, settings: Settings, steps: int
    ) -> FrozenMasks | MovingMasks:
        """Move the masks of layers whose zeros may be anywhere."""
        if not pupil.storages:  # nothing is pruned yet, as late in its first phase
            return pupil.masks
        goals = {n: one for n, one in pupil.weight_goals.items() if one.pattern is None}
        rule = DropAndGrow(
            steps,
            interval=settings["interval"],
            fraction=settings["fraction"],
            growth=self.growth,
            stop=settings["stop"],
            seed=settings["seed"],
        )
        return MovingMasks(pupil.masks, rule, _some(goals, self, pupil))


class RigL(SetRecovery):
    """Drop the smallest weights of each layer; those of largest gradients grow."""

    name = "rigl"
    reference = "Evci et al. 2020, arXiv:1911.11134, Alg. 1"
    growth = "gradient"


class StraightThroughRecovery(WholeModelRecovery):
    """Train what is pruned on, unseen by the model; the largest weights come back.

    Where nothing is pruned yet, as in ``during``, zeros grow in number along a ramp. A
    weight that a method has pruned before begins to learn at zero, so that after few
    steps hardly any comes back. How we differ: the optimizer is AdamW, not SGD.
    """

    name = "sr-ste"
    reference = "Zhou et al. 2021, arXiv:2102.04010"
    prunes = True
    checkpoint_bytes = 34.0  # a shadow and a mask more, also twice
    parameters = (
        *TRAINING,
        *OF_DENSE,
        _INTERVAL,
        _STOP,
        Parameter("pull", float, 2e-4, "Of pruned weights to zero.", 0, 1e6),
        Parameter("ramp", str, "cubic", "How zeros grow in number.", choices=RAMPS),
        Parameter("end", float, 0.5, "Share of the steps at its end.", 0, 0.9),
    )

    def masks(
        self, pupil: Pupil, settings: Settings, steps: int
    ) -> FrozenMasks | MovingMasks:
        """Move the masks, at their goal at once or along a ramp."""
        if not pupil.storages:
            return pupil.masks
        goals = _some(pupil.weight_goals, self, pupil)
        pruned = pupil.masks.pruned
        interval = settings["interval"]
        ramp = Ramp("constant", 0.0, 1.0)
        if not any(pruned[name] for name in goals):
            if settings["patience"]:
                raise ConfigError(
                    f"{self.name} prunes on the way, so that its training may not stop "
                    f"before the end, found patience {settings['patience']}. Leave it "
                    "out, or prune first, as in one-shot."
                )
            end = round(settings["end"] * (steps - 1))
            ramp = Ramp(settings["ramp"], 0.0, 1.0, 0, end, interval)
        rule = StraightThrough(
            goals, ramp, interval, settings["stop"] * steps, settings["pull"]
        )
        return MovingMasks(pupil.masks, rule, goals)


def _some(
    goals: Mapping[str, Goal], whose: RecoveryMethod, pupil: Pupil
) -> Mapping[str, Goal]:
    """See that there are masks that may move, of all layers if they are to be made.

    Raises:
        ConfigError: If not.
    """
    made = sum(pupil.masks.pruned.values())
    if goals and (made or len(goals) == len(pupil.layers)):
        return goals
    raise ConfigError(
        f"{whose.name} {'moves' if made else 'makes'} zeros of single weights, but "
        f"only {len(goals)} of {len(pupil.layers)} pruned layers have some that it may "
        "place. Prune single weights, as by magnitude(sparsity=0.5), or take finetune."
    )


@hookimpl
def register_recoveries() -> list[RecoveryMethod]:
    """Register them."""
    return [RigL(), SetRecovery(), StraightThroughRecovery()]
