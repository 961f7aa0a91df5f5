import json
from dataclasses import dataclass
from pathlib import Path

from autoprune_plugins.rtn import RoundToNearest

from autoprune.policy import Action, Policy
from autoprune.reporting.machine import methods_data, to_json


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


def test_methods_tell_all_that_they_declare() -> None:
    (about,) = json.loads(to_json(methods_data([RoundToNearest()])))
    assert about["name"] == "rtn"
    assert about["needs"] == []
    bits = about["parameters"][0]
    assert (bits["name"], bits["kind"], bits["low"], bits["high"]) == (
        "bits",
        "int",
        2,
        8,
    )
