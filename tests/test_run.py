"""A configuration goes in, a run folder with the best policy comes out."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from tiny_runs import config_of, save_tiny, space_of, write_text
from transformers import PreTrainedTokenizerFast

from autoprune.conclusion import Searched, conclude
from autoprune.config import RunConfig
from autoprune.errors import BudgetError, ConfigError, RunError
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.reporting.observer import Observer
from autoprune.reporting.status import RunStatus
from autoprune.run import RANDOM_RIVAL, SearchResult, find_space, search
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.reserve import Reserve
from autoprune.searching.rivals import RANDOM, rival_kind
from autoprune.searching.rows import Trial
from autoprune.searching.runs import read_trial, read_trials
from autoprune.searching.runs import write_text as write_whole
from autoprune.transfer import apply, evaluate

METRICS = {
    "kl",
    "perplexity",
    "quality_drop",
    "size_bytes",
    "compression_ratio",
    "bits_per_weight",
    "sparsity",
    "model_sparsity",
    "gflop_per_token",
    "reward",
}
FINE = [
    {"sites": f"blocks.{block}.*", "actions": [f"magnitude(sparsity=[{levels}])"]}
    for block, levels in enumerate(("0.3, 0.41, 0.53, 0.67", "0.2, 0.37, 0.59, 0.71"))
]
FINER = [
    {"sites": f"blocks.{block}.*", "actions": [f"rtn(bits=[{bits}], group=[{groups}])"]}
    for block, bits, groups in ((0, "3, 5, 6", "8, 32"), (1, "2, 4, 8", "16, 64"))
]
"""Many sums, and no action that most sites offer: so no uniform policy is proposed."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path, text: str) -> RunConfig:
    return config_of(
        tiny_checkpoint, text, search={"trials": 8, "finalists": 2, "sampler": "tpe"}
    )


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> SearchResult:
    """A search that has ended; nobody changes its folder."""
    return search(config, tmp_path_factory.mktemp("finished") / "run")


def after(count: int) -> Callable[[], bool]:
    """Say stop after so many trials: it is asked once before each."""
    asked: Iterator[int] = iter(range(count + 1))
    return lambda: next(asked) == count


def policies(run_dir: Path) -> list[dict[str, Any]]:
    return [trial.policy.to_dict() for trial in read_trials(run_dir)]


def measured(run_dir: Path) -> list[dict[str, float]]:
    return [dict(trial.metrics) for trial in read_trials(run_dir)]


class Listener(Observer):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.trials: list[Trial] = []
        self.notes: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def trial(self, row: Trial) -> None:
        self.trials.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_run_folder_has_all_that_a_search_leaves(finished: SearchResult) -> None:
    names = {path.name for path in finished.run_dir.iterdir() if path.name[0] != "."}
    assert names == {
        "config.yaml",
        "ledger.sqlite",
        "trials.csv",
        "trials.parquet",
        "finals.json",
        "policy.json",
        "problem.json",
        "ledger.backup.sqlite",
        "timings.json",
    }


def test_the_configuration_is_read_back_as_it_was(
    finished: SearchResult, config: RunConfig
) -> None:
    assert RunConfig.from_yaml(finished.run_dir / "config.yaml") == config


def test_the_tables_hold_every_trial_and_every_metric(finished: SearchResult) -> None:
    csv = pd.read_csv(finished.run_dir / "trials.csv")
    parquet = pd.read_parquet(finished.run_dir / "trials.parquet")
    for table in (csv, parquet, finished.trials):
        assert len(table) == 8
        assert set(table.columns) >= METRICS | {"number", "policy", "seed", "origin"}
        numbers = table[sorted(METRICS)].to_numpy(dtype=float)
        assert all(math.isfinite(number) for number in numbers.flatten())
        assert (table[["time.propose_s", "time.evaluate_s"]] > 0).all().all()
    sites = [name for name in csv.columns if name.startswith("site.")]
    assert len(sites) == 9
    assert csv["kl"].tolist() == pytest.approx(parquet["kl"].tolist())
    assert finished.trials["policy"].is_unique


def test_metrics_agree_with_each_other(finished: SearchResult) -> None:
    dense = finished.finals["dense"]
    for row in finished.trials.itertuples():
        assert row.compression_ratio == pytest.approx(
            dense["size_bytes"] / row.size_bytes
        )
        assert row.gflop_per_token <= dense["gflop_per_token"]
        assert row.model_sparsity <= row.sparsity <= 0.705  # rounded layer by layer
        assert row.reward == pytest.approx(
            -math.log1p(row.quality_drop) + 0.2 * math.log(row.compression_ratio)
        )


def test_the_winner_is_the_best_finalist(finished: SearchResult) -> None:
    finals = json.loads((finished.run_dir / "finals.json").read_text())
    assert finals == finished.to_dict()["finals"]
    ranked = [finalist["choice"]["kl"] for finalist in finals["finalists"]]
    assert ranked == sorted(ranked)
    best = {finalist["trial"] for finalist in finals["finalists"]}
    feasible = finished.trials.sort_values("kl")["number"].tolist()
    assert set(feasible[:2]) <= best
    assert finals["winner"]["choice"]["kl"] <= min(ranked)
    assert finals["rivals"]
    for rival in finals["rivals"]:
        assert rival["origin"].startswith("uniform ")
        assert rival["choice"]["kl"] >= finals["winner"]["choice"]["kl"]
    sizes = finals["winner"]["sizes"]
    assert sizes["packed"] == finals["winner"]["report"]["size_bytes"]
    assert sizes["packed"] < sizes["transformers"] <= finals["dense_sizes"]["packed"]


def test_the_policy_file_tells_what_it_takes_to_use_it(
    finished: SearchResult, tiny_checkpoint: Path
) -> None:
    record = json.loads((finished.run_dir / "policy.json").read_text())
    assert Policy.from_dict(record) == finished.policy
    assert record["trial"] == finished.finals["winner"]["trial"]
    assert record["model"]["source"] == str(tiny_checkpoint)
    assert record["task"] == "causal-lm"
    assert record["seed"] == 0
    assert record["text"]["split"] == "report"
    assert record["figures"]["compressed"] == finished.finals["winner"]["report"]
    assert record["figures"]["dense"] == finished.finals["dense"]
    assert {"autoprune", "torch", "transformers"} == record["versions"].keys()
    Policy.from_dict(record["reference"])


def test_the_same_call_again_adds_nothing(
    finished: SearchResult, config: RunConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    listener = Listener()
    again = search(config, run_dir, observer=listener)
    assert listener.trials == []
    assert again.policy == finished.policy
    assert again.finals == finished.finals
    assert again.trials.equals(finished.trials)
    assert again.ended == finished.ended == "trials"


def test_stages_are_told_in_their_order(config: RunConfig, tmp_path: Path) -> None:
    listener = Listener()
    search(config, tmp_path / "run", observer=listener)
    told = [name for name in listener.stages if not name.startswith("solving")]
    assert told == [
        "loading model and text",
        "making variants",
        "exporting the smallest policy, to be sure",
        "measuring the dense model",
        "measuring sensitivities (fisher), for rivals",
        "measuring sensitivities (blend), for rivals",
        "searching",
        "choosing among finalists",
        "measuring on the report split",
    ]
    assert [trial.number for trial in listener.trials] == list(range(8))
    assert any("9 sites to choose for, 10^" in note for note in listener.notes)


def test_the_size_budget_is_kept_and_used_up(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=FINER,
        objective={"budgets": {"size_bytes": "45%"}},
        search={"trials": 8, "finalists": 1, "rivals": []},
    )
    result = search(config, tmp_path / "run")
    limit = 0.45 * result.finals["dense"]["size_bytes"]
    assert set(result.trials["origin"]) == {"gradient"}
    assert (result.trials["size_bytes"] <= limit).all()
    # Some ten bytes a tensor are kept free for its place in the header.
    tensors = 15 * 4
    assert (result.trials["size_bytes"] >= 0.998 * limit - 10 * tensors).all()


@pytest.mark.parametrize(
    "sampler",
    [
        "tpe",
        pytest.param("nsga2", marks=pytest.mark.slow),
        pytest.param("random", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_gone_on_is_as_if_never_stopped(
    sampler: str, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    settings = {"trials": 20, "finalists": 1, "sampler": sampler, "seed": 5}
    config = config_of(tiny_checkpoint, text, search=settings)
    whole = search(config, tmp_path / "whole")
    stopped = search(config, tmp_path / "parts", stop=after(4))
    assert stopped.ended == "stopped"
    assert stopped.finals == {}
    assert len(stopped.trials) == 4
    best = stopped.trials.sort_values("kl")["policy"].iloc[0]
    assert stopped.policy is not None
    assert stopped.policy.fingerprint == best
    assert not (tmp_path / "parts/finals.json").exists()
    assert len(pd.read_csv(tmp_path / "parts/trials.csv")) == 4
    search(config, tmp_path / "parts", stop=after(15))
    rest = search(config, tmp_path / "parts")
    assert policies(tmp_path / "parts") == policies(tmp_path / "whole")
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert rest.policy == whole.policy
    assert rest.finals == whole.finals


def test_other_seeds_search_elsewhere(
    finished: SearchResult, config: RunConfig, tmp_path: Path
) -> None:
    seeded = config.search.model_copy(update={"seed": 1})
    search(config.model_copy(update={"search": seeded}), tmp_path / "run")
    assert policies(tmp_path / "run") != policies(finished.run_dir)


def test_a_front_of_size_and_divergence(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        objective={"pareto": ["kl", "size_bytes"]},
        search={"trials": 20, "finalists": 3},
    )
    result = search(config, tmp_path / "run")
    sizes = result.trials["size_bytes"]
    assert sizes.max() > 1.5 * sizes.min()
    # The front's own reward says which of its policies are compared on other text.
    beaten = [
        ((result.trials[["kl", "size_bytes"]] <= row).all(axis=1)).sum() > 1
        for row in result.trials[["kl", "size_bytes"]].to_numpy()
    ]
    front = result.trials[[not is_beaten for is_beaten in beaten]]
    picked = front.sort_values("reward", ascending=False)["number"].tolist()[:3]
    finalists = {one["trial"] for one in result.finals["finalists"]}
    assert set(picked) <= finalists
    assert len(finalists) <= 4


def test_without_a_budget_the_reward_decides(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, text, objective={})
    result = search(config, tmp_path / "run")
    best = result.trials["reward"].nlargest(2).index.tolist()
    assert set(best) <= {one["trial"] for one in result.finals["finalists"]}
    assert result.trials["size_bytes"].nunique() > 3


def test_the_weights_of_a_reward_count(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    objective = {"reward": "logs", "weights": {"size_bytes": 1.0}}
    config = config_of(tiny_checkpoint, text, objective=objective)
    result = search(config, tmp_path / "run")
    expected = [math.log(ratio) for ratio in result.trials["compression_ratio"]]
    assert result.trials["reward"].tolist() == pytest.approx(expected)


def test_sparsity_is_a_budget_as_well(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=FINE,
        objective={"budgets": {"sparsity": 0.4}},
    )
    result = search(config, tmp_path / "run")
    assert (result.trials["sparsity"] >= 0.4).all()
    # A rival may be sparser than it has to be, where that costs less.
    searched = result.trials[result.trials["origin"] == "gradient"]
    assert len(searched) > 2 and (searched["sparsity"] <= 0.405).all()


def test_compute_is_a_budget_as_well(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=FINE,
        objective={"budgets": {"gflop_per_token": "60%"}},
    )
    result = search(config, tmp_path / "run")
    limit = 0.6 * result.finals["dense"]["gflop_per_token"]
    assert (result.trials["gflop_per_token"] <= limit).all()
    assert (result.trials["gflop_per_token"] >= 0.99 * limit).all()


def test_a_budget_that_bounds_nothing_leaves_the_search_free(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    objective = {"budgets": {"size_bytes": "99%"}}
    config = config_of(tiny_checkpoint, text, space=FINE, objective=objective)
    result = search(config, tmp_path / "run")
    assert result.ended == "trials"
    assert result.trials["size_bytes"].nunique() > 3


def test_two_budgets_are_kept_at_once(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    budgets = {"size_bytes": "60%", "sparsity": 0.3}
    config = config_of(tiny_checkpoint, text, objective={"budgets": budgets})
    result = search(config, tmp_path / "run")
    limit = 0.6 * result.finals["dense"]["size_bytes"]
    assert (result.trials["size_bytes"] <= limit).all()
    assert (result.trials["sparsity"] >= 0.3).all()


def test_a_limit_that_only_a_trial_can_check(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """The smallest model whose perplexity is at most some percent above the dense."""
    objective = {"metric": "size_bytes", "budgets": {"quality_drop": 0.02}}
    config = config_of(
        tiny_checkpoint,
        text,
        objective=objective,
        search={"trials": 16, "finalists": 1, "seed": 2},
    )
    result = search(config, tmp_path / "run")
    kept = result.trials["quality_drop"] <= 0.02
    assert kept.any() and not kept.all()
    assert (result.trials["feasible"] == kept).all()
    smallest = result.trials[kept]["size_bytes"].idxmin()
    assert smallest in {one["trial"] for one in result.finals["finalists"]}


def test_a_limit_that_no_trial_keeps_is_told_with_the_nearest(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint, text, objective={"budgets": {"perplexity": "1%"}}
    )
    message = r"none of 6 trials kept every limit \(perplexity .*nearest, trial \d, has"
    with pytest.raises(BudgetError, match=message):
        search(config, tmp_path / "run")
    assert len(read_trials(tmp_path / "run")) == 6
    assert (tmp_path / "run/trials.csv").exists()


def test_no_time_for_a_trial_is_told(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, text, search={"budget": "0.01s"})
    with pytest.raises(RunError, match="budget of 0.01 s ended before the first trial"):
        search(config, tmp_path / "run")


def test_a_space_is_exhausted(tiny_checkpoint: Path, text: str, tmp_path: Path) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=[{"sites": "blocks.0.o", "actions": ["rtn(bits=[3, 4, 8])", "dense"]}],
        objective={"metric": "kl"},
        search={"trials": 50},
    )
    result = search(config, tmp_path / "run")
    assert result.ended == "exhausted"
    assert len(result.trials) == 4
    assert result.policy is not None
    assert str(result.policy["blocks.0.o"]) == "dense"


def test_variants_on_dense_inputs(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    settings = {"search": {"trials": 2}, "bank": "dense"}
    search(config_of(tiny_checkpoint, text, **settings), tmp_path / "run")
    config = config_of(tiny_checkpoint, text, **settings)
    plan = Plan.make(config, load_plugins())
    assert plan.reference is None
    assert plan.bank.reference == {}


@pytest.fixture(scope="module")
def rounds(tiny_checkpoint: Path, text: str) -> RunConfig:
    """Two rounds: halves of the steps of sparsity come with the second."""
    return config_of(
        tiny_checkpoint,
        text,
        space=[{"actions": ["magnitude(sparsity=[0.3, 0.4, 0.5, 0.6])"]}],
        objective={"budgets": {"sparsity": 0.4}},
        search={"trials": 6, "finalists": 2, "rounds": 2},
    )


@pytest.fixture(scope="module")
def rounds_ended(
    tmp_path_factory: pytest.TempPathFactory, rounds: RunConfig
) -> tuple[SearchResult, Listener]:
    """A search of two rounds, and what was told of it; nobody changes its folder."""
    listener = Listener()
    run_dir = tmp_path_factory.mktemp("rounds") / "run"
    return search(rounds, run_dir, observer=listener), listener


def test_a_further_round_searches_near_the_best_of_the_first(
    rounds_ended: tuple[SearchResult, Listener],
) -> None:
    result, listener = rounds_ended
    run_dir = result.run_dir
    assert "round 2: half the step, on new inputs" in listener.notes
    assert (run_dir / "round-2/ledger.sqlite").is_file()
    first, second = read_trials(run_dir), read_trials(run_dir / "round-2")
    assert (len(first), len(second)) == (6, 6)
    table = result.trials
    assert table["round"].tolist() == [1] * 6 + [2] * 6
    expected = [trial.policy for trial in [*first, *second]]
    assert [trial.policy for trial in listener.trials] == expected
    assert table["policy"].tolist() == [one.fingerprint for one in expected]
    assert (table["sparsity"] >= 0.4).all()

    best = min(first, key=lambda trial: trial.values[0])
    assert (second[0].origin, second[0].policy) == ("incumbent", best.policy)
    levels = set()
    for trial in second:
        for site in set(trial.policy) - {"embedding"}:
            level, around = (level_of(p[site]) for p in (trial.policy, best.policy))
            levels.add(level)
            assert round(abs(level - around), 6) in (0, 0.05, 0.1)
    assert levels & {0.35, 0.45, 0.55}


def test_finalists_of_all_rounds_are_compared(
    rounds_ended: tuple[SearchResult, Listener],
) -> None:
    result, _ = rounds_ended
    finals = json.loads((result.run_dir / "finals.json").read_text())
    ranked = [finalist["choice"]["kl"] for finalist in finals["finalists"]]
    assert ranked == sorted(ranked)
    assert len(ranked) >= 4
    gains = finals["gain_over_rival"]
    assert gains.keys() == {"fitness", "choice"}
    assert gains["choice"] >= 0.5 * gains["fitness"]
    names = [one["trial"] for one in finals["finalists"]]
    assert len(set(names)) == len(names)  # two rounds count from 0
    for one in finals["finalists"]:
        found, reference = read_trial(result.run_dir, one["trial"])
        assert found.origin == one["origin"]
        assert (reference is None) == (not str(one["trial"]).startswith("round-2/"))


def test_the_status_tells_of_every_round(
    rounds_ended: tuple[SearchResult, Listener],
) -> None:
    result, _ = rounds_ended
    told = RunStatus.read(result.run_dir).to_dict()
    second = read_trials(result.run_dir / "round-2")
    assert told["parts"].keys() == {"round-2"}
    assert told["parts"]["round-2"]["trials"] == len(second)
    best = told["parts"]["round-2"]["best"][0]["metrics"]["kl"]
    assert best == min(trial.metrics["kl"] for trial in second if trial.feasible)
    assert not any(rival_kind(trial.origin) for trial in second)  # the first had them
    assert any(rival_kind(trial.origin) for trial in read_trials(result.run_dir))


def level_of(action: Action) -> float:
    level = dict(action.steps[0].params)["sparsity"]
    assert isinstance(level, float)
    return level


def test_rounds_that_ended_add_nothing(
    rounds: RunConfig, rounds_ended: tuple[SearchResult, Listener], tmp_path: Path
) -> None:
    whole, _ = rounds_ended
    shutil.copytree(whole.run_dir, tmp_path / "run")
    listener = Listener()
    again = search(rounds, tmp_path / "run", observer=listener)
    assert listener.trials == []
    assert again.trials.equals(whole.trials)
    assert again.policy == whole.policy
    assert again.finals == whole.finals


@pytest.mark.parametrize("count", [3, 8])
def test_rounds_are_stopped_and_gone_on_with(
    count: int,
    rounds: RunConfig,
    rounds_ended: tuple[SearchResult, Listener],
    tmp_path: Path,
) -> None:
    whole, _ = rounds_ended
    stopped = search(rounds, tmp_path / "run", stop=after(count))
    assert (stopped.ended, stopped.finals) == ("stopped", {})
    assert len(stopped.trials) == count
    assert stopped.policy is not None
    assert (tmp_path / "run/round-2").exists() == (count > 6)
    rest = search(rounds, tmp_path / "run")
    assert rest.trials["policy"].tolist() == whole.trials["policy"].tolist()
    assert rest.policy == whole.policy
    assert rest.finals == whole.finals


def test_a_round_needs_something_to_search_around(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        objective={"budgets": {"size_bytes": "40%", "perplexity": "1%"}},
        search={"trials": 3, "finalists": 1, "rounds": 2},
    )
    with pytest.raises(RunError, match="no trial of round 1 kept every limit"):
        search(config, tmp_path / "run")


@pytest.mark.parametrize(
    "sampler",
    ["gradient", "allocation", "evolution", "policy_gradient", "knobs"],
)
def test_a_strategy_of_one_goal_is_refused_for_a_front(
    sampler: str, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        objective={"pareto": ["kl", "size_bytes"]},
        search={"trials": 2, "sampler": sampler},
    )
    message = f"strategy '{sampler}' serves one goal, found kl and size_bytes.*nsga2"
    with pytest.raises(ConfigError, match=message):
        search(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sampler", ["gradient", "allocation", "knobs"])
def test_a_strategy_that_solves_within_budgets_needs_one(
    sampler: str, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        objective={"metric": "kl"},
        search={"trials": 2, "sampler": sampler},
    )
    message = f"strategy '{sampler}' solves .* within budgets, and there is none"
    with pytest.raises(ConfigError, match=message):
        search(config, tmp_path / "run")


def test_a_policy_of_sites_that_are_not_fused_is_used_like_any_other(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """What is found with ``fuse: false`` is applied without knowing of it."""
    apart = [
        {"actions": ["magnitude(sparsity=[0.3, 0.5])"]},
        {"sites": "blocks.0.qkv.q_proj", "actions": ["magnitude(sparsity=0.2)"]},
        {"sites": "blocks.0.qkv.k_proj", "actions": ["magnitude(sparsity=0.7)"]},
    ]
    config = config_of(
        tiny_checkpoint,
        text,
        space=apart,
        objective={"metric": "kl"},
        search={"trials": 3, "finalists": 1, "sampler": "random"},
        fuse=False,
    )
    result = search(config, tmp_path / "run")
    assert result.policy is not None
    assert str(result.policy["blocks.0.qkv.q_proj"]) == "magnitude(sparsity=0.2)"
    found = evaluate(
        str(tiny_checkpoint), policy=tmp_path / "run/policy.json", text=config.text
    )
    assert found["policy"] == pytest.approx(result.finals["winner"]["report"])
    applied = apply(
        tmp_path / "run/policy.json",
        model=str(tiny_checkpoint),
        out=tmp_path / "out",
        text=config.text,
    )
    assert applied.metrics["kl"] == pytest.approx(found["policy"]["kl"])
    about = json.loads((tmp_path / "out/policy.json").read_text())
    assert about["actions"] == result.policy.to_dict()["actions"]
    rows = {row["action"]: row for row in about["summary"]}
    assert sum(row["layers"] for row in rows.values()) == 15
    for share, numel in (("0.2", 64 * 64), ("0.7", 32 * 64)):
        row = rows[f"magnitude(sparsity={share})"]
        assert (row["sites"], row["layers"], row["weights"]) == (1, 1, numel)


ONE_OF_EACH = [
    {
        "sites": "blocks.*",
        "actions": ["rtn(bits=[3, 4, 8], group=16)", "magnitude(sparsity=[0.4, 0.8])"],
    }
]


def test_every_kind_of_rival_is_reported(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    wanted = ["allocation", "quantization", "pruning", "random"]
    config = config_of(
        tiny_checkpoint,
        text,
        space=ONE_OF_EACH,
        objective={"budgets": {"size_bytes": "60%"}},
        search={"trials": 12, "finalists": 1, "sampler": "tpe", "rivals": wanted},
    )
    whole = search(config, tmp_path / "whole")
    origins = {row["origin"] for row in whole.finals["rivals"]}
    kinds = {rival_kind(origin) for origin in origins}
    # The best by bits alone, and the best of all, is 8 bits everywhere: uniform.
    assert kinds == {"uniform", "pruning only", RANDOM}
    assert len(origins) == len(kinds)  # the best of each
    assert all(row["report"]["perplexity"] > 0 for row in whole.finals["rivals"])
    best = min(whole.finals["rivals"], key=lambda row: row["choice"]["kl"])
    assert whole.finals["winner"]["choice"]["kl"] <= best["choice"]["kl"]
    assert len(whole.trials) == 12
    assert len(read_trials(tmp_path / "whole" / RANDOM_RIVAL)) == 12

    parted = tmp_path / "parted"
    assert search(config, parted, stop=after(12 + 5)).ended == "stopped"
    assert len(read_trials(parted / RANDOM_RIVAL)) == 5
    assert search(config, parted).finals == whole.finals


def test_a_part_without_a_policy_that_keeps_the_limits_loses_nothing(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """Perplexity is known from trials only; the random search keeps it in none."""
    config = config_of(
        tiny_checkpoint, text, search={"trials": 4, "sampler": "tpe", "finalists": 1}
    )
    whole = search(config, tmp_path / "run")
    with Ledger.read(whole.run_dir) as ledger:
        trials = ledger.trials()
    over = [replace(one, constraints={"perplexity": 1.0}) for one in trials]
    plan, listener = Plan.make(config, load_plugins()), Listener()
    good, bad = Searched("", plan, trials), Searched(RANDOM_RIVAL, plan, over)
    winner, finals = conclude([good, bad], listener)
    assert winner.candidate.policy == whole.policy
    assert finals["winner"] == whole.finals["winner"]
    winner, _ = conclude([bad, good], listener)
    assert winner.candidate.policy == whole.policy
    with pytest.raises(BudgetError, match="none of 4 trials kept every limit"):
        conclude([bad, bad], listener)


def test_time_that_is_left_over_refines_further_finalists(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint, text, search={"trials": 8, "sampler": "tpe", "finalists": 4}
    )
    whole = search(config, tmp_path / "run")
    with Ledger.read(whole.run_dir) as ledger:
        trials = ledger.trials()
    reserve = Reserve(rank=1, solve=1, mix=1, report=5, export=5)

    def refined(left: Callable[[int], float], reserve: Reserve | None) -> list[str]:
        """Tell who is refined, where so much time is left after each."""
        plan, listener = Plan.make(config, load_plugins()), Listener()

        def solved() -> list[str]:
            return [name for name in listener.stages if name.startswith("solving")]

        parts = [Searched("", plan, trials)]
        _, finals = conclude(parts, listener, lambda: left(len(solved())), reserve)
        kinds = [rival_kind(row["origin"]) for row in finals["rivals"]]
        assert len(kinds) == len(set(kinds))
        return solved()

    ranked = len(whole.finals["finalists"])
    usual = refined(lambda _: math.inf, reserve)
    assert usual == refined(lambda _: math.inf, None) and len(usual) <= 2
    much = refined(lambda _: 1000.0, reserve)
    assert len(set(much)) == len(much) == ranked > 3 and much[: len(usual)] == usual
    # Each takes ten seconds, and ten are for what follows: of 45 a third leaves 15, in
    # which a fourth would not end, however little was foreseen for it; of 50 it does.
    assert refined(lambda solved: 45.0 - 10 * solved, reserve) == much[:3]
    assert refined(lambda solved: 50.0 - 10 * solved, reserve) == much[:4]
    dear = replace(reserve, solve=60.0)  # those before took ten, whatever was foreseen
    assert refined(lambda solved: 500.0 - 10 * solved, dear) == much


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "bert"])
def test_other_families_are_searched(
    kind: str, text: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = save_tiny(kind, tmp_path / "model", tiny_tokenizer)
    config = config_of(
        model,
        text,
        task="masked-lm" if kind == "bert" else "causal-lm",
        search={"trials": 3, "finalists": 1},
        space=[{"actions": ["gptq(bits=[3, 4], group=16)", "wanda(pattern=2:4)"]}],
        objective={"budgets": {"size_bytes": "70%"}},
    )
    result = search(config, tmp_path / "run")
    assert (result.trials["state"] == "complete").all()
    assert (result.trials["kl"] > 0).all()
    assert abs(result.finals["dense"]["kl"]) < 1e-5
    assert result.policy is not None
    treated = [site for site, action in result.policy.items() if action.steps]
    assert treated == [site for site in result.policy if site.startswith("blocks.")]


def test_a_space_is_named_by_its_path_or_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, text: str
) -> None:
    assert find_space("quick").name == "quick.yaml"
    monkeypatch.chdir(tmp_path)
    data = space_of(tiny_checkpoint, text)
    Path("mine.yaml").write_text(yaml.safe_dump(data))
    result = search("mine.yaml", search__trials=1, search__seed=4)
    assert result.run_dir == Path("results/runs/mine")
    assert len(result.trials) == 1
    assert read_trials(result.run_dir)[0].number == 0
    with pytest.raises(ConfigError, match="unknown space 'mien.yaml'.*looked in"):
        find_space("mien.yaml")
    with pytest.raises(ConfigError, match="unknown space 'quik'. Did you mean 'quick'"):
        search("quik")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "finals.json"
    path.write_text("old")
    path.chmod(0o600)
    with pytest.raises(RunError, match=r"cannot write .*missing/finals\.json"):
        write_whole(tmp_path / "missing/finals.json", "new")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["finals.json"]
