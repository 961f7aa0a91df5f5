"""A model's variants from the statistics of the model that it was tuned from."""

from pathlib import Path

import pytest
import torch
from tiny_banks import Bench, best_columns, inputs_of, kept_columns, same, windows
from tiny_models import tiny

from autoprune.compression.actions import Actions
from autoprune.compression.bank import VariantBank
from autoprune.compression.mixed import MixedBank
from autoprune.compression.reusing import ReusingBank
from autoprune.errors import MethodError, PolicyError
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer

NORM, ROUND = Action.parse("norm(keep=8)"), Action.parse("round(bits=4)")


def sibling_of(bench: Bench) -> None:
    """Change all weights a little, as tuning does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in bench.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * parameter.std() * noise


@pytest.fixture
def original(tmp_path: Path) -> Bench:
    return Bench(tiny("llama"), tmp_path)


@pytest.fixture
def sibling(tmp_path: Path) -> Bench:
    bench = Bench(tiny("llama"), tmp_path)
    sibling_of(bench)
    return bench


def reusing(sibling: Bench, origin: VariantBank, revision: str = "s1") -> VariantBank:
    return ReusingBank.of(sibling.bank(revision=revision), origin)


def test_statistics_are_the_originals(original: Bench, sibling: Bench) -> None:
    bank = reusing(sibling, original.bank())
    bank.make([(layer, NORM) for layer in sibling.layers])
    differs = 0
    for layer in sibling.layers:
        found = kept_columns(bank.get(layer, NORM))
        assert found == best_columns(inputs_of(original.model, layer)), layer.name
        differs += found != best_columns(inputs_of(sibling.model, layer))
    assert differs > len(sibling.layers) / 2  # else the test would tell nothing


def test_weights_are_the_siblings_own(original: Bench, sibling: Bench) -> None:
    bank, layer = reusing(sibling, original.bank()), sibling.layers[-1]
    variant = bank.get(layer, NORM)
    dense = sibling.model.get_parameter(f"{layer.name}.weight")
    kept = kept_columns(variant)
    assert torch.equal(variant.weight[:, kept], dense[:, kept])


@pytest.mark.parametrize("end", ["reference", "dense"])
def test_the_original_itself_gets_the_variants_that_it_has(
    original: Bench, end: str, tmp_path: Path
) -> None:
    # With methods that solve: the Hessian, its inputs and the order of sums all count.
    original.toys = load_plugins().methods
    solved = Action.parse("sparsegpt(sparsity=0.5)")
    reference = dict.fromkeys(original.layers, solved) if end == "reference" else {}
    origin = original.bank(reference)
    again = Bench(tiny("llama"), tmp_path / "again")
    again.toys = original.toys
    bank = reusing(again, origin)
    pairs = [(layer, solved) for layer in again.layers]
    assert bank.make(pairs) == len(pairs)
    for pair in pairs:
        assert bank.key(*pair) not in origin.store
        assert same(bank.get(*pair), origin.get(*pair))


@pytest.mark.parametrize(
    "text",
    ["wanda(pattern=2:4) + rtn(bits=4)", "flap(keep=0.5)", "slicegpt(keep=0.75)"],
)
def test_steps_structures_and_the_hidden_state_take_them_over(
    original: Bench, text: str, tmp_path: Path
) -> None:
    original.toys = load_plugins().methods
    again = Bench(tiny("llama"), tmp_path / "again")
    again.toys = original.toys
    actions = Actions(original.toys)
    action = actions.canonical(Action.parse(text))
    origin = original.bank()
    layers = again.found.layers
    layers = [la for la in layers if actions.refuses(la, action) is None]
    assert len(layers) > 3
    bank = reusing(again, origin)
    bank.make([(layer, action) for layer in layers])
    for layer in layers:
        assert same(bank.get(layer, action), origin.get(layer, action))


def test_the_originals_own_variants_are_made_only_for_its_reference(
    original: Bench, sibling: Bench
) -> None:
    first = original.layer("0.self_attn.q_proj")
    origin = original.bank({first: NORM})
    bank = reusing(sibling, origin)
    wanted = [(layer, NORM) for layer in sibling.layers]
    bank.make(wanted)
    assert bank.missing(wanted) == []
    lacking = {layer for layer, _ in origin.missing(wanted)}
    assert lacking == set(original.layers) - {first}
    assert all(action == Action() for action in original.stitched.actions.values())


def test_a_pass_is_made_once(original: Bench, sibling: Bench) -> None:
    bank, pairs = reusing(sibling, original.bank()), [(sibling.layers[0], NORM)]
    assert bank.make(pairs) == 1
    calls = original.calls("norm"), sibling.calls("norm")
    assert calls == (0, 1)
    assert bank.make(pairs) == 0
    assert (original.calls("norm"), sibling.calls("norm")) == calls


def test_keys_tell_both_ways_apart(original: Bench, sibling: Bench) -> None:
    anew, origin = sibling.bank(revision="s1"), original.bank()
    layer = sibling.layers[0]
    found = {
        anew.key(layer, NORM),
        reusing(sibling, origin).key(layer, NORM),
        reusing(sibling, origin, "s2").key(layer, NORM),
        reusing(sibling, original.bank(seed=1)).key(layer, NORM),
        reusing(sibling, original.bank(revision="r2")).key(layer, NORM),
        reusing(sibling, original.bank({layer: NORM})).key(layer, NORM),
        origin.key(layer, NORM),
    }
    assert len(found) == 7
    # What needs no statistics is the same either way, and is made once.
    assert reusing(sibling, origin).key(layer, ROUND) == anew.key(layer, ROUND)


def test_a_mixed_original_gives_each_layer_its_own_inputs(
    original: Bench, sibling: Bench
) -> None:
    plain = original.bank()
    changed = original.bank(dict.fromkeys(original.layers, NORM))
    taken = frozenset(la for la in original.layers if la.role == "o_proj")
    bank = reusing(sibling, MixedBank.of(plain, changed, taken))
    for layer in sibling.layers:
        origin = changed if layer.role == "o_proj" else plain
        alone = reusing(sibling, origin)
        assert bank.key(layer, NORM) == alone.key(layer, NORM)
        assert same(bank.get(layer, NORM), alone.get(layer, NORM))


def test_gradients_are_refused(original: Bench, sibling: Bench) -> None:
    sibling.toys = load_plugins().methods
    bank, layer = reusing(sibling, original.bank()), sibling.layers[0]
    steep = Action.parse("gblm(sparsity=0.5) + rtn(bits=4)")
    message = r"q_proj under 'gblm.*gblm reads .*no other model's text.*anew"
    with pytest.raises(MethodError, match=message):
        bank.make([(layer, steep)])
    assert bank.missing([(layer, steep)]) == [(layer, steep)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, "gate_proj is 48 x 32.*and there 64 x 32"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*there is none"),
        ({"num_key_value_heads": 4}, r"q_proj is 32 x 32, 2 heads of 16 rows"),
    ],
    ids=["width", "depth", "heads"],
)
def test_another_shape_is_refused(
    changes: dict[str, int], message: str, sibling: Bench, tmp_path: Path
) -> None:
    other = Bench(tiny("llama", **changes), tmp_path)
    bank = reusing(sibling, other.bank())
    wanted: list[tuple[Layer, Action]] = [(la, NORM) for la in sibling.layers]
    with pytest.raises(PolicyError, match=message):
        bank.make(wanted)
    assert len(bank.missing(wanted)) == len(wanted)


def test_text_is_run_through_the_original_only(original: Bench, sibling: Bench) -> None:
    ran: list[str] = []
    for name, bench in (("original", original), ("sibling", sibling)):
        for module in bench.model.modules():
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    reusing(sibling, original.bank()).make([(la, NORM) for la in sibling.layers])
    assert set(ran) == {"original"}
    assert windows().ids.numel()
