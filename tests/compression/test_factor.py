import logging

import pytest
import torch

from autoprune.compression import factor as factor_module
from autoprune.compression.factor import factorise
from autoprune.errors import MethodError
from autoprune.testing import tiny_statistics


def hessian(columns: int, tokens: int = 0) -> torch.Tensor:
    found = tiny_statistics(columns, tokens=tokens or 8 * columns).hessian
    assert found is not None
    return found


@pytest.mark.parametrize("columns", [2, 16, 97, 200, 300])
def test_factor_is_the_cholesky_factor_of_the_inverse(columns: int) -> None:
    given = hessian(columns)
    factor = factorise(given, damping=0.01, act_order=False, names=["q"])
    damped = given.double() + 0.01 * given.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = -(upper / upper.diagonal()[:, None]).t()
    torch.testing.assert_close(factor.feedback.double(), expected, rtol=1e-4, atol=1e-4)
    pivots = 1 / upper.diagonal().square()
    torch.testing.assert_close(factor.cost.double(), pivots, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("columns", [1, 2, 9, 16])
def test_turning_round_in_parts_gives_the_same(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = hessian(columns)
    whole = factorise(given, damping=0.01, act_order=False, names=["q"])
    monkeypatch.setattr(factor_module, "REVERSED_AT_ONCE", 7)
    parts = factorise(given, damping=0.01, act_order=False, names=["q"])
    assert torch.equal(parts.feedback, whole.feedback)


def test_act_order_sorts_by_the_diagonal() -> None:
    given = torch.diag(torch.tensor([1.0, 9.0, 4.0, 9.0]))
    factor = factorise(given, damping=0.0, act_order=True, names=["q"])
    assert factor.order is not None and factor.order.tolist() == [1, 3, 2, 0]
    assert factor.cost.tolist() == [9.0, 9.0, 4.0, 1.0]


def test_dead_columns_share_nothing() -> None:
    given = hessian(8)
    given[3], given[:, 3] = 0.0, 0.0
    factor = factorise(given, damping=0.0, act_order=False, names=["q"])
    assert factor.dead.tolist() == [index == 3 for index in range(8)]
    assert factor.feedback[3, :3].abs().sum() == factor.feedback[4:, 3].abs().sum() == 0
    assert factor.cost[3] > 0


def test_the_hessian_is_left_untouched() -> None:
    given = hessian(16)
    copy = given.clone()
    factorise(given, damping=0.1, act_order=True, names=["q"])
    assert torch.equal(given, copy)


def test_scale_does_not_matter() -> None:
    given = hessian(32)
    one, other = (
        factorise(given * scale, damping=0.01, act_order=False, names=["q"])
        for scale in (1.0, 2.0**-40)
    )
    assert torch.equal(one.feedback, other.feedback)


def test_damping_is_raised_for_a_singular_hessian(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vector = torch.arange(1.0, 33.0)
    with caplog.at_level(logging.WARNING):
        short = 1e-4 * vector.square().mean() * torch.eye(32)
        factor = factorise(
            torch.outer(vector, vector) - short,
            damping=0.0,
            act_order=False,
            names=["layers.0.q", "layers.0.k"],
        )
    assert torch.isfinite(factor.feedback).all()
    assert "damping raised from 0 to 0.01" in caplog.text
    assert "layers.0.q, layers.0.k" in caplog.text


def test_a_hopeless_hessian_names_its_layers() -> None:
    broken = torch.tensor([[1.0, 8.0], [8.0, 1.0]])
    with pytest.raises(
        MethodError, match=r"layers\.0\.q, .*k is not .*damping 1 \(ask"
    ):
        factorise(
            broken, damping=0.01, act_order=False, names=["layers.0.q", "layers.0.k"]
        )


def test_inputs_of_zero_are_named() -> None:
    with pytest.raises(MethodError, match=r"experts\.down\[7\] were zero .* is 0"):
        factorise(
            torch.zeros(4, 4), damping=0.01, act_order=False, names=["experts.down[7]"]
        )
