"""SynFlow: a mask before training from the weights alone, without data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.compression.masks import pruned_count
from autoprune.errors import ConfigError, ModelError
from autoprune.training.at_start import (
    Kept,
    Scores,
    gradients_of,
    kept_of,
    undisturbed,
)
from autoprune.training.choosing import check_sparsity, prune_smallest

Flow = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
"""Gives a model's output for a float64 tensor in the place of its input."""

_NO_FLOW = 1e-9
"""Share of the flow below which a parameter has none: rounding leaves 1e-16."""


def synflow_scores(
    model: nn.Module, names: Iterable[str], *, flow: Flow, shape: tuple[int, ...]
) -> Scores:
    """Score weights by what they let through of ones, ``|w| dR/d|w|``, in float64.

    One round of ``keep_synflow``, which see.
    """
    with undisturbed(model, names) as named, _network_of_sizes(model):
        output = flow(_ones(model, shape))
        _check_flow(output)
        return _flows(output, named)


def keep_synflow(
    model: nn.Module,
    names: Iterable[str],
    sparsity: float,
    *,
    flow: Flow,
    shape: tuple[int, ...],
    rounds: int = 100,
) -> Kept:
    """Keep the weights that let through most of ones; no data is seen.

    SynFlow (Tanaka et al. 2020, arXiv:2006.05467, Alg. 1): scores ``|w| dR/d|w|`` of
    ``R``, the sum of what the network of the weights' sizes gives for ones, are taken
    anew after each round; after round ``k`` of ``n``, ``(1 - sparsity)^(k/n)`` stays.
    In float64, as the flow of a deep network is large. Batch norms are in evaluation
    mode, as in the paper.

    How we differ: norms without running statistics multiply by constants, as they would
    undo the flow else; activations other than ReLU are as they are. ``R`` does not
    depend on some parameters (queries and keys, as all positions hold the same): they
    lose the same share as all, the weights that are smallest beside the mean size in
    their parameter.

    Args:
        model: The model.
        names: Of the parameters.
        sparsity: Share of their weights to go, in [0, 1].
        flow: Gives the model's output for a tensor in the place of its input: pixels,
            or embeddings.
        shape: Of that tensor.
        rounds: At least 1.
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise ConfigError(f"SynFlow takes 1 round or more, found {rounds}")
    with undisturbed(model, names) as named, _network_of_sizes(model):
        ones = _ones(model, shape)
        output = flow(ones)
        total, scores = _check_flow(output), _flows(output, named)
        flowing = [n for n, one in scores.items() if one.sum() > _NO_FLOW * total]
        if not flowing:
            raise ModelError(
                f"no flow passes through {', '.join(named)}: the output does not "
                "depend on them. Name weights that it depends on, too."
            )
        still = {n: p.detach() for n, p in named.items() if n not in flowing}
        size, rest = _size(scores[n] for n in flowing), _size(still.values())
        goal = pruned_count(size, sparsity)
        pruned: dict[str, Tensor] = {}
        for number in range(1, rounds + 1):
            share = 1 - (1 - goal / size) ** (number / rounds)
            # What is pruned stays so, even beside a weight without flow.
            own = {n: scores[n].masked_fill(named[n] == 0, -1.0) for n in flowing}
            pruned = prune_smallest(own, share if number < rounds else goal / size)
            for name, mask in pruned.items():
                named[name].data.masked_fill_(mask, 0.0)
            if number < rounds:
                scores = _flows(flow(ones), named)
        if still:
            apart = {n: one / one.mean() for n, one in still.items()}
            left = pruned_count(size + rest, sparsity) - goal
            pruned |= prune_smallest(apart, left / rest)
    return kept_of({name: pruned[name] for name in named})


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _flows(output: Tensor, named: Mapping[str, nn.Parameter]) -> Scores:
    """Give each weight's share of the flow."""
    gradients = gradients_of(output.sum(), named)
    return {n: g * named[n].detach() for n, g in gradients.items()}


def _check_flow(output: Tensor) -> float:
    total = float(output.detach().sum())
    if not 0 < total < math.inf:
        raise ModelError(
            f"the synaptic flow through the model is {total}, expected a number over "
            "0. Let `flow` give logits, from an input of ones."
        )
    return total


@contextmanager
def _network_of_sizes(model: nn.Module) -> Iterator[None]:
    """Let all parameters be their sizes in float64 for a while, norms constants."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            name = type(module).__name__.lower()
            if "norm" in name and not list(module.buffers(recurse=False)):
                handle = module.register_forward_hook(_as_constants)
                undo.callback(handle.remove)
        model.eval()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.double()
        for parameter in model.parameters():
            parameter.data = parameter.data.abs()
        yield


def _as_constants(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Give the sizes of what a norm gives, as its input times constants."""
    read = inputs[0]
    return read * torch.where(read == 0, 0.0, output / read).abs().detach()


def _ones(model: nn.Module, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    device = next(model.parameters()).device
    return torch.ones(shape, dtype=torch.float64, device=device)
