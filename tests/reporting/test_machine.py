import json
from dataclasses import dataclass
from pathlib import Path

from autoprune.policy import Action, Policy
from autoprune.reporting.machine import to_json


@dataclass(frozen=True)
class Thing:
    folder: Path
    numbers: tuple[float, ...]


def test_results_become_plain() -> None:
    policy = Policy({"blocks.0.o": Action.parse("rtn(bits=4)")})
    data = {"thing": Thing(Path("a/b"), (1.5, float("nan"))), "policy": policy, 3: None}
    assert json.loads(to_json(data)) == {
        "thing": {"folder": "a/b", "numbers": [1.5, None]},
        "policy": policy.to_dict(),
        "3": None,
    }
