"""Of two variants of one action, each site takes what serves the whole model better."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import config_of, write_text

from autoprune.compression.bank import VariantBank
from autoprune.evaluation.provenance import Mix, bank_of, made_for
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.searching import mixing
from autoprune.searching.mixing import mixes
from autoprune.searching.plan import Plan

ACTIONS = ["sparsegpt(sparsity=[0.5, 0.7])"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Plan:
    text = write_text(tmp_path_factory.mktemp("text"))
    config = config_of(
        tiny_checkpoint,
        text,
        space=[{"sites": "blocks.*", "actions": ACTIONS}],
        bank="dense",
        objective={},
    )
    return Plan.make(config, load_plugins())


@pytest.fixture
def policy(plan: Plan) -> Policy:
    return next(p for name, p in plan.proposals if "0.7" in name)


@pytest.fixture
def banks(plan: Plan, policy: Policy) -> tuple[VariantBank, VariantBank]:
    """Variants on dense inputs, and on the policy's own."""
    return plan.bank, plan.bench.bank(policy)


def slopes_by_hand(
    plan: Plan, policy: Policy, start: VariantBank, other: VariantBank
) -> dict[str, float]:
    """Differentiate the KL by every weight, with plain torch."""
    bench = plan.bench
    model, ids = bench.stitched.model, bench.splits["fitness"].ids
    bench.stitched.restore()
    with torch.no_grad():
        dense = model(ids).logits[:, :-1].log_softmax(-1)
    start.put(bench.per_layer(policy))
    sites = {
        site.name: [
            (layer, model.get_parameter(f"{layer.name}.weight"))
            for layer in site.layers
        ]
        for site in plan.problem.space.sites
        if policy[site.name].steps
    }
    weights = [weight for pairs in sites.values() for _, weight in pairs]
    for weight in weights:
        weight.requires_grad_()
    log_q = model(ids).logits[:, :-1].log_softmax(-1)
    kl = (dense.exp() * (dense - log_q)).sum(-1).mean()
    grads = dict(zip(map(id, weights), torch.autograd.grad(kl, weights), strict=True))
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: sum(
            float(
                (
                    grads[id(weight)]
                    * (
                        other.weight(layer, policy[name])
                        - start.weight(layer, policy[name])
                    )
                ).sum()
            )
            for layer, weight in pairs
        )
        for name, pairs in sites.items()
    }


def test_exchanges_that_lower_the_kl_are_made(
    plan: Plan,
    policy: Policy,
    banks: tuple[VariantBank, VariantBank],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a weight of the curvature these are those with a negative slope."""
    monkeypatch.setattr(mixing, "WEIGHTS", (0.0,))
    milder = next(p for name, p in plan.proposals if "0.5" in name)
    signs = set()
    for pair in permutations((*banks, plan.bench.bank(milder)), 2):
        taken = {n for _, names in mixes(plan.bench, policy, *pair) for n in names}
        slopes = slopes_by_hand(plan, policy, *pair)
        # The first block reads the same in both banks, so its variants are equal.
        told = {n: slope for n, slope in slopes.items() if n.startswith("blocks.1.")}
        assert told.keys() & taken == {n for n in told if told[n] < 0}
        signs |= {slope < 0 for slope in told.values()}
    assert signs == {True, False}


def test_what_weighs_more_is_exchanged_less(
    plan: Plan,
    policy: Policy,
    banks: tuple[VariantBank, VariantBank],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for weight in (0.0, 1.0, 1e9):
        monkeypatch.setattr(mixing, "WEIGHTS", (weight,))
        found.append(
            {n for _, names in mixes(plan.bench, policy, *banks) for n in names}
        )
    assert found[0] >= found[1] >= found[2] == set()


def test_a_mix_has_the_variants_that_it_names(
    plan: Plan, policy: Policy, banks: tuple[VariantBank, VariantBank]
) -> None:
    start, other = banks
    for mixed, names in mixes(plan.bench, policy, start, other):
        for site in plan.problem.space.sites:
            bank = other if site.name in names else start
            for layer in site.layers:
                action = policy[site.name]
                assert mixed.key(layer, action) == bank.key(layer, action)


def test_what_needs_no_inputs_has_nothing_to_mix(plan: Plan) -> None:
    action = Action.parse("rtn(bits=4, group=16)")
    policy = Policy.uniform(plan.bench.inventory.sites, action)
    assert mixes(plan.bench, policy, plan.bank, plan.bench.bank(policy)) == []


def test_a_mix_is_opened_again_from_its_record(
    plan: Plan, policy: Policy, banks: tuple[VariantBank, VariantBank]
) -> None:
    """As exports and later runs do it."""
    start, other = banks
    mixed, names = mixes(plan.bench, policy, other, start)[0]
    mix = Mix(None, names)  # the bank that these are from has dense inputs
    record: dict[str, Any] = policy.to_dict() | made_for(plan.bench, policy, mix)
    assert Mix.of(record) == mix
    again = bank_of(plan.bench, record)
    assert again.name == mixed.name
    expected = plan.bench.measure(policy, mixed, "choice").metrics
    assert plan.bench.measure(policy, again, "choice").metrics == expected
    whole = plan.bench.measure(policy, other, "choice").metrics
    assert expected["kl"] != whole["kl"]
    assert Mix.of(made_for(plan.bench, policy)) is None
