"""The last refinement: at every site the better of two variants of its action.

A policy that is solved anew has two variants of each action, equal in size: the one
that it was found with, and the one on its own inputs. Which of them serves the whole
model better differs from site to site. One backward pass prices all exchanges at once,
to second order, and those that are worth it are made together. Ours.
"""

from collections.abc import Sequence

from autoprune.compression.bank import VariantBank
from autoprune.compression.mixed import MixedBank
from autoprune.evaluation.slopes import measure_slopes
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy, Site
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.trial import SAMPLED, LocalEvaluator

WEIGHTS = (0.25, 0.5)
"""Shares of the curvature that an exchange has to be worth; each gives a mix to try.
Measured on SmolLM2-135M at 70 % zeros: half of it is better than all of it."""

DRAWN_TOKENS = 1024
"""Tokens that labels are drawn on, for the curvature."""


def mixes(
    bench: Workbench, policy: Policy, start: VariantBank, other: VariantBank
) -> list[tuple[MixedBank, tuple[str, ...]]]:
    """Mix the variants of two banks, for one policy.

    Args:
        bench: The model; its fitness split prices the exchanges.
        policy: The policy.
        start: The bank that serves it better as a whole.
        other: The other one, with variants of the same actions.

    Returns:
        The mixes to try, none where no exchange is worth it, each with the names of
        the sites that take the other bank's variants.
    """
    sites = [
        site
        for site in bench.inventory.sites_for(policy)
        if any(
            start.key(layer, policy[site.name]) != other.key(layer, policy[site.name])
            for layer in site.layers
            if policy[site.name].steps
        )
    ]
    if not sites:
        return []
    slopes = _exchanges(bench, policy, sites, start, other)
    found: dict[tuple[str, ...], MixedBank] = {}
    for weight in WEIGHTS:
        price = slopes.slope[:, 1] + weight * slopes.curvature[:, 1]
        taken = [site for site, worth in zip(sites, price < 0, strict=True) if worth]
        layers = frozenset(layer for site in taken for layer in site.layers)
        if taken and len(taken) < len(sites):
            names = tuple(site.name for site in taken)
            found[names] = MixedBank.of(start, other, layers)
    return [(bank, names) for names, bank in found.items()]


def _exchanges(
    bench: Workbench,
    policy: Policy,
    sites: Sequence[Site],
    start: VariantBank,
    other: VariantBank,
) -> SiteSlopes:
    """Price the exchange of each site's variant, with the start bank's on the model."""
    teacher = bench.teacher(LocalEvaluator.SPLIT)
    total, length = teacher.windows.ids.shape
    weights = {
        layer: [bank.weight(layer, policy[site.name]) for bank in (start, other)]
        for site in sites
        for layer in site.layers
    }
    start.put(bench.per_layer(policy))  # last: a bank that makes variants takes it off
    layers = measure_slopes(
        bench.stitched.model,
        teacher,
        weights,
        range(total),
        draws=1,
        drawn=max(1, round(DRAWN_TOKENS / length)),
        sampled=SAMPLED,
    )
    return SiteSlopes.summed(sites, [2] * len(sites), layers, range(total))
