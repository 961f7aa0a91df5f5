"""Rotates a model's hidden state to the directions that a policy keeps, and cuts it.

The model comes with all that is written to its hidden state projected on ``k`` of ``d``
directions, as it was measured. With an orthonormal basis ``Q`` of these, ``z = Qᵀ h``
has the length of ``h``, and a norm of root mean squares over ``k`` numbers gives
``sqrt(k / d)`` of what it gave over ``d``. So writers become ``Qᵀ W``, the embedding
``E Q``, and readers ``sqrt(d / k) W diag(g) Q`` with the scales ``g`` of their norm,
which become ones.

A head that is tied to the embedding takes no such factor. But any rotation within the
kept directions is as good, so ``Q`` is turned until ``Qᵀ diag(g) Q`` is diagonal for
the last norm: the diagonal, times ``sqrt(d / k)``, is the new norm, and the tie stays.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.errors import ExportError
from autoprune.models.hidden import HiddenState
from autoprune.models.weights import parameter_of

_STRAY = 1e-4
"""Most of the energy of weights that may lie outside; rounding to bfloat16 is 1e-5."""

Basis = Float[Tensor, "hidden kept"]
"""Orthonormal columns, in float64."""


def narrowed_config(text: Any, state: HiddenState, kept: int) -> None:
    """Write the width of the narrower model into a configuration of text.

    Args:
        text: The configuration; written to.
        state: The hidden state.
        kept: How many directions stay.
    """
    heads = text.num_attention_heads
    text.head_dim = getattr(text, "head_dim", None) or state.width // heads
    text.hidden_size = kept
    # A norm adds it to a mean, which grows as the same sum has fewer terms.
    text.rms_norm_eps = text.rms_norm_eps * state.width / kept


def narrowed(
    tensors: Mapping[str, Tensor], state: HiddenState, kept: int
) -> dict[str, Tensor]:
    """Rotate and cut tensors; those without numbers are only cut.

    Args:
        tensors: Of the model with projected weights, by their names in memory, or on
            the device ``meta``.
        state: Its hidden state.
        kept: How many directions stay.

    Raises:
        ExportError: If what is written to the hidden state has more directions.
    """
    narrow = dict(tensors)
    if tensors[parameter_of(state.embedding)].is_meta:
        cut = {n: tensors[n].narrow(a, 0, kept) for n, a in _axes(state) if n in narrow}
        return narrow | cut
    factor = (state.width / kept) ** 0.5
    basis = _written_span(tensors, state, kept)
    last, scales = parameter_of(state.norm), tensors[parameter_of(state.norm)].double()
    diagonal = torch.full((kept,), 1 / factor, dtype=torch.float64)
    if state.tied:
        inner = basis.T @ (scales[:, None] * basis)
        diagonal, turn = torch.linalg.eigh(inner)
        basis = basis @ turn
    narrow[last] = (factor * diagonal).to(tensors[last].dtype)
    for name in map(parameter_of, state.writers):
        narrow[name] = _product(basis.T, tensors[name])
    name = parameter_of(state.embedding)
    narrow[name] = _product(tensors[name], basis)
    for norm, readers in state.readers:
        inner = tensors[parameter_of(norm)].double()
        narrow[parameter_of(norm)] = torch.ones(kept, dtype=tensors[last].dtype)
        for reader in map(parameter_of, readers):
            narrow[reader] = _product(tensors[reader], factor * inner[:, None] * basis)
    head = parameter_of(state.head)
    if state.tied:
        narrow[head] = narrow[name]
    else:
        narrow[head] = _product(tensors[head], factor * scales[:, None] * basis)
    return narrow


def _axes(state: HiddenState) -> Iterator[tuple[str, int]]:
    """Tell which axis of each parameter the hidden state is."""
    readers = [name for _, names in state.readers for name in names]
    for name in (*state.norms, *state.writers):
        yield parameter_of(name), 0
    for name in (state.embedding, state.head, *readers):
        yield parameter_of(name), 1


def _written_span(
    tensors: Mapping[str, Tensor], state: HiddenState, kept: int
) -> Basis:
    """Find the directions that embedding and writers write to.

    Each counts alike, however large its weights are.
    """
    total = torch.zeros(state.width, state.width, dtype=torch.float64)
    for name in (state.embedding, *state.writers):
        weight = tensors[parameter_of(name)].float()
        rows = weight if name == state.embedding else weight.T
        products = (rows.T @ rows).double()
        total += products / products.trace().clamp_min(1e-30)
    energy, axes = torch.linalg.eigh(total)
    if energy[:-kept].sum() > _STRAY * energy.sum():
        raise ExportError(
            f"what is written to the hidden state has more than {kept} of "
            f"{state.width} directions. The method that was to project it is at fault"
        )
    span: Tensor = axes[:, -kept:]
    return span


def _product(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """Multiply a weight by a basis in float32; the type is the weight's."""
    dtype = left.dtype if left.dtype != torch.float64 else right.dtype
    return (left.float() @ right.float()).to(dtype).contiguous()
