"""Plans: sizes to the byte of what runs write, known counts, clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import config_of, write_text
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.config import RunConfig
from autoprune.errors import ConfigError, ModelError, ProfileError
from autoprune.models.outline import outline, shapes
from autoprune.planning import disk
from autoprune.planning.foresee import Foreseen, foresee
from autoprune.planning.memory import pass_bytes
from autoprune.planning.outlined import Outlined
from autoprune.planning.rates import ON_PAPER, Rates, Span, find_rates, total
from autoprune.planning.work import Work
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.searching.plan import Plan

RECORD: dict[str, Any] = {
    "device": "a processor",
    "kind": "cpu",
    "date": "2026-11-28",
    "cores": 2,
    "memory_bytes": 24e9,
    "bfloat16": True,
    "start_s": 4.0,
    "base_bytes": 3e8,
    "text_s": 5.0,
    "write_mb_s": 200.0,
    "read_mb_s": 400.0,
    "head_flop_s": 5e10,
    "teacher_factor": 3.0,
    "pull_factor": 2.0,
    "push_factor": 1.5,
    "pricing_s": 1e-9,
    "apart_s": 1e-12,
    "activation_bytes": 8.0,
    "put_s": 2e-8,
    "get_s": 5e-9,
    "products": [
        {"width": 512, "type": "bfloat16", "flop_s": 1e11},
        {"width": 2048, "type": "bfloat16", "flop_s": 2e11},
        {"width": 512, "type": "float32", "flop_s": 5e10},
    ],
    "hessians": [{"width": 512, "flop_s": 5e10}, {"width": 4096, "flop_s": 1e11}],
    "methods": {
        "gptq": [{"side": 100, "one_s": 3.0, "settings": 3, "many_s": 5.0}],
        "rtn": [{"side": 100, "one_s": 0.1, "settings": 3, "many_s": 0.3}],
        "magnitude": [{"side": 100, "one_s": 0.2, "settings": 3, "many_s": 0.6}],
        "sparsegpt": [{"side": 100, "one_s": 4.0, "settings": 3, "many_s": 8.0}],
    },
    "derived": {"rtn": "codes", "magnitude": "values"},
}

SPACE = [{"sites": "blocks.*", "actions": ["gptq(bits=[3, 4], group=64)", "dense"]}]


def config(**changes: Any) -> RunConfig:
    data = {"model": "135M", "space": SPACE, "search": {"trials": 10}} | changes
    return RunConfig.from_dict(data)


@pytest.fixture
def record(tmp_path: Path) -> str:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD))
    return str(path)


def work(**changes: Any) -> Work:
    return Work(
        Outlined.of(config(**changes), load_plugins()), Rates("a processor", RECORD)
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("135M", 134_515_008),
        ("1B", 1_235_814_400),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
    ],
)
def test_shapes_have_the_parameters_of_the_released_models(
    name: str, parameters: int
) -> None:
    model = outline(name)
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert next(model.parameters()).is_meta


def test_every_shape_names_its_source() -> None:
    assert set(shapes()) == {"135M", "1B", "8B", "70B"}
    assert all("/" in one["source"] for one in shapes().values())


def test_variants_and_teachers_take_to_the_byte_what_was_told(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    asked = config_of(tiny_checkpoint, write_text(tmp_path))
    plan = Plan.make(asked, load_plugins(), tmp_path / "cache")
    plan.bank.make(plan.pairs)
    for split in ("fitness", "choice", "report"):
        plan.bench.teacher(split)
    outlined = Outlined.of(asked, load_plugins())
    compute = str(plan.bench.compute_dtype).removeprefix("torch.")

    def size(folder: str) -> int:
        files = (tmp_path / "cache" / folder).rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    # The reference of the bank is one of the space's own policies: no file is extra.
    assert disk.variants_bytes(outlined, RECORD["derived"]) == size("variants") > 0
    assert disk.teachers_bytes(outlined, compute) == size("teachers") > 0
    assert disk.variants_bytes(outlined, {}) > size("variants")
    assert outlined.problem.space.fingerprint == plan.problem.space.fingerprint
    assert outlined.problem.budgets == plan.problem.budgets
    assert dict(outlined.bench.untouched) == dict(plan.bench.untouched)


@pytest.mark.parametrize("target", ["packed", "transformers"])
def test_exports_are_bounded_by_the_budget(target: str) -> None:
    space = [{"sites": "blocks.*", "actions": ["rtn(bits=[4, 8], group=32)"]}]
    wanted = {"budgets": {"size_bytes": "90%"}} if target == "packed" else {}
    outlined = Outlined.of(
        config(space=space, objective=wanted, export=target), load_plugins()
    )
    bench = outlined.bench
    low, high = disk.export_bytes(outlined)
    smallest = {
        site.name: outlined.problem.space.choices[site.name][0]
        for site in outlined.problem.space.sites
    }
    exact = bench.exporter.size_bytes(bench.storages(Policy(smallest)), bench.untouched)
    assert exact <= low < exact + 10 * len(bench.layers) * 4
    assert high >= low


def test_operations_are_those_counted_by_hand() -> None:
    counted = work()
    # Of a block: q and o 576 x 576, k and v 192 x 576, three of 1536 x 576.
    assert counted.weights == 30 * (2 * 576**2 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert counted.flop(1) == 2 * counted.weights + 4 * 512 * 576 * 30
    # One Hessian an input: qkv, o, gate and up, down.
    flop = 30 * 2 * 32 * 512 * (3 * 576**2 + 1536**2) * 5 / 8
    spans = counted.hessians(counted.pairs)
    assert flop / 1e11 < spans.middle < flop / 5e10


def test_calls_share_a_factorisation() -> None:
    rates = Rates("a processor", RECORD)
    # Each setting 1 s of a side of 100, and 2 s for the factorisation of all.
    one = rates.call_s("gptq", 1, 100, 100, hessian=True)
    assert one == pytest.approx(3.0)
    assert rates.call_s("gptq", 2, 300, 100, hessian=True) == pytest.approx(2 + 6)
    assert rates.call_s("gptq", 1, 100, 200, hessian=True) == pytest.approx(8 * 2 + 4)
    assert rates.call_s("rtn", 2, 300, 200, hessian=False) == pytest.approx(1.2)
    # One that was never recorded takes what the slowest takes.
    unknown = rates.call_s("other", 1, 100, 100, hessian=True)
    assert unknown == pytest.approx(4.0)


def test_rates_between_two_widths() -> None:
    rates = Rates("a processor", RECORD)
    assert rates.products(1e11, 512).middle == pytest.approx(1.0)
    assert rates.products(1e11, 1024).middle == pytest.approx(1 / 1.5)
    assert rates.products(1e11, 8192).middle == pytest.approx(0.5)
    assert rates.products(1e11, 8192, "float32").middle == pytest.approx(2.0)


def test_spans_add_up() -> None:
    assert total([Span(1, 2, 3), Span(1, 1, 1) * 2]) == Span(3, 4, 5)


def test_workers_share_trials_only(record: str) -> None:
    alone, four = foresee(config(), record), foresee(config(), record, workers=4)
    assert alone.busy == four.busy and alone.wall == alone.busy
    trials = next(phase.span for phase in four.phases if phase.name == "trials")
    assert trials.middle == pytest.approx(10 * four.trial.middle)
    saved = alone.wall.middle - four.wall.middle
    assert saved == pytest.approx(0.75 * trials.middle)
    own, shared = four.worker.own, four.driver.shared
    assert four.machine_bytes == pytest.approx(four.driver.own + shared + 4 * own)


def test_a_budget_of_time_decides_the_trials(record: str) -> None:
    plain = [{"sites": "blocks.*", "actions": ["rtn(bits=[3, 4], group=64)"]}]

    def trials(budget: str) -> Foreseen:
        return foresee(config(space=plain, search={"budget": budget}), record)

    day, two = trials("24h"), trials("48h")
    more = (two.trials - day.trials) * day.trial.middle
    assert more == pytest.approx(86_400, abs=2 * day.trial.middle)
    assert day.wall.middle == pytest.approx(86_400, abs=2 * day.trial.middle)
    assert any("fits into 24 h" in note for note in day.notes)
    short = trials("1s")
    assert any("before the first trial" in note for note in short.notes)


def test_training_is_foretold_by_its_tokens(record: str) -> None:
    def planned(tokens: int, **search: Any) -> Foreseen:
        courses = [f"progressive(stages=2) + distill(tokens=[{tokens}, {2 * tokens}])"]
        recovery = {"schedules": courses, "candidates": 2, "share": 0.5}
        actions = ["magnitude(sparsity=[0.3, 0.5])"]
        asked = config(
            text={"recovery": 8},
            space=[{"sites": "blocks.*", "actions": actions}],
            search={"trials": 3, **search},
            recovery=recovery,
        )
        return foresee(asked, record)

    def phase(found: Foreseen) -> Span:
        return next(one.span for one in found.phases if one.name == "training")

    few, more = planned(2**16), planned(2**17)
    assert phase(more).middle == pytest.approx(2 * phase(few).middle)
    # Of 4 trainings, 2 of each length: all on a quarter of the tokens, a third in full.
    outlined = Outlined.of(config(search={"trials": 3}), load_plugins())
    each = Work(outlined, Rates("a processor", RECORD)).measured(10**6).middle / 10**6
    tokens = 2 * 3 * 2**16 * (0.25 + 1 / 3)
    assert phase(few).middle == pytest.approx(12 * each * tokens)
    assert any("2 courses of 65536 to 131072 tokens" in note for note in few.notes)
    weights = sum(la.numel for la in outlined.bench.layers if la.block is not None)
    assert few.disk["checkpoints"] == (24 + 5 * 2) * weights
    plain = foresee(config(search={"trials": 3}), record)
    assert plain.disk["checkpoints"] == 0
    assert few.driver.own > 16 * weights
    assert few.driver.own > plain.driver.own + 12 * weights
    assert "training" not in [one.name for one in plain.phases]
    limited = planned(2**24, trials=None, budget="24h")
    assert phase(limited).middle == pytest.approx(12 * 3600)


def test_a_pass_is_flat_in_depth() -> None:
    def shape(blocks: int, folder: Path) -> Work:
        from transformers import LlamaConfig

        LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=4,
            dtype="bfloat16",
        ).save_pretrained(folder)
        return work(model=str(folder))

    import tempfile

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        few, many = shape(2, Path(one)), shape(24, Path(other))
        assert pass_bytes(few, 1) == pass_bytes(many, 1)
        assert pass_bytes(few, 9) > 2 * pass_bytes(few, 1)


def test_a_gpu_is_told_to_be_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autoprune.planning.rates.known_records", lambda: {"a processor": RECORD}
    )
    found = foresee(config(model="8B"), "h100")
    assert found.device == "h100" and ON_PAPER in found.basis
    assert any("searches on processors" in note for note in found.notes)
    assert found.trial.high > 2 * found.trial.middle > 3 * found.trial.low
    assert found.memory_bytes == 80e9
    with pytest.raises(ProfileError, match="Did you mean 'h100'"):
        find_rates("h10")


def test_what_does_not_fit_says_what_does(record: str) -> None:
    none = foresee(config(model="70B"), record)
    assert "70B needs" in none.misfit and "24.0 GB" in none.misfit
    assert "such machines" in none.misfit and "billion weights fit" in none.misfit
    some = foresee(config(), record, workers=200)
    assert "200 workers" in some.misfit and "fit beside the driver" in some.misfit
    assert foresee(config(), record, workers=1).misfit == ""


def test_refusals(record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.planning.rates.known_records", lambda: {})
    with pytest.raises(ModelError, match="'3B'.*135M, 1B, 8B, 70B"):
        foresee(config(model="3B"), record)
    with pytest.raises(ProfileError, match="was not recorded"):
        foresee(config(), "cpu")
    with pytest.raises(ProfileError, match="no processor was recorded"):
        foresee(config(), "h100")
    with pytest.raises(ProfileError, match="nothing is known of the device 'abacus'"):
        foresee(config(), "abacus")
    (tmp_path / "half.json").write_text(json.dumps({"device": "x"}))
    with pytest.raises(ProfileError, match="lack 'date'"):
        foresee(config(), str(tmp_path / "half.json"))
    with pytest.raises(ProfileError, match=r"cannot read the rates in .*none\.json"):
        foresee(config(), str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no policy of the space meets the budget"):
        foresee(config(objective={"budgets": {"size_bytes": "1%"}}), record)


@pytest.mark.slow
def test_the_command(record: str) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(
            app, ["plan", "quick", "--device", record, *arguments]
        )

    told = run("--model", "135M", "--workers", "2")
    assert told.exit_code == 0, told.output
    for word in (
        "sensitivities",
        "until it ends",
        "each worker",
        "variants",
        "teachers",
    ):
        assert word in told.stdout
    data = json.loads(run("--model", "1B", "--json").stdout)
    assert data["model"] == "1B" and data["trials"] == 180
    assert [phase["name"] for phase in data["phases"]][0] == "load"
    large = run("--model", "70B")
    assert large.exit_code == 1 and "70B needs" in " ".join(large.stderr.split())
    assert "variants" in large.stdout
