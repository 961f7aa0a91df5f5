"""Coarser than a weight: which tiles of a layer are removed as a whole, and refusals.

A tile has ``rows x columns`` weights: ``1x8`` is a vector of a row, ``16x16`` a square,
``row`` all weights of an output, ``column`` all weights of an input.
"""

import re
from collections.abc import Mapping

from autoprune.compression.masks import pruned_count
from autoprune.compression.method import Parameter, Settings
from autoprune.compression.storage import Tile
from autoprune.errors import MethodError
from autoprune.policy import Layer, Value

PER = Parameter("per", str, "row", "Which weights compete.", choices=("row", "layer"))
TILE = Parameter(
    "tile",
    str,
    None,
    "Removed as a whole: rows x columns such as 1x8; row; column.",
    example="1x8",
)

_TILE = re.compile(r"row|column|[1-9]\d*x[1-9]\d*")


def check_granularity(
    method: str, params: Mapping[str, Value], settings: Settings
) -> Settings:
    """Check what competes with what: ``per`` and ``tile``, beside ``pattern``.

    Args:
        method: Name of the method.
        params: As they stand in the action.
        settings: The same, completed.

    Returns:
        The settings. Whole rows get ``per=layer``: none can compete with itself.

    Raises:
        MethodError: If one is impossible, or two exclude each other.
    """
    tile = settings["tile"]
    if tile is None:
        return settings
    if tile == "1x1" or not _TILE.fullmatch(tile):
        raise MethodError(
            f"{method}(tile=...) is row, column, or rows x columns of several weights "
            f"such as 1x8 or 16x16; found {tile!r}"
        )
    if settings["pattern"] is not None:
        raise MethodError(
            f"{method}(tile={tile}) goes with sparsity, not with pattern, found "
            f"{settings['pattern']}. Leave one of them out."
        )
    if tile != "row":
        return settings
    if params.get("per") == "row":
        raise MethodError(
            f"{method}(tile=row, per=row) lets each row compete with itself alone. "
            "Leave per out, or write per=layer."
        )
    return {**settings, "per": "layer"}


def tile_of(shape: tuple[int, int], settings: Settings) -> Tile:
    """Read the tile of a matrix: its rows and columns; a single weight if none.

    Example:
        >>> tile_of((8, 32), {"tile": "column"})
        (8, 1)
    """
    tile, (rows, columns) = settings.get("tile"), shape
    if tile is None:
        return 1, 1
    if tile in ("row", "column"):
        return (1, columns) if tile == "row" else (rows, 1)
    high, _, wide = tile.partition("x")
    return int(high), int(wide)


def refuse_tiles(layer: Layer, settings: Settings) -> str | None:
    """Say why a layer has no such tiles, or too few of them, or None.

    A sparsity that removes no tile, or every one, is not what an action says.
    """
    if settings.get("tile") is None:
        return None
    (rows, columns), (high, wide) = layer.shape, tile_of(layer.shape, settings)
    if rows % high or columns % wide:
        return f"tiles of {high}x{wide} do not divide its {rows}x{columns} weights"
    by_row = settings["per"] == "row"
    count = columns // wide * (1 if by_row else rows // high)
    removed = pruned_count(count, settings["sparsity"])
    if 0 < removed < count:
        return None
    return (
        f"sparsity {settings['sparsity']:g} removes {removed} of the {count} tiles of "
        f"{high}x{wide} in {'a row' if by_row else 'the layer'}: take smaller tiles"
        + (" or per=layer" if by_row else "")
    )
