"""Synaptic flow by hand, round by round, and through a transformer."""

import pytest
import torch
from tiny_models import tiny
from torch import nn

from autoprune.errors import ConfigError, ModelError
from autoprune.training.synflow import keep_synflow, synflow_scores


def dense_layers(*sizes: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for at, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.ReLU()] if at else []
        layers.append(nn.Linear(inputs, outputs, bias=False))
    return nn.Sequential(*layers)


def test_flow_by_hand_and_conserved_through_every_layer() -> None:
    model = dense_layers(3, 4, 2)
    first, last = (layer.weight.detach().double().abs() for layer in model[::2])
    found = synflow_scores(model, ["0.weight", "2.weight"], flow=model, shape=(1, 3))
    torch.testing.assert_close(found["0.weight"], first * last.sum(0)[:, None])
    torch.testing.assert_close(found["2.weight"], last * first.sum(1)[None, :])
    flow = (last @ first).sum()
    for score in found.values():  # arXiv:2006.05467, Theorem 2
        torch.testing.assert_close(score.sum(), flow)


def test_rounds_are_those_of_the_paper() -> None:
    model, rounds, sparsity = dense_layers(5, 6, 4), 4, 0.7
    first, last = (layer.weight.detach().double().abs() for layer in model[::2])
    total = first.numel() + last.numel()
    for number in range(1, rounds + 1):
        scores = torch.cat(
            [(first * last.sum(0)[:, None]).flatten(), (last * first.sum(1)).flatten()]
        )
        stay = round(total - round((1 - 0.3 ** (number / rounds)) * total))
        limit = scores.sort(descending=True).values[stay - 1]
        keep = scores >= limit
        first = first * keep[: first.numel()].view_as(first)
        last = last * keep[first.numel() :].view_as(last)
    kept = keep_synflow(
        model,
        ["0.weight", "2.weight"],
        sparsity,
        flow=model,
        shape=(1, 5),
        rounds=rounds,
    )
    assert torch.equal(kept["0.weight"], first > 0)
    assert torch.equal(kept["2.weight"], last > 0)


def test_rounds_keep_a_path_where_one_round_cuts_a_layer_off() -> None:
    model = dense_layers(
        20, 20, 20, 1
    )  # the last layer is narrow, its weights flow most
    names = ["0.weight", "2.weight", "4.weight"]
    sparsity = 1 - 6 / 820

    def layers_left(rounds: int) -> int:
        kept = keep_synflow(
            model, names, sparsity, flow=model, shape=(1, 20), rounds=rounds
        )
        assert sum(int(mask.sum()) for mask in kept.values()) == 6
        return sum(bool(mask.any()) for mask in kept.values())

    assert layers_left(100) == 3 > layers_left(1)


def test_a_transformer_loses_the_same_share_where_nothing_flows() -> None:
    model = tiny("llama")
    names = [n for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    kept = keep_synflow(
        model,
        names,
        0.6,
        flow=lambda ones: model(inputs_embeds=ones).logits,
        shape=(1, 2, 32),
        rounds=3,
    )
    gone = {name: int((~mask).sum()) for name, mask in kept.items()}
    sizes = {name: mask.numel() for name, mask in kept.items()}
    assert sum(gone.values()) == round(0.6 * sum(sizes.values()))
    still = [name for name in names if "q_proj" in name or "k_proj" in name]
    share = sum(gone[n] for n in still) / sum(sizes[n] for n in still)
    assert share == pytest.approx(0.6, abs=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_scored_is_told() -> None:
    model, names = dense_layers(3, 4, 2), ["0.weight", "2.weight"]
    with pytest.raises(ModelError, match=r"synaptic flow .* is -\d"):
        synflow_scores(model, names, flow=lambda x: -model(x), shape=(1, 3))
    llama = tiny("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(ModelError, match=rf"no flow passes through {name}"):
        keep_synflow(
            llama,
            [name],
            0.5,
            flow=lambda ones: llama(inputs_embeds=ones).logits,
            shape=(1, 2, 32),
        )
    with pytest.raises(ConfigError, match="found 0"):
        keep_synflow(model, names, 0.5, flow=model, shape=(1, 3), rounds=0)
