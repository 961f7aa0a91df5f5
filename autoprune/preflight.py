"""Exports the smallest policy of a space before its search, lest that end in vain."""

import tempfile
import time
from pathlib import Path

from autoprune.errors import AutoPruneError, ExportError
from autoprune.exporting.digests import digests_of
from autoprune.models.loading import quiet
from autoprune.policy import Policy
from autoprune.searching.plan import Plan


def preflight(plan: Plan, folder: Path) -> float:
    """Write the smallest policy as the search's target, and load it again.

    Size and every layer are compared, in this process; the winner's export is verified
    by a fresh one.

    Args:
        plan: Whose variants are made.
        folder: Where there is room for a while: the run folder.

    Returns:
        Seconds that it took.

    Raises:
        ExportError: If the target does not hold the policy.
    """
    start = time.monotonic()
    policy, target = smallest_policy(plan), plan.bench.exporter.name
    try:
        with tempfile.TemporaryDirectory(prefix=".preflight.", dir=folder) as place:
            _export_and_load(plan, policy, Path(place))
    except (AutoPruneError, OSError) as error:
        raise ExportError(
            f"the smallest policy of the space cannot be exported as {target}, so no "
            f"search was begun: {error}"
        ) from error
    return time.monotonic() - start


def smallest_policy(plan: Plan) -> Policy:
    """Give every site the action that takes the fewest bytes in the search's target."""
    bench, space = plan.bench, plan.problem.space

    chosen = {}
    for site in space.sites:
        prices = {
            action: sum(
                bench.exporter.layer_bytes(layer, bench.actions.storage(layer, action))
                for layer in site.layers
            )
            for action in space.choices[site.name]
        }
        chosen[site.name] = min(prices, key=lambda action: prices[action])
    return Policy(chosen)


def _export_and_load(plan: Plan, policy: Policy, place: Path) -> None:
    bench, exporter = plan.bench, plan.bench.exporter
    storages = bench.storages(policy)
    if reason := exporter.refuses_policy(storages, bench.inventory):
        raise ExportError(reason)
    predicted = exporter.size_bytes(storages, bench.untouched)
    with quiet():
        expected = exporter.write(place, bench.job(policy, plan.bank))
        written = exporter.written_bytes(place)
        if written != predicted:
            raise ExportError(
                f"its weight files have {written} bytes, {predicted} were predicted"
            )
        bench.tokenizer.save_pretrained(place)
        found = digests_of(exporter.load(place), list(expected))
    if wrong := [name for name in expected if found.get(name) != expected[name]]:
        raise ExportError(
            f"loaded again, {len(wrong)} of {len(expected)} layers have other weights, "
            f"first {wrong[0]!r}"
        )
