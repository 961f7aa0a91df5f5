"""Tracing: what a description would say, found in models that have none."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from tiny_own import OwnForCausalLM, own_model
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.architecture import SiteRule, StructureRule
from autoprune.models.layers import Inventory, inventory
from autoprune.models.tracing import find_blocks, traced, traced_structures

EXPERTS = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
"""Their experts are no nn.Linear: only a description finds them."""

IDS = torch.arange(3, 15).view(2, 6)


def facts(found: Inventory) -> dict[str, Any]:
    """Everything about sites and structures, cuts included, which equality skips."""
    return {
        site.name: (
            site.kind,
            [
                (la.name, la.shape, la.block, la.role, la.input, la.cut)
                for la in site.layers
            ],
        )
        for site in (*found.sites, *found.groups)
    }


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in EXPERTS])
def test_what_is_traced_is_what_is_described(kind: str) -> None:
    model = tiny(kind)
    found = inventory(model, [])
    described = inventory(model, register_architectures())
    assert found.architecture == "traced"
    assert found.blocks == described.blocks
    assert found.tied == described.tied
    assert facts(found) == facts(described)
    assert list(facts(found)) == list(facts(described))


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (
            "gpt2",
            "no site 'attention': the rows of attn.c_attn that make a unit of "
            "attn.c_proj do not lie together",
        ),
        (
            "olmo2",
            "no site 'attention': one row of self_attn.q_proj reaches most columns of "
            "self_attn.o_proj: a norm over all of them",
        ),
        (
            "mixtral",
            "3 weights of a block are no nn.Linear and stay untouched, first "
            "mlp.gate.weight",
        ),
    ],
)
def test_what_is_not_offered_is_told(kind: str, note: str) -> None:
    first, second = inventory(tiny(kind), []).notes
    assert f"unknown architecture {kind!r}: traced in the first of 2 blocks" in first
    assert second.startswith(note)


def test_the_note_tells_what_was_found() -> None:
    (note,) = inventory(tiny("llama"), []).notes
    assert "sites qkv, o, gate_up, down; units attention of 2, mlp of 48." in note
    assert note.endswith("with the hook register_architectures if that is not so.")


def test_names_are_of_no_use() -> None:
    found, notes = traced(own_model(), "trunk.pieces")
    assert notes == ()
    assert found.model_types == ("own_transformer",)
    assert found.embedding == "trunk.table"
    assert found.sites == (
        SiteRule("qkv", ("ask", "key", "tell")),
        SiteRule("o", ("mix",)),
        SiteRule("gate_up", ("door", "wide")),
        SiteRule("down", ("back",)),
    )
    assert found.structures == (
        StructureRule("attention", "heads", ("ask", "key", "tell"), ("mix",), 2),
        StructureRule("mlp", "channels", ("door", "wide"), ("back",), 48),
    )


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
    return found


def test_units_are_those_that_a_smaller_model_lacks() -> None:
    """Cut tensors by hand, without anything of ours, and compare with zeros."""
    masked, small = own_model(), own_model()
    found = inventory(masked, [])
    kept = {"heads": torch.tensor([1]), "channels": torch.arange(0, 48, 3)}
    for group in found.groups:
        for layer in group.layers:
            cut = layer.cut
            if group.kind not in kept or cut is None:
                continue
            mask = torch.zeros(cut.units, dtype=torch.bool)
            mask[kept[group.kind]] = True
            lines = mask.repeat_interleave(cut.unit)
            axis = 0 if cut.axis == "rows" else 1
            zeroed = masked.get_submodule(layer.name)
            shrunk = small.get_submodule(layer.name)
            zeroed.weight *= lines[:, None] if axis == 0 else lines
            shrunk.weight = nn.Parameter(
                shrunk.weight.index_select(axis, lines.nonzero()[:, 0]), False
            )
            if axis == 0 and shrunk.bias is not None:
                shrunk.bias = nn.Parameter(shrunk.bias[lines], False)
    for piece in small.trunk.pieces:
        piece.queries, piece.groups = 2, 1
    assert small.trunk.pieces[0].mix.weight.shape == (32, 16)
    dense, expected = logits(own_model()), logits(small)
    torch.testing.assert_close(logits(masked), expected, rtol=0, atol=1e-5)
    assert (dense - expected).abs().max() > 0.1


def test_one_group_of_heads_cannot_go() -> None:
    found, (note,) = traced(own_model(groups=1), "trunk.pieces")
    assert [rule.name for rule in found.structures or ()] == ["mlp"]
    assert "one row of key reaches most columns of mix" in note
    assert "a single group of heads" in note


def test_only_the_first_block_runs() -> None:
    model = own_model(depth=30)
    runs: Counter[int] = Counter()
    for index, piece in enumerate(model.trunk.pieces):
        piece.register_forward_hook(lambda *_, index=index: runs.update([index]))
    found = inventory(model, [])
    assert len(found.blocks) == 30
    assert len([group for group in found.groups if group.kind == "heads"]) == 30
    assert runs.keys() == {0}
    assert runs[0] < 50


def test_nothing_of_the_model_changes() -> None:
    model = own_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inventory(model, [])
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bfloat16_is_traced_as_well() -> None:
    model = tiny("llama").to(torch.bfloat16)
    described = inventory(model, register_architectures())
    assert facts(inventory(model, [])) == facts(described)


class TestDescriptionsWin:
    def broken(self) -> Any:
        model = tiny("llama")
        model.model.layers[0].forward = None
        return model

    def test_what_is_described_never_runs(self) -> None:
        found = inventory(self.broken(), register_architectures())
        assert (found.architecture, found.notes) == ("llama", ())
        assert {group.kind for group in found.groups} >= {"heads", "channels"}

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
    def test_structures_that_are_left_open_are_traced(self, kind: str) -> None:
        model, known = tiny(kind), register_architectures()
        opened = [replace(one, structures=None) for one in known]
        found = inventory(model, opened)
        assert found.architecture == kind
        assert facts(found) == facts(inventory(model, known))

    def test_that_there_are_none_can_be_said(self) -> None:
        closed = [replace(one, structures=()) for one in register_architectures()]
        found = inventory(self.broken(), closed)
        assert {group.kind for group in found.groups} == {"block", "hidden"}
        assert found.notes == ()

    def test_structures_that_cannot_be_traced_are_told(self) -> None:
        rules, (note,) = traced_structures(self.broken(), "model.layers")
        assert rules == ()
        assert "structures could not be traced: LlamaModel does not run" in note


class TestFallback:
    def why(self, model: nn.Module) -> str:
        found = inventory(model, [])
        assert found.architecture == "unknown"
        assert all(len(site.layers) == 1 for site in found.sites)
        (note,) = found.notes
        return note.partition("it could not be traced: ")[2]

    def test_blocks_of_other_shapes(self) -> None:
        model = own_model()
        model.trunk.pieces[1].back = nn.Linear(40, 32)
        assert self.why(model) == "block 1 differs from block 0 in 'back.bias'"

    def test_blocks_of_other_modules(self) -> None:
        model = own_model()
        model.trunk.pieces[1].extra = nn.ReLU()
        assert self.why(model) == "block 1 has other modules than block 0"

    def test_weights_that_blocks_share(self) -> None:
        model = own_model()
        model.trunk.pieces[1].back = model.trunk.pieces[0].back
        assert self.why(model) == "block 1 shares weights with one before it"

    def test_weights_that_layers_share(self) -> None:
        model = own_model()
        for piece in model.trunk.pieces:
            piece.wide.weight = piece.door.weight
        assert self.why(model) == "layers of a block share their weights"

    def test_a_model_that_is_not_in_evaluation_mode(self) -> None:
        model = own_model()
        for piece in model.trunk.pieces:
            piece.first = nn.Dropout(0.5).train()
        assert "Put the model in evaluation mode" in self.why(model)

    def test_a_model_that_needs_more_than_tokens(self) -> None:
        class Picky(OwnForCausalLM):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.base_model_prefix = ""

            def forward(self, input_ids: Tensor, *, picture: Tensor) -> Any:
                return super().forward(input_ids)

        model = Picky(own_model().config).eval()
        told = self.why(model)
        assert "Picky does not run on tokens alone: TypeError" in told
        assert "picture" in told

    def test_a_model_without_an_embedding(self) -> None:
        model = nn.Module()
        model.stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        assert "Module does not tell its token embedding" in self.why(model)

    def test_bare_layers(self) -> None:
        model = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(4, 4)])})
        assert self.why(model) == "blocks are bare layers, found Linear"


def test_a_model_without_blocks_needs_a_description() -> None:
    model = own_model()
    model.trunk.pieces = nn.Sequential(*model.trunk.pieces)
    with pytest.raises(
        ModelError,
        match=r"'own_transformer' \(OwnForCausalLM\): .* hook register_architectures",
    ):
        find_blocks(model)
