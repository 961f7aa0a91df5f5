"""What an action means is asked of its methods; what it cannot be is said."""

from dataclasses import replace

import pytest
from toy_methods import Columns, toys

from autoprune.compression.actions import Actions
from autoprune.errors import MethodError, PluginError, PolicyError
from autoprune.policy import DENSE, Action, Layer, Policy

LAYER = Layer("blocks.0.q", (4, 8), "bfloat16", 0, "q", "blocks.0.q")
EMBEDDING = replace(LAYER, name="embed", block=None, input=None)


@pytest.fixture
def actions() -> Actions:
    return Actions(toys())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("early(keep=2)", "early"),
        ("early(loud=false, keep=3)", "early(keep=3)"),
        ("early(keep=3) + round(bits=4)", "early(keep=3) + round"),
        ("dense", "dense"),
    ],
)
def test_repeated_defaults_are_left_out(
    text: str, canonical: str, actions: Actions
) -> None:
    assert str(actions.canonical(Action.parse(text))) == canonical


def test_a_policy_is_made_canonical_site_by_site(actions: Actions) -> None:
    policy = Policy({"a": Action.parse("round(bits=4)"), "b": DENSE}, "one-shot")
    found = actions.canonical_policy(policy)
    assert found == Policy({"a": Action.parse("round"), "b": DENSE})


def test_settings_are_complete(actions: Actions) -> None:
    (step,) = Action.parse("early(loud=true)").steps
    assert actions.settings(step) == {"keep": 2, "loud": True}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("erly", PolicyError, "unknown method 'erly'. Did you mean 'early'"),
        (
            "early(kep=2)",
            MethodError,
            "unknown parameter of early 'kep'. Did you mean 'keep'",
        ),
        ("early(keep=0)", MethodError, r"early\(keep=...\) lies from 1 .* found 0"),
        ("early(keep=2.5)", MethodError, "takes a whole number, found 2.5"),
        ("early(keep=true)", MethodError, "takes a whole number, found True"),
        ("early(loud=1)", MethodError, "takes true or false, found 1"),
        ("round + early(keep=x)", MethodError, "takes a whole number, found 'x'"),
    ],
)
def test_an_impossible_action_is_refused(
    text: str, kind: type[Exception], message: str, actions: Actions
) -> None:
    with pytest.raises(kind, match=message):
        actions.canonical(Action.parse(text))


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("dense", set()),
        ("early + round", set()),
        ("norm", {"input_norm"}),
        ("round + curve", {"hessian"}),
        ("norm + curve", {"hessian", "input_norm"}),
    ],
)
def test_an_action_needs_what_its_steps_need(
    text: str, needs: set[str], actions: Actions
) -> None:
    assert actions.needs(Action.parse(text)) == needs


def test_a_statistic_that_does_not_exist_is_the_plugins_fault() -> None:
    actions = Actions({"odd": Columns("odd", frozenset({"hesian"}))})
    message = "method 'odd' needs unknown statistic 'hesian'. Did you mean 'hessian'"
    with pytest.raises(PluginError, match=message):
        actions.needs(Action.parse("odd"))


def test_storage_goes_from_step_to_step(actions: Actions) -> None:
    storage = actions.storage(LAYER, Action.parse("early(keep=2) + round(bits=4)"))
    assert (storage.kept, storage.mask, storage.bits) == (8, "bitmap", 4)
    # 8 codes of 4 bits, 4 scales in bfloat16, 32 bits of mask.
    assert storage.nbytes == 4 + 8 + 4
    assert actions.storage(LAYER, DENSE).nbytes == 64


def test_a_refusal_names_layer_action_and_reason(actions: Actions) -> None:
    action = Action.parse("early + norm")
    reason = "already pruned (bitmap)"
    assert actions.refuses(LAYER, action) == reason
    assert actions.refuses(LAYER, Action.parse("early + round")) is None
    message = r"blocks.0.q cannot take 'early \+ norm': already pruned \(bitmap\)"
    with pytest.raises(MethodError, match=message):
        actions.storage(LAYER, action)


def test_an_embedding_has_no_statistics(actions: Actions) -> None:
    reason = actions.refuses(EMBEDDING, Action.parse("round + curve(keep=3)"))
    assert reason == "curve(keep=3) needs statistics of inputs, which embed has not"
    assert actions.refuses(EMBEDDING, Action.parse("early")) is None


def test_an_identity_carries_versions(actions: Actions) -> None:
    action = Action.parse("early + round(bits=3)")
    assert actions.identity(action) == "early@1 + round(bits=3)@1"
    newer = toys()
    newer["round"].version = "2"  # type: ignore[misc]
    assert Actions(newer).identity(action) == "early@1 + round(bits=3)@2"
    assert actions.identity(DENSE) == ""
