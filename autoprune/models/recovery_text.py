"""Windows that recoveries train on: of the documents that statistics are taken from.

They are no split of their own: what statistics have seen, a recovery may see as well.
"""

from collections.abc import Mapping

import torch

from autoprune.models.text import TokenWindows

RECOVERY = "recovery"
"""Name of these windows among the splits."""


def with_recovery(
    splits: Mapping[str, TokenWindows], statistics: int
) -> dict[str, TokenWindows]:
    """Let recoveries have the windows of split A, and statistics some of them.

    Args:
        splits: Split A with as many windows as recoveries want.
        statistics: How many of them statistics want; these are spread evenly.
    """
    whole = splits["statistics"]
    count = min(statistics, len(whole.ids))
    places = torch.linspace(0, len(whole.ids) - 1, count).round().long()
    some = TokenWindows.of(whole.ids[places], "statistics", whole.source)
    every = TokenWindows.of(whole.ids, RECOVERY, whole.source)
    return {**splits, "statistics": some, RECOVERY: every}
