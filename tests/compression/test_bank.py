"""Variants are made once, from the right inputs, and put where they belong."""

import logging
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_banks import Bench, best_columns, inputs_of, kept_columns, same
from tiny_models import tiny
from torch import Tensor, nn
from toy_methods import Columns, Round, Toy
from transformers import LlamaForCausalLM

from autoprune.compression.apply import StitchedModel
from autoprune.compression.method import Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError, PluginError, StoreError
from autoprune.models.layers import read_weight
from autoprune.models.statistics import InputStatistics
from autoprune.policy import DENSE, Action, Layer

EARLY, NORM, CURVE = map(
    Action.parse, ("early(keep=8)", "norm(keep=8)", "curve(keep=8)")
)
ROUND = Action.parse("round(bits=4)")
BOTH = Action.parse("round + norm(keep=8)")


@pytest.fixture
def bench(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Bench:
    return Bench(tiny_model, tmp_path)


def test_dense_is_the_weight_that_was_loaded(bench: Bench) -> None:
    bank, layer = bench.bank(), bench.layers[0]
    before = read_weight(bench.model, layer).clone()
    bank.put({layer: EARLY})
    assert torch.equal(bank.get(layer, DENSE).weight, before)
    assert bank.get(layer, DENSE).storage == Storage.dense(layer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_statistics_are_those_of_what_the_layers_read(
    kind: str, tmp_path: Path
) -> None:
    bench = Bench(tiny(kind), tmp_path)
    bank = bench.bank()
    pairs = [(layer, action) for layer in bench.layers for action in (NORM, CURVE)]
    assert bank.make(pairs) == len(pairs)
    for layer, action in pairs:
        expected = best_columns(inputs_of(bench.model, layer))
        assert kept_columns(bank.get(layer, action)) == expected
    assert {call.tokens for call in bench.toys["norm"].calls} == {60}


def test_an_expert_is_made_from_the_tokens_that_it_gets(tmp_path: Path) -> None:
    bench = Bench(tiny("mixtral"), tmp_path)
    bank = bench.bank()
    experts = [layer for layer in bench.layers if "gate_up" in layer.name]
    bank.make([(layer, NORM) for layer in experts])
    calls = bench.toys["norm"].calls
    assert [call.layers for call in calls] == [[layer.name] for layer in experts]
    for block in (0, 1):  # each token goes to 2 of 4 experts
        assert sum(call.tokens for call in calls[4 * block : 4 * block + 4]) == 120
    assert all(0 < call.tokens < 60 for call in calls)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss", "gemma3"])
def test_a_policy_is_put_and_taken_off_again(kind: str, tmp_path: Path) -> None:
    bench = Bench(tiny(kind), tmp_path)
    before = {name: t.clone() for name, t in bench.model.state_dict().items()}
    bank = bench.bank()
    wanted = {la: NORM if i % 2 else EARLY for i, la in enumerate(bench.layers)}
    assert bank.put(wanted) == len(wanted)
    for layer, action in wanted.items():
        assert torch.equal(
            read_weight(bench.model, layer), bank.get(layer, action).weight
        )
    assert bank.put({}) == len(wanted)
    after = bench.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def written(model: nn.Module, layer: Layer) -> tuple[int, int]:
    """Tell a weight apart from another in its place, or in the same memory."""
    weight = read_weight(model, layer)
    return weight.data_ptr(), weight._version


def test_only_changed_layers_are_rewritten(bench: Bench) -> None:
    bank, (first, second, third) = bench.bank(), bench.layers[:3]
    assert bank.put({first: EARLY, second: EARLY}) == 2
    before = {la: written(bench.model, la) for la in bench.layers}
    assert bank.put({first: EARLY, second: ROUND, third: EARLY}) == 2
    assert bank.put({first: EARLY, second: ROUND, third: EARLY}) == 0
    changed = {la for la in bench.layers if written(bench.model, la) != before[la]}
    assert changed == {second, third}


def test_equal_actions_of_two_banks_are_two_weights(bench: Bench) -> None:
    """Whether their variants are made now or lie in the store."""
    last = bench.layers[-1]
    wanted = {last: CURVE}
    reference = {layer: EARLY for layer in bench.layers if layer.block == 0}
    banks = [bench.bank(), bench.bank(reference)]
    expected = [bank.get(last, CURVE).weight for bank in banks]
    assert not torch.equal(*expected)
    for _ in range(2):
        for bank, weight in zip(banks, expected, strict=True):
            assert bank.put(wanted) == 1
            assert torch.equal(read_weight(bench.model, last), weight)
            assert bank.put(wanted) == 0


def test_making_for_one_bank_leaves_nothing_wrong_for_another(bench: Bench) -> None:
    layer, other = bench.layers[-1], bench.layers[-2]
    one, two = bench.bank(), bench.bank({bench.layers[0]: EARLY})
    one.put({layer: CURVE})
    two.make([(other, CURVE)])
    one.put({layer: CURVE})
    assert torch.equal(read_weight(bench.model, layer), one.get(layer, CURVE).weight)


def test_a_variant_is_made_once(bench: Bench) -> None:
    layer = bench.layers[0]
    pairs = [(layer, EARLY), (layer, NORM), (layer, DENSE), (layer, EARLY)]
    assert bench.bank().make(pairs) == 2
    assert bench.bank().make(pairs) == 0  # another bank on the same inputs
    bench.bank().get(layer, NORM)
    bench.bank().put({layer: NORM})
    assert (bench.calls("early"), bench.calls("norm")) == (1, 1)


def test_layers_with_one_input_go_together(bench: Bench) -> None:
    bench.bank().make([(layer, NORM) for layer in bench.layers])
    groups = [
        [n.rpartition(".")[2] for n in c.layers] for c in bench.toys["norm"].calls
    ]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert groups == 2 * [*block, ["gate_proj", "up_proj"], ["down_proj"]]


def test_settings_go_together_and_first_steps_are_shared(bench: Bench) -> None:
    layer = bench.layers[0]
    texts = [
        "norm(keep=8)",
        "norm(keep=8) + round(bits=4)",
        "norm(keep=8) + round(bits=3)",
        "norm(keep=4) + round(bits=3)",
        "round(bits=3)",
    ]
    actions = [Action.parse(text) for text in texts]
    bank = bench.bank()
    assert bank.make([(layer, action) for action in actions]) == 5
    assert [call.settings for call in bench.toys["norm"].calls] == [[8.0, 4.0]]
    rounds = [(call.settings, call.masked) for call in bench.toys["round"].calls]
    assert rounds == [([3], False), ([4, 3], True), ([3], True)]
    for action in actions:
        alone = Bench(tiny_copy(bench.model), bench.store.folder / str(action)[:16])
        assert same(alone.bank().get(layer, action), bank.get(layer, action))


def tiny_copy(model: nn.Module) -> nn.Module:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_a_later_step_sees_the_earlier_one(bench: Bench) -> None:
    layer = bench.layers[0]
    variant = bench.bank().get(layer, Action.parse("early(keep=8) + round(bits=4)"))
    dense = bench.stitched.dense_weight(layer)
    assert variant.storage.mask == "bitmap" and variant.storage.bits == 4
    assert kept_columns(variant) == list(range(8))
    assert not variant.weight[:, 8:].any()
    step = dense[:, :8].abs().amax(1, keepdim=True) / 7
    assert ((variant.weight - dense)[:, :8].abs() <= 0.5001 * step).all()


def test_a_key_depends_on_what_the_variant_does(bench: Bench) -> None:
    reference = dict.fromkeys(bench.layers, EARLY)
    first, second = bench.layers[:2]
    bank = bench.bank()
    others = {
        "text": bench.bank(seed=1),
        "reference": bench.bank(reference),
        "revision": bench.bank(revision="r2"),
    }
    for name, other in others.items():
        assert other.key(first, NORM) != bank.key(first, NORM), name
        assert other.key(first, BOTH) != bank.key(first, BOTH), name
    for name in ("text", "reference"):  # early needs no statistics
        assert others[name].key(first, EARLY) == bank.key(first, EARLY)
    assert others["revision"].key(first, EARLY) != bank.key(first, EARLY)
    assert bank.key(first, EARLY) != bank.key(second, EARLY)
    assert bank.key(first, EARLY) != bank.key(first, ROUND)
    before = bank.key(first, EARLY), others["reference"].name
    bench.toys["early"].version = "2"  # type: ignore[misc]
    assert bank.key(first, EARLY) != before[0]
    assert bench.bank(reference).name != before[1]


def test_dense_layers_of_a_reference_do_not_count(bench: Bench) -> None:
    dense = bench.bank(dict.fromkeys(bench.layers, DENSE))
    assert dense.name == bench.bank().name


def test_the_type_of_computation_counts(bench: Bench, tmp_path: Path) -> None:
    half = Bench(tiny_copy(bench.model), tmp_path)
    half.stitched = StitchedModel(
        half.model, half.found.layers, compute_dtype=torch.bfloat16
    )
    layer = bench.layers[0]
    assert half.bank().key(layer, NORM) != bench.bank().key(layer, NORM)
    assert half.bank().key(layer, EARLY) == bench.bank().key(layer, EARLY)


@pytest.mark.parametrize("action", [EARLY, NORM], ids=str)
def test_a_reference_gives_propagated_inputs(bench: Bench, action: Action) -> None:
    plain = bench.bank()
    bank = bench.bank(dict.fromkeys(bench.layers, action))
    down = [layer for layer in bench.layers if layer.role == "down_proj"]
    bank.make([(layer, CURVE) for layer in down])
    assert set(bench.stitched.actions.values()) == {DENSE}
    # The first block reads dense inputs, and its down projection those of dense gates.
    assert same(bank.get(down[0], CURVE), plain.get(down[0], CURVE))
    assert not same(bank.get(down[1], CURVE), plain.get(down[1], CURVE))
    bank.put({layer: action for layer in bench.layers if layer.block == 0})
    expected = best_columns(inputs_of(bench.model, down[1]))
    assert kept_columns(bank.get(down[1], CURVE)) == expected


def test_a_reference_compresses_the_embedding_too(bench: Bench) -> None:
    embedding, *blocks = bench.found.layers
    assert embedding.block is None
    bank = bench.bank({embedding: EARLY})
    first = next(layer for layer in blocks if layer.role == "down_proj")
    bank.make([(first, CURVE)])
    assert set(bench.stitched.actions.values()) == {DENSE}
    assert not same(bank.get(first, CURVE), bench.bank().get(first, CURVE))
    bank.put({embedding: EARLY})
    expected = best_columns(inputs_of(bench.model, first))
    assert kept_columns(bank.get(first, CURVE)) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_every_layer_behind_a_reference_reads_what_it_leaves(
    kind: str, tmp_path: Path
) -> None:
    """Whether a pass makes the variants of the reference, or finds them."""
    bench = Bench(tiny(kind), tmp_path)
    first = {layer: NORM for layer in bench.layers if layer.block == 0}
    behind = [layer for layer in bench.layers if layer.block == 1]
    made, found = bench.bank(first), bench.bank(first)
    made.make([(layer, CURVE) for layer in behind])
    found.make([(layer, NORM) for layer in behind])
    assert bench.calls("norm") == sum(
        len({layer.input for layer in layers}) for layers in (first, behind)
    )
    found.put(first)
    for layer in behind:
        expected = best_columns(inputs_of(bench.model, layer))
        for action in (CURVE, NORM):
            assert kept_columns(found.get(layer, action)) == expected


@pytest.mark.parametrize("action", [EARLY, NORM], ids=str)
def test_a_block_is_dense_again_after_it_was_passed(
    bench: Bench, action: Action
) -> None:
    """Else the weights of all blocks so far would stay in memory."""
    dense = {layer: read_weight(bench.model, layer) for layer in bench.layers}
    told = []

    def look(done: int, total: int) -> None:
        told.append(done)
        assert set(bench.stitched.actions.values()) == {DENSE}
        for layer, weight in dense.items():  # no copy either
            assert read_weight(bench.model, layer).data_ptr() == weight.data_ptr()

    bank = bench.bank(dict.fromkeys(bench.layers, action))
    other = Action.parse("norm(keep=4)")  # now the reference is in the store
    bank.make([(layer, CURVE) for layer in bench.layers], look)
    bank.make([(layer, other) for layer in bench.layers], look)
    assert told == [0, 1, 2] * 2


class Watching(Columns):
    """Counts the Hessians of earlier calls that somebody still holds."""

    def __init__(self) -> None:
        super().__init__("curve", frozenset({"hessian"}))
        self.seen: list[weakref.ref[Tensor]] = []
        self.held: list[int] = []

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        assert statistics.hessian is not None
        self.held.append(sum(seen() is not None for seen in self.seen))
        self.seen.append(weakref.ref(statistics.hessian))
        return super().compress(sources, statistics, settings)


def test_a_hessian_goes_as_soon_as_its_layers_are_made(bench: Bench) -> None:
    bench.toys["curve"] = watching = Watching()
    bank = bench.bank(dict.fromkeys(bench.layers, CURVE))
    bank.make([(layer, CURVE) for layer in bench.layers])
    assert watching.held == [0] * 8
    assert [seen() for seen in watching.seen] == [None] * 8


def test_making_leaves_on_the_model_what_was_there(bench: Bench) -> None:
    bank, layer = bench.bank(), bench.layers[0]
    bank.put({layer: EARLY, bench.layers[9]: NORM})
    before = {name: t.clone() for name, t in bench.model.state_dict().items()}
    actions = dict(bench.stitched.actions)
    bank.make([(other, CURVE) for other in bench.layers])
    assert bench.stitched.actions == actions
    after = bench.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    # The statistics came from the dense model all the same.
    bank.put({})
    assert kept_columns(bank.get(bench.layers[9], CURVE)) == best_columns(
        inputs_of(bench.model, bench.layers[9])
    )


def test_progress_is_told_block_by_block(bench: Bench) -> None:
    told: list[tuple[int, int]] = []
    bench.bank().make(
        [(layer, NORM) for layer in bench.layers],
        lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_blocks_behind_the_last_wanted_one_are_not_run(bench: Bench) -> None:
    told: list[tuple[int, int]] = []
    bench.bank().make(
        [(bench.layers[0], NORM)], lambda done, total: told.append((done, total))
    )
    assert told == [(0, 1), (1, 1)]


def damage(bench: Bench, key: str) -> None:
    path = bench.store.folder / key[:2] / f"{key}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_variant_is_made_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bank, layer = bench.bank(), bench.layers[0]
    first = bank.get(layer, NORM)
    damage(bench, bank.key(layer, NORM))
    with caplog.at_level(logging.WARNING):
        assert same(bank.get(layer, NORM), first)
        damage(bench, bank.key(layer, NORM))
        assert bank.put({layer: NORM}) == 1
    assert torch.equal(read_weight(bench.model, layer), first.weight)
    assert caplog.text.count("is damaged (its checksum does not match)") == 2
    assert bench.calls("norm") == 3


@pytest.mark.parametrize("action", [EARLY, NORM], ids=str)
def test_a_damaged_variant_of_the_reference_is_made_again(
    bench: Bench, action: Action, caplog: pytest.LogCaptureFixture
) -> None:
    bank = bench.bank(dict.fromkeys(bench.layers, action))
    layer = bench.layers[-1]
    first = bank.get(layer, CURVE)
    shutil.rmtree(bench.store.folder / bank.key(layer, CURVE)[:2])
    damage(bench, bank.key(bench.layers[0], action))
    assert same(bank.get(layer, CURVE), first)
    assert caplog.text.count("is damaged") == 1


def test_a_refusal_speaks_before_anything_is_made(bench: Bench) -> None:
    bank, layer = bench.bank(), bench.layers[0]
    twice = Action.parse("early + norm")
    message = rf"{layer.name} cannot take 'early \+ norm': already pruned \(bitmap\)"
    for ask in (
        lambda: bank.get(layer, twice),
        lambda: bank.make([(bench.layers[1], EARLY), (layer, twice)]),
        lambda: bank.put({bench.layers[1]: EARLY, layer: twice}),
    ):
        with pytest.raises(MethodError, match=message):
            ask()
    assert bench.calls("early") == 0
    embedding = bench.found.layers[0]
    with pytest.raises(
        MethodError, match="norm.* needs statistics of inputs, which mo"
    ):
        bank.get(embedding, NORM)
    assert bank.get(embedding, EARLY).storage.kept == 8 * 256


class Failing(Columns):
    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        raise ZeroDivisionError("float division by zero")


class Short(Round):
    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        return super().compress(sources, statistics, settings)[1:]


class Liar(Round):
    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        return replace(super().storage(layer, previous, settings), bits=2)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        (
            Failing("norm", frozenset({"input_norm"})),
            "norm",
            "method 'norm' of .*test_bank failed on .*q_proj, .*k_proj, .*v_proj under "
            "norm: ZeroDivisionError: float division by zero",
        ),
        (
            Short(),
            "norm + round",
            r"method 'round' of .* gave \[1, 1\] variants for .* under round; expected "
            "1 for each of 3 layers",
        ),
        (
            Liar(),
            "round(bits=4)",
            r"q_proj under 'round\(bits=4\)' stores .*bits=4.*methods declare .*bits=2",
        ),
    ],
    ids=["raises", "too-few", "lies"],
)
def test_a_broken_method_is_named(
    method: Toy, text: str, message: str, bench: Bench
) -> None:
    bench.toys[method.name] = method
    bank = bench.bank()
    bank.put({bench.layers[5]: EARLY})
    before = {name: t.clone() for name, t in bench.model.state_dict().items()}
    with pytest.raises(PluginError, match=message):
        bank.make([(layer, Action.parse(text)) for layer in bench.layers])
    after = bench.model.state_dict()  # what was on the model is back on it
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_store_that_holds_not_one_variant_is_an_error(bench: Bench) -> None:
    bench.store.cap_bytes = 100
    message = r"q_proj under 'early\(keep=8\)' is gone .* too small \(cap 100 bytes\)"
    with pytest.raises(StoreError, match=message):
        bench.bank().put({bench.layers[0]: EARLY})
    assert set(bench.stitched.actions.values()) == {DENSE}


def test_a_small_store_makes_variants_again(bench: Bench) -> None:
    bench.store.cap_bytes = 3_000  # some two variants
    bank = bench.bank()
    wanted = dict.fromkeys(bench.layers, EARLY)
    assert bank.put(wanted) == len(wanted)
    for layer in wanted:
        expected = read_weight(bench.model, layer).clone()
        assert torch.equal(bank.get(layer, EARLY).weight, expected)
    assert bench.calls("early") > len(wanted)
