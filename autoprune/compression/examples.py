"""The step that stands for a method in tables, docs and tests, and what it shows.

All of it follows from what methods declare: parameters with their examples, what they
refuse, what they store.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from autoprune.compression.actions import Actions
from autoprune.compression.method import CompressionMethod, Parameter
from autoprune.compression.storage import Storage
from autoprune.errors import MethodError
from autoprune.models.hidden import HIDDEN, KERNEL
from autoprune.models.structures import STREAM
from autoprune.policy import Action, Layer, Step, Value
from autoprune.sites import Cut

SIDE = 1024
"""Rows and columns of the layer on which examples are priced."""

KERNEL_PLACES = 16
"""Places of a kernel of that layer, for methods that see it as a convolution."""

_UNITS = {"channels": SIDE, "heads": SIDE // 64}
"""Channels of that layer, and heads of 64."""


def example_step(method: CompressionMethod) -> Step:
    """Give a step of a method: as short as it can be, with every required parameter.

    Defaults where they are enough. Else the parameters that have to be named, or the
    first one with an example that makes the step complete. A step that has to name
    something also names what goes with it: ``gptq(bits=4, group=64)``.

    Raises:
        MethodError: If neither defaults nor examples make a step.
    """
    known = _examples(method)
    required = {p.name for p in method.parameters if p.required}
    given = {name: known[name] for name in known if name in required}
    tries = [given, *({**given, name: value} for name, value in known.items())]
    chosen = next((one for one in tries if accepts(method, one)), None)
    if chosen is None:
        raise MethodError(
            f"method {method.name!r} has no example: neither its defaults nor the "
            f"examples of its parameters ({known or 'none'}) make a step. Give an "
            "example to each parameter that a step has to name."
        )
    for name, value in known.items() if required else ():
        if accepts(method, {**chosen, name: value}):
            chosen = {**chosen, name: value}
    return _step(method, chosen)


def example_steps(method: CompressionMethod) -> list[Step]:
    """Give the example of a method, and what the examples of its parameters allow.

    Every one of them is tried beside all that were found before, and alone. Of a
    parameter with choices every other word than the default is in one step.
    """
    first, known = example_step(method), _examples(method)
    required = {p.name for p in method.parameters if p.required}
    bases = [dict(first.params), {n: v for n, v in known.items() if n in required}]
    for name, value in known.items():
        bases += [{**base, name: value} for base in bases]
    allowed = [base for base in bases if accepts(method, base)]
    for name, word in _other_words(method):
        with_word = [{**base, name: word} for base in allowed]
        allowed += [one for one in with_word if accepts(method, one)][:1]
    return list(dict.fromkeys(_step(method, one) for one in allowed))


def example_layer(
    method: CompressionMethod, *, input: str | None = "blocks.0.mlp"
) -> Layer:
    """Give a layer that a method may treat, in bfloat16, with inputs or without.

    It takes what its structure makes and adds to the hidden state, as the last layer of
    an MLP or an attention does.
    """
    kind = next((kind for kind in _UNITS if kind in method.kinds), "channels")
    cut = Cut(kind, "columns", SIDE // _UNITS[kind], _UNITS[kind])
    hidden = STREAM if STREAM in method.kinds else HIDDEN
    return Layer(
        "example",
        (SIDE, SIDE),
        "bfloat16",
        block=0,
        role="down_proj",
        input=input,
        cut=cut,
        hidden=Cut(hidden, "rows", KERNEL, SIDE // KERNEL),
        kernel=KERNEL_PLACES,
    )


def example_action(
    method: CompressionMethod, methods: Mapping[str, CompressionMethod]
) -> Action:
    """Give an action that ends with the example of a method.

    A method that refuses a dense layer gets a step before it: of all that it accepts,
    the one that needs the fewest statistics, then the one that stores least. It treats
    any layer, not only convolutions.

    Raises:
        MethodError: If it refuses the dense layer and what any other method leaves.
    """
    step, layer = example_step(method), example_layer(method)
    actions = Actions({**methods, method.name: method})
    reason = actions.refuses(layer, Action((step,)))
    if reason is None:
        return Action((step,))
    found = []
    for name, other in methods.items():
        if name == method.name or other.kinds != method.kinds:
            continue
        try:
            first = example_step(other)
        except MethodError:  # it has none, and is told so where it is shown itself
            continue
        any_layer = actions.refuses(replace(layer, kernel=1), Action((first,))) is None
        if any_layer and actions.refuses(layer, Action((first, step))) is None:
            size = actions.storage(layer, Action((first,))).nbytes
            found.append((len(other.needs), size, name, first))
    if not found:
        raise MethodError(f"no example of {method.name!r} suits a layer: {reason}")
    return Action((min(found, key=lambda one: one[:3])[3], step))


def example_storages(
    method: CompressionMethod, methods: Mapping[str, CompressionMethod]
) -> Iterator[tuple[Storage, Storage]]:
    """Give what an example layer stores before and after each example of a method."""
    layer, action = example_layer(method), example_action(method, methods)
    actions = Actions({**methods, method.name: method})
    before = actions.storage(layer, Action(action.steps[:-1]))
    for step in example_steps(method):
        whole = Action((*action.steps[:-1], step))
        if actions.refuses(layer, whole) is None:
            yield before, actions.storage(layer, whole)


def bits_per_weight(storage: Storage) -> float:
    """Tell how many bits are stored for each weight, kept or not."""
    return storage.nbytes * 8 / prod(storage.shape)


def accepts(method: CompressionMethod, params: Mapping[str, Value]) -> bool:
    """Tell whether a method takes parameters, whatever the layer."""
    try:
        method.check(params)
    except MethodError:
        return False
    return True


def _examples(method: CompressionMethod) -> dict[str, Value]:
    def value(one: Parameter) -> Value | None:
        if one.example is not None or not one.required:
            return one.example
        first = one.choices[0] if one.choices else None
        return first if one.default is None else one.default

    found = {one.name: value(one) for one in method.parameters}
    return {name: one for name, one in found.items() if one is not None}


def _other_words(method: CompressionMethod) -> list[tuple[str, str]]:
    return [
        (one.name, word)
        for one in method.parameters
        for word in one.choices
        if word != one.default
    ]


def _step(method: CompressionMethod, params: Mapping[str, Value]) -> Step:
    return Step(method.name, tuple(sorted(params.items())))
