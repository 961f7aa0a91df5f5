"""Which layers belong together, and their units: blocks with answers known by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.models.architecture import StructureRule
from autoprune.models.tracing import traced

WIDTH, HEADS = 16, 4


class Host(nn.Module):
    """Hands tokens to one block; no model of any library."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList([block])

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> Any:
        return self.layers[0](self.table(ids))


class Block(nn.Module):
    """Layers by name and shape, and what they do."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Linear(columns, rows))


class Mlp(Block):
    def __init__(self) -> None:
        super().__init__(up=(24, WIDTH), down=(WIDTH, 24))

    def inner(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(x))


class Attention(Block):
    """Attention over one fused matrix; ``split`` tells queries, keys and values."""

    def __init__(self) -> None:
        super().__init__(fused=(3 * WIDTH, WIDTH), out=(WIDTH, WIDTH))

    def split(self, fused: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.fused(x)).transpose(2, 3).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def found_in(block: nn.Module) -> tuple[tuple[StructureRule, ...], list[str]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
        architecture, notes = traced(Host(block).eval(), "layers")
    assert architecture.structures is not None
    return architecture.structures, list(notes)


def mlp(units: int = 24, name: str = "mlp") -> tuple[StructureRule, ...]:
    return (StructureRule(name, "channels", ("up",), ("down",), units),)


def test_channels() -> None:
    assert found_in(Mlp()) == (mlp(), [])


def test_channels_that_no_token_switches_on() -> None:
    block = Mlp()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(block.up.weight, std=0.1)
        nn.init.constant_(block.up.bias, -50.0)
        architecture, _ = traced(Host(block).eval(), "layers")
    assert architecture.structures == mlp()


def test_channels_that_go_in_groups() -> None:
    class Grouped(Mlp):
        def inner(self, x: Tensor) -> Tensor:
            parts = functional.silu(self.up(x)).unflatten(-1, (6, 4))
            return functional.layer_norm(parts, (4,)).flatten(-2)

    assert found_in(Grouped()) == (mlp(6), [])


def test_a_norm_over_all_channels_forbids_them() -> None:
    class Normed(Mlp):
        def inner(self, x: Tensor) -> Tensor:
            return functional.layer_norm(torch.relu(self.up(x)), (24,))

    rules, (note,) = found_in(Normed())
    assert rules == ()
    assert note == (
        "no site 'mlp': one row of up reaches most columns of down: a norm over all of "
        "them, or a single group of heads. No unit can go alone"
    )


def test_channels_that_depend_on_the_next_one() -> None:
    class Rolled(Mlp):
        def inner(self, x: Tensor) -> Tensor:
            h = self.up(x)
            # The first unit is alone, so only a look at all of them tells.
            return torch.cat([h[..., :2], h[..., 2:] + h[..., 2:].roll(1, -1)], -1)

    rules, (note,) = found_in(Rolled())
    assert rules == ()
    assert note == (
        "no site 'mlp': its 24 units depend on each other between up and down"
    )


def test_columns_that_nothing_reaches() -> None:
    class Padded(Mlp):
        def inner(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return torch.cat([h[..., :20], torch.ones_like(h[..., 20:])], -1)

    rules, (note,) = found_in(Padded())
    assert (rules, note) == ((), "no site 'mlp': no row of up reaches column 20")


def test_gate_and_up_in_one_matrix() -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return x + self.down(functional.silu(gate) * up)

    rules, (note,) = found_in(Gated(both=(48, WIDTH), down=(WIDTH, 24)))
    assert rules == ()
    assert "the rows of both that make a unit of down do not lie together" in note


def test_a_matrix_with_all_of_a_head_together_has_heads() -> None:
    class HeadByHead(Attention):  # as in GPT-NeoX
        def split(self, fused: Tensor) -> Tensor:
            parts = fused.unflatten(-1, (HEADS, 3, -1))
            return parts.permute(3, 0, 1, 2, 4)

    rules, notes = found_in(HeadByHead())
    expected = StructureRule("attention", "heads", ("fused",), ("out",), HEADS)
    assert (rules, notes) == ((expected,), [])


def test_a_matrix_with_all_queries_together_has_none() -> None:
    class ThreeInOne(Attention):  # as in GPT-2
        def split(self, fused: Tensor) -> Tensor:
            return fused.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 1, 3, 4)

    rules, (note,) = found_in(ThreeInOne())
    assert rules == ()
    assert "the rows of fused that make a unit of out do not lie together" in note


def test_groups_of_queries_that_are_dealt_out_like_cards() -> None:
    """Query heads 0 and 2 share keys and values: no unit is a run of rows."""

    class Dealt(Block):
        def forward(self, x: Tensor) -> Tensor:
            names = ("q", "k", "v")
            q, k, v = (getattr(self, n)(x).unflatten(-1, (-1, 4)) for n in names)
            k, v = (one.repeat(1, 1, 2, 1) for one in (k, v))
            heads = [one.transpose(1, 2) for one in (q, k, v)]
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            return x + self.out(mixed.transpose(1, 2).flatten(2))

    narrow = {"k": (8, WIDTH), "v": (8, WIDTH)}
    rules, (note,) = found_in(Dealt(q=(WIDTH, WIDTH), **narrow, out=(WIDTH, WIDTH)))
    assert rules == ()
    assert "the rows of q and k and v that make a unit of out do not lie" in note


def test_two_layers_that_take_the_same() -> None:
    class Forked(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(24, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return x + self.down(h) + self.side(h)

    assert found_in(Forked()) == ((), ["no structure of up: down and side read it"])


def test_a_layer_that_also_reads_what_enters() -> None:
    class Mixed(Mlp):
        def inner(self, x: Tensor) -> Tensor:
            return self.up(x) + functional.pad(x, (0, 8))

    rules, (note,) = found_in(Mixed())
    assert rules == ()
    assert note == (
        "no structure of up and down: it also reads what enters the block, which "
        "others read"
    )


def test_rows_that_leave_the_block_as_well() -> None:
    class Leaky(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return x + self.down(h) + h[..., :WIDTH]

    assert found_in(Leaky()) == ((), [])


def test_a_weight_that_is_used_behind_the_back_of_its_layer() -> None:
    class Secret(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x @ self.up.weight.T)[..., :WIDTH]

    rules, (note,) = found_in(Secret())
    assert rules == ()
    assert note == (
        "no site 'mlp': without rows of up the block gives something else than without "
        "their columns of down"
    )


def test_zeros_that_make_nan() -> None:
    class Fragile(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, 24, bias=False)

        def inner(self, x: Tensor) -> Tensor:
            parts = self.up(x).unflatten(-1, (6, 4))
            return (parts / parts.norm(dim=-1, keepdim=True)).flatten(-2)

    rules, (note,) = found_in(Fragile())
    assert rules == ()
    assert "without rows of up the block gives something else" in note


def test_a_layer_is_part_of_one_structure_only() -> None:
    class Chain(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.mid(torch.relu(self.up(x)))))

    rules, (note,) = found_in(Chain(up=(24, WIDTH), mid=(20, 24), down=(WIDTH, 20)))
    assert rules == (StructureRule("mid.mlp", "channels", ("up",), ("mid",), 24),)
    assert note == "no site 'down.mlp': mid is part of 'mid.mlp' as well"


def test_several_structures_are_named_by_their_places() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Mlp() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts[0](x) * 0.3 + self.experts[1](x)

    rules, notes = found_in(Experts())
    assert notes == []
    assert [(rule.name, rule.makers) for rule in rules] == [
        ("experts_0.mlp", ("experts.0.up",)),
        ("experts_1.mlp", ("experts.1.up",)),
    ]
