import numpy as np
import pytest

from autoprune.errors import ConfigError, PolicyError
from autoprune.policy import DENSE, Action, Policy
from autoprune.searching.space import SearchSpace, build_space

HALF = Action.parse("wanda(sparsity=0.5)")
MOST = Action.parse("wanda(sparsity=0.8)")
FOUR = Action.parse("gptq(bits=4, group=48)")


def never(layer, action):
    return None


def no_groups_of_48(layer, action):
    if action == FOUR:
        return f"group 48 does not divide the {layer.shape[1]} inputs of {layer.name}"
    return None


@pytest.fixture
def space(sites_of):
    return build_space(sites_of(3), [("*", (DENSE, HALF, MOST))], never)


def test_distributions_are_one_categorical_of_texts_a_site(space):
    found = {name: d.choices for name, d in space.distributions().items()}
    texts = ("dense", "wanda(sparsity=0.5)", "wanda(sparsity=0.8)")
    assert found == dict.fromkeys(["blocks.0.up", "blocks.1.up", "blocks.2.up"], texts)


def test_policy_goes_to_params_and_to_indices_and_back(space):
    policy = space.at(np.array([2, 0, 1]))
    assert policy["blocks.0.up"] == MOST
    assert space.policy(space.params(policy)) == policy
    assert space.index(policy).tolist() == [2, 0, 1]
    assert space.policies == 27


def test_fingerprint_sees_sites_choices_and_their_order(space, sites_of):
    same = build_space(sites_of(3), [("*", (DENSE, HALF, MOST))], never)
    turned = build_space(sites_of(3), [("*", (DENSE, MOST, HALF))], never)
    fewer = build_space(sites_of(2), [("*", (DENSE, HALF, MOST))], never)
    assert same.fingerprint == space.fingerprint
    assert len({s.fingerprint for s in (space, turned, fewer)}) == 3


def test_last_matching_rule_decides_and_a_site_without_one_is_dense(sites_of):
    rules = [("blocks.[01].*", (HALF, MOST)), ("*.1.up", (MOST,))]
    space = build_space(sites_of(3), rules, never)
    assert list(space.choices.values()) == [(HALF, MOST), (MOST,), (DENSE,)]


def test_an_action_named_twice_counts_once(sites_of):
    space = build_space(sites_of(1), [("*", (HALF, MOST, HALF))], never)
    assert space.choices["blocks.0.up"] == (HALF, MOST)


def test_refused_action_is_taken_out_with_its_reason(sites_of):
    def refuses(layer, action):
        bad = layer.name.startswith("layers.1") and action == FOUR
        return "group 48 does not divide 16" if bad else None

    space = build_space(sites_of(2), [("*", (HALF, FOUR))], refuses)
    assert list(space.choices.values()) == [(HALF, FOUR), (HALF,)]
    assert space.refused == (("blocks.1.up", FOUR, "group 48 does not divide 16"),)


def test_site_that_refuses_all_is_fixed_at_dense(sites_of):
    def refuses(layer, action):
        return "too small" if layer.name.startswith("layers.1") else None

    space = build_space(sites_of(2), [("*", (HALF, MOST))], refuses)
    assert space.choices["blocks.1.up"] == (DENSE,)
    assert [reason for _, _, reason in space.refused] == ["too small"] * 2


def test_action_that_every_site_refuses_is_an_error(sites_of):
    with pytest.raises(
        ConfigError,
        match=r"none of the 2 sites of '\*' can do 'gptq\(bits=4, group=48\)'; at "
        r"'blocks.0.up': group 48 does not divide the 16 inputs of layers.0.up_proj",
    ):
        build_space(sites_of(2), [("*", (HALF, FOUR))], no_groups_of_48)


def test_glob_without_a_site_is_an_error(sites_of):
    with pytest.raises(
        ConfigError, match=r"'block.\*' matches none of 7 sites.*blocks.4.up \.\.\.$"
    ):
        build_space(sites_of(7), [("block.*", (HALF,))], never)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"blocks.0.up": "dense", "blocks.1.up": "dense"},
            "no action for site 'blocks.2.up'; it names 2 of 3",
        ),
        (
            dict.fromkeys(["blocks.0.up", "blocks.1.up", "blocks.2.up"], "wanda"),
            "at site 'blocks.0.up': unknown action 'wanda'",
        ),
        (
            {f"blocks.{i}.up": "dense" for i in range(4)},
            "unknown site 'blocks.3.up'. Did you mean",
        ),
    ],
    ids=["missing site", "no choice", "unknown site"],
)
def test_policy_outside_of_the_space_is_refused(space, texts, message):
    with pytest.raises(PolicyError, match=message):
        space.policy(texts)
    policy = Policy({site: Action.parse(text) for site, text in texts.items()})
    with pytest.raises(PolicyError, match=message):
        space.params(policy)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"blocks.0.up": ()}, "'blocks.0.up' needs at least one .* found none"),
        ({"blocks.0.up": (HALF, HALF)}, "each once, found wanda.*, wanda"),
        ({"blocks.0.up": (HALF,), "x": (HALF,)}, "unknown site 'x'"),
    ],
    ids=["none", "twice", "unknown site"],
)
def test_impossible_choices_are_refused(sites_of, choices, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace(sites_of(1), choices)
