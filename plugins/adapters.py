"""Recoveries that train adapters and merge them: LoRA and LoRAPrune."""

from pathlib import Path

from autoprune.compression.method import Parameter, Settings
from autoprune.errors import ConfigError
from autoprune.hookspecs import hookimpl
from autoprune.models.weights import expert_of
from autoprune.policy import Layer
from autoprune.training.lora import LoraPruneSettings, LoraSettings, train_lora
from autoprune.training.lora_prune import prune_lora
from autoprune.training.ramps import RAMPS, Ramp
from autoprune.training.recovery import Pupil, RecoveryMethod, Told
from autoprune.training.whole_model import (
    OF_DENSE,
    TRAINING,
    WholeModelRecovery,
    check_end,
    done,
    loss_of,
    settings_of,
)

_ADAPTERS = (
    Parameter("rank", int, 16, "Columns of the left factor.", 1, 65536),
    Parameter("alpha", float, 32.0, "Times 1 / rank, the product's.", 0, 1e6),
    Parameter("dropout", float, 0.0, "Of what adapters read.", 0, 0.9),
)

_LOSSES = tuple(one for one in OF_DENSE if one.name != "l1")
"""Without the sizes of weights: they would be those of the adapters."""


class Lora(WholeModelRecovery):
    """Train a product of two small matrices beside each pruned weight, and merge it.

    Experts and heads get none: PEFT has no adapter for them whose change keeps a mask.

    The mask acts on the sum in every forward pass, so what is merged is what was
    trained. By default the dense model's distribution is learnt, as by ``distill``.
    """

    name = "lora"
    reference = "Hu et al. 2021, arXiv:2106.09685, Sec. 4.1"
    parameters = (*TRAINING, *_LOSSES, *_ADAPTERS)
    checkpoint_bytes = 0.0  # adapters are small

    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Train adapters of the pupil's layers, and merge them."""
        asked = settings_of(pupil, settings, share)
        found = train_lora(
            pupil.model,
            pupil.windows,
            folder,
            layers=_adapted(pupil),
            loss=loss_of(pupil, settings),
            masks=pupil.masks,
            settings=asked,
            lora=_lora(settings),
            validation=pupil.validation if settings["patience"] else None,
            progress=lambda now: told(done(now)),
        )
        check_end(found, asked)


class LoraPrune(WholeModelRecovery):
    """Prune by the importance that adapters tell, while they are trained; merge them.

    A weight's importance follows from weights and gradients of its adapter. For single
    weights a low rank ranks them badly; sums over channels and heads even that out.
    """

    name = "loraprune"
    reference = "Zhang et al. 2023, arXiv:2305.18403, Sec. 3"
    prunes = True
    from_dense = True
    checkpoint_bytes = 10.0  # importance and mask of each weight, twice
    parameters = (
        *(one for one in TRAINING if one.name != "patience"),
        *_LOSSES,
        *_ADAPTERS,
        Parameter("ramp", str, "cubic", "How zeros grow in number.", choices=RAMPS),
        Parameter("end", float, 0.5, "Share of the steps at its end.", 0, 0.9),
        Parameter("interval", int, 1, "Steps between two prunings.", 1, 10**9),
        Parameter("memory", float, 0.9, "Share of importance that stays.", 0, 0.999),
    )

    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Prune the pupil's layers, and train adapters of them."""
        goals = pupil.goals
        if left := [layer for layer in pupil.layers if layer not in goals]:
            raise ConfigError(
                f"loraprune prunes weights, N:M groups and units, but {left[0].name} "
                f"and {len(left) - 1} others of {len(pupil.layers)} layers are to be "
                "pruned otherwise. Take another action, or one-shot and lora."
            )
        asked = settings_of(pupil, settings, share)
        end = round(settings["end"] * (asked.steps(pupil.windows.shape[1]) - 1))
        ramp = Ramp(settings["ramp"], 0.0, 1.0, 0, end, settings["interval"])
        found = prune_lora(
            pupil.model,
            pupil.windows,
            folder,
            goals=goals,
            loss=loss_of(pupil, settings),
            masks=pupil.masks,
            settings=asked,
            pruning=LoraPruneSettings(ramp=ramp, decay=settings["memory"]),
            lora=_lora(settings),
            progress=lambda now: told(done(now)),
        )
        check_end(found.recovery, asked)
        pupil.masks.replace(dict(found.masks.parameters()))


def _lora(settings: Settings) -> LoraSettings:
    return LoraSettings(**{one.name: settings[one.name] for one in _ADAPTERS})


def _adapted(pupil: Pupil) -> list[Layer]:
    """List the layers that can have an adapter.

    Raises:
        ConfigError: If there is none.
    """
    found = [la for la in pupil.trainable if la.block is not None]
    found = [layer for layer in found if expert_of(layer.name) is None]
    if not found:
        raise ConfigError(
            f"none of the {len(pupil.layers)} pruned layers can have an adapter: they "
            "are experts, or in no block. Take finetune, distill or blockwise."
        )
    return found


@hookimpl
def register_recoveries() -> list[RecoveryMethod]:
    """Register them."""
    return [Lora(), LoraPrune()]
