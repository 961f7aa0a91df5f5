"""What an action means: its methods, their complete settings, what it stores."""

from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.compression.hidden import HiddenMethod
from autoprune.compression.method import CompressionMethod, Settings
from autoprune.compression.storage import Storage
from autoprune.compression.structured import StructuredMethod
from autoprune.errors import MethodError, PluginError, PolicyError, unknown_name
from autoprune.models.gradients import GRADIENTS
from autoprune.models.statistics import STATISTICS
from autoprune.policy import Action, Layer, Policy, Step


@dataclass(frozen=True)
class Actions:
    """Answers questions about actions, from what the methods declare.

    Attributes:
        methods: Every method that may stand in an action, by name.
    """

    methods: Mapping[str, CompressionMethod]

    def method(self, step: Step) -> CompressionMethod:
        """Look up the method of a step.

        Raises:
            PolicyError: If there is none of that name; lists near misses.
        """
        if step.method not in self.methods:
            raise PolicyError(unknown_name("method", step.method, self.methods))
        return self.methods[step.method]

    def is_structured(self, action: Action) -> bool:
        """Tell whether the first step acts on all layers of a site together."""
        first = action.steps[:1]
        return any(isinstance(self.method(step), StructuredMethod) for step in first)

    def is_hidden(self, action: Action) -> bool:
        """Tell whether an action narrows the hidden state of the whole model."""
        first = action.steps[:1]
        return any(isinstance(self.method(step), HiddenMethod) for step in first)

    def settings(self, step: Step) -> Settings:
        """Complete the parameters of a step.

        Raises:
            PolicyError: If the method is unknown.
            MethodError: If a parameter is unknown or impossible.
        """
        return self.method(step).check(dict(step.params))

    def canonical(self, action: Action) -> Action:
        """Check an action and leave out parameters that only repeat a default.

        Raises:
            PolicyError: If a method is unknown.
            MethodError: If a parameter is unknown or impossible.
        """
        steps = []
        for step in action.steps:
            settings, defaults = self.settings(step), self._defaults(step)
            given = {n: v for n, v in settings.items() if v != defaults[n]}
            steps.append(Step(step.method, tuple(sorted(given.items()))))
        return Action(tuple(steps))

    def canonical_policy(self, policy: Policy) -> Policy:
        """Check every action of a policy; see ``canonical``."""
        actions = {site: self.canonical(action) for site, action in policy.items()}
        return Policy(actions, policy.schedule)

    def needs(self, action: Action) -> frozenset[str]:
        """Name the statistics that the steps of an action read.

        Raises:
            PluginError: If a method asks for a statistic that does not exist.
        """
        needs: set[str] = set()
        for step in action.steps:
            method = self.method(step)
            known = STATISTICS | GRADIENTS
            unknown = method.needs - known
            if unknown:
                raise PluginError(
                    f"method {method.name!r} needs "
                    + unknown_name("statistic", min(unknown), known)
                )
            needs |= method.needs
        return frozenset(needs)

    def refuses(self, layer: Layer, action: Action) -> str | None:
        """Say why an action cannot be done to a layer, or None if it can."""
        storage = Storage.dense(layer)
        for step in action.steps:
            method, settings = self.method(step), self.settings(step)
            if method.needs & GRADIENTS and layer.block is None:
                return (
                    f"{step} needs gradients, taken in blocks; {layer.name} is in none"
                )
            if storage.hidden is not None:
                return (
                    f"{step} cannot follow: a rotation leaves no mask and no grid. "
                    "Leave it out"
                )
            of_inputs = method.needs and not isinstance(method, HiddenMethod)
            if of_inputs and layer.input is None:
                return f"{step} needs statistics of inputs, which {layer.name} has not"
            reason = method.refuses(layer, storage, settings)
            if reason:
                return reason
            storage = method.storage(layer, storage, settings)
        return None

    def storage(self, layer: Layer, action: Action) -> Storage:
        """Declare what a layer stores under an action, without making it.

        Raises:
            MethodError: If a step refuses the layer; names layer, action and reason.
        """
        reason = self.refuses(layer, action)
        if reason:
            raise MethodError(f"{layer.name} cannot take {str(action)!r}: {reason}")
        storage = Storage.dense(layer)
        for step in action.steps:
            storage = self.method(step).storage(layer, storage, self.settings(step))
        return storage

    def identity(self, action: Action) -> str:
        """Name an action with the versions of its methods, for keys."""
        return " + ".join(
            f"{step}@{self.method(step).version}" for step in action.steps
        )

    def _defaults(self, step: Step) -> dict[str, object]:
        return {p.name: p.default for p in self.method(step).parameters}
