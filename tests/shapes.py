"""How tests check types and shapes: beartype, told what it cannot know by itself."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(
    conf=BeartypeConf(
        # jaxtyping hands over one function at a time, without the class of Self.
        hint_overrides=FrozenDict({Self: Any}),
        is_pep484_tower=True,  # an int passes for a float, as it does for mypy
    )
)
"""Named by ``--jaxtyping-packages`` in pyproject.toml."""
