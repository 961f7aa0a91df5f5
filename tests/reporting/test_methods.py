"""The table of methods holds what methods declare, and the README has the same."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from autoprune.compression.examples import (
    bits_per_weight,
    example_action,
    example_layer,
    example_step,
    example_steps,
)
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.config import RunConfig
from autoprune.errors import MethodError, PluginError
from autoprune.models.statistics import InputStatistics
from autoprune.plugins import load_plugins
from autoprune.policy import Layer
from autoprune.reporting import methods as cards
from autoprune.reporting.machine import to_json

METHODS: Mapping[str, CompressionMethod] = load_plugins().methods
README = (Path(__file__).parents[2] / "README.md").read_text()


class Bare(CompressionMethod):
    """Declares a parameter that has to be named, and no example of it."""

    name = "bare"
    reference = "a paper | with a bar"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("much", float, None, "How much.", required=True),
    )

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        return previous

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        return []


def drawn(*parts: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_an_example_that_a_layer_takes(name: str) -> None:
    card = cards.card_of(name, METHODS)
    action = example_action(METHODS[name], METHODS)
    assert card.example == str(action)
    assert action.steps[-1].method == name
    assert card.does and card.bits_per_weight is not None
    assert 0 <= card.bits_per_weight < 16
    assert card.description and card.reference


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        # 4 bits; a scale of 16 and a zero point of 4 for each 64 weights
        ("rtn", 4 + (16 + 4) / 64),
        # the same without zero point and a half byte for float zeros
        ("hqq", 4 + (16 + 16) / 64),
        ("mxfp4", 4 + 8 / 32),
        # 16 bits for half of the weights, and one bit of a mask for each
        ("wanda", 8 + 1),
        # 8 bits, and a scale of 16 for each row
        ("fp8", 8 + 16 / 1024),
        # two factors of rank 16
        ("svd", 16 * 2 * 16 / 1024),
    ],
)
def test_bits_are_those_counted_by_hand(name: str, bits: float) -> None:
    assert cards.card_of(name, METHODS).bits_per_weight == pytest.approx(bits)


def test_what_methods_do_shows_in_what_they_store() -> None:
    found = {card.name: card for card in cards.cards_of(METHODS)}
    assert found["wanda"].does == ("prunes",)
    assert found["wanda"].granularities == ("unstructured", "N:M", "tiles")
    assert found["wanda"].sites == ("layers",)
    assert found["magnitude"].sites == ("layers", "embedding")
    assert found["sparsegpt"].does == ("prunes", "quantizes")
    assert found["sparsegpt"].granularities == ("unstructured", "N:M", "rows", "groups")
    assert found["gptq"].does == ("quantizes",)
    assert found["nvfp4"].granularities == ("groups of 16",)
    assert found["fp8"].granularities == ("rows", "groups", "tensor")
    assert found["ziplm"].does == ("structure",)
    assert found["ziplm"].sites == ("channels", "heads")
    assert found["drop"].granularities == ("whole layers",)
    assert found["dsnot"].does == ("moves zeros",)
    assert found["dsnot"].example == "magnitude(sparsity=0.5) + dsnot"
    assert found["eora"].does == ("low rank",)


def test_the_step_is_the_shortest_that_says_something() -> None:
    found = {name: str(example_step(METHODS[name])) for name in METHODS}
    assert found["gptq"] == "gptq(bits=4, group=64)"
    assert found["sparsegpt"] == "sparsegpt(sparsity=0.5)"
    assert found["smoothquant"] == "smoothquant"
    assert found["heads"] == "heads(keep=0.5)"


def test_the_table_tells_parameters_needs_and_paper() -> None:
    text = drawn(cards.methods_table(cards.cards_of(METHODS)))
    for found in ("gptq", "hessian", "2210.17323", "bits: 2 to 8", "act_order = true"):
        assert found in text
    assert all(name in text for name in METHODS)


def test_one_method_is_told_in_full() -> None:
    method = METHODS["gptq"]
    text = drawn(*cards.card_parts(cards.card_of("gptq", METHODS)))
    assert "Round columns one by one" in text
    assert method.reference in text
    for one in method.parameters:
        assert one.name in text and one.help in text
    assert "must be named" in text and "2 to 8" in text
    assert "4.31 bits for a weight of a 1024 x 1024 layer in bfloat16" in text


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_rule_it_shows_can_be_read(name: str, tmp_path: Path) -> None:
    rule = cards.card_parts(cards.card_of(name, METHODS))[-1]
    assert isinstance(rule, str)
    path = tmp_path / "space.yaml"
    objective = "objective: {metric: kl, budgets: {size_bytes: 50%}}"
    text = rule.partition("\n\n")[2]
    path.write_text(f"model: demo\n{text}\n{objective}\nsearch: {{trials: 1}}\n")
    (read,) = RunConfig.from_yaml(path).space
    assert list(read.actions) == [cards.card_of(name, METHODS).example]


def test_the_words_that_a_parameter_takes_are_told() -> None:
    text = drawn(*cards.card_parts(cards.card_of("magnitude", METHODS)))
    assert "l1, l2, mean, variance" in text and "row, layer" in text
    about = json.loads(to_json(cards.card_of("fp8", METHODS)))
    assert about["parameters"][0]["choices"] == ["row", "tensor"]


def test_examples_show_every_word_once() -> None:
    found = [str(step) for step in example_steps(METHODS["magnitude"])]
    assert found == [
        "magnitude(sparsity=0.5)",
        "magnitude(pattern=2:4)",
        "magnitude(sparsity=0.5, tile=1x8)",
        "magnitude(per=layer, sparsity=0.5)",
        "magnitude(norm=l2, sparsity=0.5, tile=1x8)",
        "magnitude(norm=mean, sparsity=0.5, tile=1x8)",
        "magnitude(norm=variance, sparsity=0.5, tile=1x8)",
    ]


def test_the_first_word_stands_for_one_that_has_to_be_named() -> None:
    class Worded(Bare):
        name = "worded"
        parameters = (
            Parameter("how", str, None, "How.", choices=("b", "a"), required=True),
        )

    assert [str(step) for step in example_steps(Worded())] == [
        "worded(how=b)",
        "worded(how=a)",
    ]


def test_an_unknown_name_lists_near_misses() -> None:
    with pytest.raises(PluginError, match=r"unknown method 'gtpq'\. Did you mean 'gp"):
        cards.card_of("gtpq", METHODS)


def test_machines_read_all_that_is_declared() -> None:
    about = json.loads(to_json(cards.card_of("rtn", METHODS)))
    assert about["name"] == "rtn"
    assert about["needs"] == []
    assert about["bits_per_weight"] == 4.3125
    bits = about["parameters"][0]
    found = [bits[key] for key in ("name", "kind", "low", "high", "example")]
    assert found == ["bits", "int", 2, 8, 4]


def test_a_method_without_an_example_is_listed_all_the_same() -> None:
    methods = {**METHODS, "bare": Bare()}
    card = cards.card_of("bare", methods)
    assert (card.example, card.bits_per_weight, card.does) == (None, None, ())
    assert len(cards.cards_of(methods)) == len(METHODS) + 1
    assert "must be named" in drawn(*cards.card_parts(card))
    assert r"a paper \| with a bar |" in cards.markdown_table([card])
    with pytest.raises(MethodError, match=r"'bare' has no example.*\(none\)"):
        example_step(Bare())


def test_a_method_that_nothing_suits_says_why() -> None:
    class Never(Bare):
        name = "never"
        parameters = ()

        def refuses(self, layer: Layer, previous: Storage, settings: Settings) -> str:
            return "it never fits"

    with pytest.raises(MethodError, match="'never' suits a layer: it never fits"):
        example_action(Never(), METHODS)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (Parameter("bits", int, 4, "", 2, 8), "bits = 4 (2 to 8)"),
        (
            Parameter("sparsity", float, None, "", 0, 1, open_range=True),
            "sparsity: between 0 and 1",
        ),
        (Parameter("pattern", str, None, "", pattern=True), "pattern: N:M"),
        (Parameter("symmetric", bool, False, ""), "symmetric = false"),
        (Parameter("seed", int, 0, "", 0, 2**31 - 1), "seed = 0 (0 to 2147483647)"),
        (Parameter("tile", str, None, "", example="1x8"), "tile: such as 1x8"),
        (Parameter("word", str, None, ""), "word: word"),
        (
            Parameter("word", str, "a", "", choices=("b", "a", "c")),
            "word = a (or b, c)",
        ),
        (Parameter("word", str, None, "", choices=("b", "a")), "word: b, a"),
    ],
)
def test_parameters_are_written_like_actions(parameter: Parameter, text: str) -> None:
    assert cards.parameter_text(parameter) == text


def test_bits_of_the_dense_layer_are_those_of_its_type() -> None:
    assert bits_per_weight(Storage.dense(example_layer(METHODS["rtn"]))) == 16


def test_the_readme_has_the_table_that_the_command_prints() -> None:
    between = r"<!-- autoprune methods --markdown -->\n\n(.*?)\n\n<!-- end -->"
    (found,) = re.findall(between, README, re.DOTALL)
    printed = cards.markdown_table(cards.cards_of(METHODS))
    assert found == printed, "put what `autoprune methods --markdown` prints there"
