"""Every built-in method keeps the contract, with several settings each."""

import pytest
from autoprune_plugins.gptq import Gptq
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.sparsegpt import SparseGpt
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod
from autoprune.policy import Value
from autoprune.testing import MethodContract

Params = dict[str, Value]
CASES: list[tuple[CompressionMethod, Params]] = [
    (Magnitude(), {"sparsity": 0.5}),
    (Magnitude(), {"sparsity": 0.29, "per": "layer"}),
    (Magnitude(), {"pattern": "2:4"}),
    (Wanda(), {"sparsity": 0.7}),
    (Wanda(), {"pattern": "4:8"}),
    (RoundToNearest(), {"bits": 4}),
    (RoundToNearest(), {"bits": 3, "group": 16}),
    (RoundToNearest(), {"bits": 8, "symmetric": True}),
    (Gptq(), {"bits": 4}),
    (Gptq(), {"bits": 3, "group": 16}),
    (Gptq(), {"bits": 5, "group": 8, "act_order": False, "symmetric": True}),
    (SparseGpt(), {"sparsity": 0.5}),
    (SparseGpt(), {"sparsity": 0.77, "damping": 0.1}),
    (SparseGpt(), {"pattern": "2:4"}),
    (SparseGpt(), {"pattern": "1:4", "bits": 4, "group": 16}),
    (SparseGpt(), {"sparsity": 0.5, "bits": 6, "symmetric": True}),
]
IDS = [f"{method.name}-{params}" for method, params in CASES]


class TestBuiltInMethods(MethodContract):
    @pytest.fixture(params=CASES, ids=IDS)
    def case(self, request: pytest.FixtureRequest) -> tuple[CompressionMethod, Params]:
        case: tuple[CompressionMethod, Params] = request.param
        return case

    @pytest.fixture
    def method(self, case: tuple[CompressionMethod, Params]) -> CompressionMethod:
        return case[0]

    @pytest.fixture
    def params(self, case: tuple[CompressionMethod, Params]) -> Params:
        return case[1]
