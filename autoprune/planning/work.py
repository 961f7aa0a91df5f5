"""Counts what a run does: operations of passes, calls of methods, weights stored."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoprune.compression.structured import StructuredMethod
from autoprune.models.gradients import GRADIENTS
from autoprune.planning.disk import pairs_of
from autoprune.planning.outlined import Outlined
from autoprune.planning.rates import Rates, Span, total
from autoprune.policy import Action, Layer, Step

HESSIAN = "hessian"

Pairs = Sequence[tuple[Layer, Action]]

UPPER = 5 / 8
"""Share of a Hessian's products that are made: strips of its upper half."""


@dataclass(frozen=True, eq=False)
class Work:
    """What a run does, and how long each part of it takes on a device.

    Attributes:
        outlined: The run.
        rates: The device.
    """

    outlined: Outlined
    rates: Rates

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers of blocks."""
        every = self.outlined.bench.layers
        return [layer for layer in every if layer.block is not None]

    @cached_property
    def weights(self) -> int:
        """Weights of the blocks that a token meets."""
        return round(sum(layer.numel * layer.uses for layer in self.layers))

    @cached_property
    def pairs(self) -> list[tuple[Layer, Action]]:
        """Every variant of the space."""
        return pairs_of(self.outlined)

    @cached_property
    def variant_weights(self) -> int:
        """Weights of all variants together."""
        return sum(layer.numel for layer, _ in self.pairs)

    def tokens(self, split: str) -> int:
        """Count the tokens of a split."""
        text = self.outlined.config.text
        return text.window * text.windows[split]

    def flop(self, tokens: int) -> float:
        """Count the operations of a pass over the blocks, attention included."""
        text, blocks = self.outlined.config.text, self.outlined.bench.inventory.blocks
        attention = 4 * text.window * self.outlined.hidden * len(blocks)
        return float(tokens * (2 * self.weights + attention))

    def blocks(self, tokens: int, kind: str | None = None) -> Span:
        """Time a pass over the blocks."""
        return self.rates.products(self.flop(tokens), self.outlined.hidden, kind)

    def head(self, tokens: int) -> Span:
        """Time what a head makes of tokens, compared with the dense model."""
        outlined = self.outlined
        return self.rates.head(2.0 * tokens * outlined.vocabulary * outlined.hidden)

    def measured(self, tokens: int) -> Span:
        """Time a policy's measurement."""
        return self.blocks(tokens) + self.head(tokens)

    def teacher(self, tokens: int) -> Span:
        """Time the dense model's answers on a split."""
        factor = float(self.rates.record["teacher_factor"])
        return self.blocks(tokens) + self.head(tokens) * factor

    def gradients(
        self, tokens: int, draws: int, *, drawn: int | None = None, apart: bool = False
    ) -> Span:
        """Time slopes of all variants: one pull, and pushes by drawn labels.

        Args:
            tokens: Of the pull.
            draws: How often labels are drawn.
            drawn: On how many tokens; None for all.
            apart: Whether single outputs are priced too.
        """
        drawn, record = (
            tokens if drawn is None else min(drawn, tokens),
            self.rates.record,
        )
        pushed = drawn * draws
        passes = self.measured(tokens) * float(record["pull_factor"])
        passes += self.measured(pushed) * float(record["push_factor"])
        windows = (tokens + pushed) / self.outlined.config.text.window
        priced = record["pricing_s"] * self.variant_weights * windows
        if apart:
            priced += record["apart_s"] * self.variant_weights * pushed
        return passes + self.rates.methods(priced)

    def hessians(self, wanted: Pairs) -> Span:
        """Time the sums over inputs that variants need."""
        actions, widths = self.outlined.bench.actions, dict[str, int]()
        for layer, action in wanted:
            if layer.input is not None and HESSIAN in actions.needs(action):
                widths[layer.input] = layer.shape[1]
        tokens = self.tokens("statistics")
        spans = [
            self.rates.hessians(2.0 * tokens * width**2 * UPPER * count, width)
            for width, count in Counter(widths.values()).items()
        ]
        return total(spans)

    def statistics(
        self, wanted: Sequence[tuple[Layer, Action]], *, again: bool
    ) -> Span:
        """Time a streaming pass: blocks run once, and again where a policy leads it."""
        actions = self.outlined.bench.actions
        streamed = [p for p in wanted if actions.needs(p[1]) - GRADIENTS]
        if not streamed:
            return Span()
        passes = self.blocks(self.tokens("statistics")) * (2.0 if again else 1.0)
        return passes + self.hessians(streamed)

    def variants(self, wanted: Pairs) -> Span:
        """Time methods, and the writing of what they give."""
        grouped: dict[tuple[str | None, tuple[Action, ...]], list[Layer]] = {}
        by_layer: dict[Layer, list[Action]] = {}
        for layer, action in wanted:
            by_layer.setdefault(layer, []).append(action)
        for layer, own in by_layer.items():
            key = layer.input or layer.name, tuple(own)
            grouped.setdefault(key, []).append(layer)
        kinds: dict[tuple[tuple[Action, ...], int, int], int] = {}
        for (_, own_actions), layers in grouped.items():
            rows, columns = sum(la.shape[0] for la in layers), layers[0].shape[1]
            place = own_actions, rows, columns
            kinds[place] = kinds.get(place, 0) + 1
        seconds = sum(
            count * self._calls_s({a: a.steps for a in given}, rows, columns)
            for (given, rows, columns), count in kinds.items()
        )
        stored = sum(layer.numel for layer, _ in wanted) * self.rates.record["put_s"]
        return self.rates.methods(seconds) + self.rates.other(stored)

    def _calls_s(
        self, tails: Mapping[Action, tuple[Step, ...]], rows: int, columns: int
    ) -> float:
        """Time the calls that make actions which may begin alike; see ``Making``."""
        seconds, actions = 0.0, self.outlined.bench.actions
        steps = dict.fromkeys(left[0] for left in tails.values() if left)
        for name in dict.fromkeys(step.method for step in steps):
            same = [step for step in steps if step.method == name]
            method = actions.method(same[0])
            hessian = HESSIAN in method.needs and not isinstance(
                method, StructuredMethod
            )
            seconds += self.rates.call_s(
                name, len(same), rows, columns, hessian=hessian
            )
            for step in same:
                rest = {a: t[1:] for a, t in tails.items() if t and t[0] == step}
                seconds += self._calls_s(rest, rows, columns)
        return seconds

    def read(self, weights: float) -> Span:
        """Time the unpacking of variants."""
        return self.rates.other(weights * float(self.rates.record["get_s"]))

    def unknown(self) -> list[str]:
        """Name the methods of the space that were never recorded."""
        names = {step.method for _, action in self.pairs for step in action.steps}
        return sorted(name for name in names if not self.rates.knows(name))
