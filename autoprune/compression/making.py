"""Makes variants step by step: methods are called, and what they give is checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoprune.compression.actions import Actions
from autoprune.compression.method import Source
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.errors import AutoPruneError, MethodError, PluginError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Action, Layer, Step

Started = dict[tuple[Layer, Step], Variant]
"""What a first step that acts on a whole site has left of each of its layers."""


@dataclass(frozen=True)
class Making:
    """Does the steps of actions, those that begin alike together.

    Attributes:
        actions: What actions mean.
        started: What structured steps have left; see ``start``.
    """

    actions: Actions
    started: Started = field(default_factory=dict)

    def start(
        self,
        sources: Sequence[Source],
        steps: Sequence[Step],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        """Do structured steps of one method on all layers of their site.

        Raises:
            MethodError: If the numbers do not allow it.
            PluginError: If the method breaks.
        """
        method = self.actions.method(steps[0])
        assert isinstance(method, StructuredMethod)
        settings = [self.actions.settings(step) for step in steps]
        made = self._call(
            lambda: method.compress_site(sources, statistics, settings), sources, steps
        )
        for source, variants in zip(sources, made, strict=True):
            for step, variant in zip(steps, variants, strict=True):
                self.started[source.layer, step] = variant

    def grow(
        self,
        sources: Sequence[Source],
        tails: Mapping[Action, tuple[Step, ...]],
        statistics: InputStatistics,
    ) -> Iterator[tuple[Action, list[Variant]]]:
        """Do the first of the steps that are left, then the others on what it gives.

        Actions that begin alike share their first steps, and one call of a method
        serves all of its settings. What one method gives is passed on, and may be let
        go, before the next method is called.

        Args:
            sources: Layers that share an input, as the steps before have left them.
            tails: For each action the steps that are left.
            statistics: Of the common input.

        Yields:
            Every action once, with a variant for each source.

        Raises:
            MethodError: If the numbers do not allow it.
            PluginError: If a method breaks.
        """
        for action, left in tails.items():
            if not left:
                yield action, [source.variant for source in sources]
        steps = dict.fromkeys(steps[0] for steps in tails.values() if steps)
        for name in dict.fromkeys(step.method for step in steps):
            same = [step for step in steps if step.method == name]
            made = self._compress(same, sources, statistics)
            for index, step in enumerate(same):
                rest = {a: t[1:] for a, t in tails.items() if t and t[0] == step}
                grown = [
                    replace(source, variant=by_setting[index])
                    for source, by_setting in zip(sources, made, strict=True)
                ]
                yield from self.grow(grown, rest, statistics)
            del made, grown  # else they would be held while the next method works

    def _compress(
        self,
        steps: Sequence[Step],
        sources: Sequence[Source],
        statistics: InputStatistics,
    ) -> list[list[Variant]]:
        method = self.actions.method(steps[0])
        if isinstance(method, StructuredMethod):
            return [[self.started[s.layer, step] for step in steps] for s in sources]
        settings = [self.actions.settings(step) for step in steps]
        return self._call(
            lambda: method.compress(sources, statistics, settings), sources, steps
        )

    def _call(
        self,
        compress: Callable[[], list[list[Variant]]],
        sources: Sequence[Source],
        steps: Sequence[Step],
    ) -> list[list[Variant]]:
        """Call a plugin's method; what it did not foresee is named."""
        method = self.actions.method(steps[0])
        names = ", ".join(source.layer.name for source in sources)
        where = f"{names} under {' and '.join(map(str, steps))}"
        who = f"method {method.name!r} of {type(method).__module__}"
        try:
            made = compress()
        except MethodError as error:  # methods know layers, but not their own action
            raise MethodError(f"{where}: {error}") from error
        except AutoPruneError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"{who} failed on {where}: {reason}") from error
        counts = [len(variants) for variants in made]
        if counts != [len(steps)] * len(sources):
            raise PluginError(
                f"{who} gave {counts} variants for {where}; expected {len(steps)} for "
                f"each of {len(sources)} layers"
            )
        return made
