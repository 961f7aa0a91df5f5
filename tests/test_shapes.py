"""Holds that a wrong shape or type fails in tests: the checker is on, and it bites."""

import pytest
import torch
from jaxtyping import TypeCheckError

from autoprune.compression.method import Parameter
from autoprune.compression.packing import pack_bits, unpack_bits
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.policy import Action


def test_a_function_refuses_another_number_of_axes() -> None:
    with pytest.raises(TypeCheckError, match=r"numbers"):
        pack_bits(torch.zeros(2, 2, dtype=torch.uint8), 4)


def test_a_function_refuses_another_type() -> None:
    with pytest.raises(TypeCheckError, match=r"packed"):
        unpack_bits(torch.zeros(2), 4, 4)


def test_a_dataclass_refuses_fields_that_do_not_fit_together() -> None:
    storage = Storage((2, 4), "float32", 8)
    with pytest.raises(TypeCheckError, match=r"mask"):
        Variant(
            storage,
            values=torch.zeros(2, 4),
            mask=torch.ones(4, 2, dtype=torch.bool),
        )


def test_methods_that_return_their_own_class_pass() -> None:
    assert Variant.dense(torch.zeros(2, 4)).storage.shape == (2, 4)
    assert str(Action.parse("rtn(bits=4)")) == "rtn(bits=4)"


def test_an_int_passes_for_a_float_as_it_does_for_mypy() -> None:
    parameter = Parameter("sparsity", float, None, "Fraction to remove.", low=0, high=1)
    assert parameter.high == 1
