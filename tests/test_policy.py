"""Actions and policies: text in, text out, and equal when their texts are."""

import json
import re
from dataclasses import replace
from itertools import product

import pytest

from autoprune.errors import PolicyError
from autoprune.policy import (
    DENSE,
    Action,
    Layer,
    Policy,
    Site,
    Step,
    digest,
    format_value,
    parse_value,
)

Q = Layer("blocks.0.q", (8, 4), "float32", 0, "q", "blocks.0.q")
K = Layer("blocks.0.k", (2, 4), "float32", 0, "k", "blocks.0.q")
O = Layer("blocks.0.o", (4, 8), "float32", 0, "o", "blocks.0.o")  # noqa: E741
SITES = (Site("blocks.0.qk", (Q, K)), Site("blocks.0.o", (O,)))
HALF = Action.parse("wanda(sparsity=0.5)")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dense", "dense"),
        ("  dense ", "dense"),
        ("rtn", "rtn"),
        ("rtn()", "rtn"),
        ("rtn( group=64,bits = 4 )", "rtn(bits=4, group=64)"),
        ("rtn(bits=4,)", "rtn(bits=4)"),
        (
            "sparsegpt(pattern=2:4)+gptq(bits=4)",
            "sparsegpt(pattern=2:4) + gptq(bits=4)",
        ),
        ("a-b_c(x=TRUE, y=0.50)", "a-b_c(x=true, y=0.5)"),
        ("a(x=1e+20) + b(y=-3)", "a(x=1e+20) + b(y=-3)"),
    ],
)
def test_an_action_is_read_and_written(text: str, canonical: str) -> None:
    action = Action.parse(text)
    assert str(action) == canonical
    assert Action.parse(canonical) == action
    assert hash(Action.parse(canonical)) == hash(action)


@pytest.mark.parametrize(
    ("one", "other"),
    [("m(x=1)", "m(x=true)"), ("m(x=1)", "m(x=1.0)"), ("m(x=0)", "m(x=false)")],
)
def test_actions_of_other_texts_differ(one: str, other: str) -> None:
    assert Action.parse(one) != Action.parse(other)
    assert len({Action.parse(one), Action.parse(other)}) == 2


def test_an_action_is_not_its_text() -> None:
    assert Step("rtn") != "rtn"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", "cannot read '' in the action ''"),
        ("Rtn", "cannot read 'Rtn'"),
        ("rtn(bits=4", "cannot read 'rtn(bits=4'"),
        ("rtn + dense", "cannot read 'dense' in the action 'rtn + dense'"),
        ("rtn + + gptq", "cannot read '' in the action 'rtn + + gptq'"),
        ("rtn(bits)", "cannot read 'bits' in the action 'rtn(bits)'"),
        ("rtn(bits=)", "cannot read 'bits='"),
        ("rtn(2bits=3)", "cannot read '2bits=3'"),
        ("rtn(bits=4, bits=8)", "cannot read 'bits=8'"),
        ("rtn(bits=4 8)", "cannot read 'bits=4 8'"),
    ],
)
def test_what_is_no_action_is_quoted(text: str, quoted: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(quoted)):
        Action.parse(text)


def test_an_action_that_is_no_text_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"such as 'wanda\(sparsity=0.5\)', found 4"):
        Action.parse(json.loads("4"))


def test_lists_stand_for_one_action_each() -> None:
    found = Action.parse_all("a(x=[1, 2]) + b(y=[3,4 , 5], z=w)")
    expected = [f"a(x={x}) + b(y={y}, z=w)" for x, y in product((1, 2), (3, 4, 5))]
    assert [str(action) for action in found] == expected
    assert Action.parse_all("dense") == (DENSE,)


@pytest.mark.parametrize("text", ["a(x=[1, 2)", "a(x=[])", "a(x=[1,,2])"])
def test_a_broken_list_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match=r"cannot read 'x=\[?"):
        Action.parse_all(text)


@pytest.mark.parametrize("value", [4, -1, 0.5, 1e-5, True, False, "2:4", "row"])
def test_a_value_survives_its_text(value: int | float | bool | str) -> None:
    found = parse_value(format_value(value))
    assert found == value
    assert type(found) is type(value)


def test_a_policy_survives_json() -> None:
    policy = Policy({"blocks.0.qk": HALF, "blocks.0.o": DENSE})
    data = json.loads(json.dumps(policy.to_dict()))
    assert data == {
        "format": 1,
        "schedule": "one-shot",
        "actions": {"blocks.0.qk": "wanda(sparsity=0.5)", "blocks.0.o": "dense"},
    }
    assert Policy.from_dict(data) == policy
    assert Policy.from_dict({"actions": data["actions"]}) == policy


def test_a_schedule_is_read_as_an_action_is() -> None:
    told = "iterative( rounds=2 )+lora(tokens=64, rank=8)"
    policy = Policy.from_dict({"actions": {}, "schedule": told})
    assert policy.schedule == "iterative(rounds=2) + lora(rank=8, tokens=64)"
    assert policy.fingerprint != Policy({}).fingerprint


def test_a_fingerprint_names_what_a_policy_does() -> None:
    policy = Policy({"a": HALF, "b": DENSE})
    turned = Policy({"b": DENSE, "a": HALF})
    assert policy.fingerprint == turned.fingerprint
    assert policy == turned and hash(policy) == hash(turned)
    assert re.fullmatch(r"[0-9a-f]{16}", policy.fingerprint)
    assert policy.fingerprint != Policy({"a": DENSE, "b": HALF}).fingerprint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "it has no 'actions'"),
        ([], "it has no 'actions'"),
        ({"actions": ["rtn"]}, r"an action for every site, found \['rtn'\]"),
        ({"actions": {}, "format": 2}, "has format 2, this AutoPrune reads up to 1"),
        ({"actions": {}, "format": "1"}, "has format '1'"),
        ({"actions": {}, "format": 0}, "has format 0"),
        (
            {"actions": {}, "schedule": "one-shot("},
            r"its schedule: cannot read 'one-shot\('",
        ),
        (
            {"actions": {}, "schedule": None},
            "its schedule: an action is text such as",
        ),
        ({"actions": {"a": "rtn("}}, r"cannot read 'rtn\('"),
        ({"actions": {"a": None}}, "found None"),
    ],
)
def test_what_is_no_policy_is_refused(data: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.from_dict(data)


def test_every_layer_of_a_site_gets_its_action() -> None:
    policy = Policy({"blocks.0.o": DENSE, "blocks.0.qk": HALF})
    assert policy.per_layer(SITES) == {Q: HALF, K: HALF, O: DENSE}
    assert Policy.uniform(SITES, HALF).per_layer(SITES) == dict.fromkeys(
        (Q, K, O), HALF
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.o"], "covers 1 of 2 .* 0 others; .* an action: 'blocks.0.qk'"),
        (["blocks.0.o", "blocks.0.qk", "x"], "2 of 2 .* 1 others; .* lacks: 'x'"),
        (["x"], "covers 0 of 2 .*: 'blocks.0.qk'; first that the model lacks: 'x'"),
    ],
    ids=["missing", "extra", "both"],
)
def test_a_policy_of_another_model_is_refused(names: list[str], message: str) -> None:
    policy = Policy(dict.fromkeys(names, HALF))
    with pytest.raises(PolicyError, match=message):
        policy.per_layer(SITES)


def test_layers_of_a_site_may_each_have_their_own_action() -> None:
    parts = [SITES[0].part(layer) for layer in (Q, K)]
    policy = Policy({parts[0]: HALF, parts[1]: DENSE, "blocks.0.o": HALF})
    assert policy.per_layer(SITES) == {Q: HALF, K: DENSE, O: HALF}
    del policy.actions[parts[1]]  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="covers 1 of 2 .* 1 others"):
        policy.per_layer(SITES)


def test_a_policy_is_a_mapping() -> None:
    policy = Policy({"a": HALF})
    assert dict(policy) == {"a": HALF}
    assert len(policy) == 1 and policy["a"] is HALF


def test_weights_are_counted() -> None:
    assert Q.numel == 32
    assert SITES[0].numel == 40


def test_a_digest_tells_contents_not_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(["a", "b"]) != digest(["b", "a"])
    assert digest(replace(Q, block=1).block) == digest(1)
