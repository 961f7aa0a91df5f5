"""Whatever a user gives that cannot work gets a clear error, and nothing is lost."""

import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import config_of, write_text

from autoprune.config import RunConfig
from autoprune.errors import (
    BudgetError,
    ConfigError,
    ModelError,
    PluginError,
    RunError,
    StoreError,
    TextError,
)
from autoprune.run import search
from autoprune.searching.runs import read_trials, read_winner


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that variants are made in this test."""
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_action(text: str) -> dict[str, Any]:
    return {"space": [{"actions": ["rtn(bits=4, group=16)", text]}]}


def files_of(folder: Path) -> dict[str, bytes]:
    """Read all files of a run folder, but those that hold times."""
    return {
        path.name: path.read_bytes()
        for path in folder.glob("*")
        if path.name not in ("trials.csv", "trials.parquet")
        and not path.name.startswith(("ledger", "."))
    }


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "/no/such"}, ModelError, "there is no model '/no/such': no such"),
        ({"model": "dmeo"}, ModelError, "no model 'dmeo'.*Did you mean 'demo'"),
        (
            one_action("wnada(sparsity=0.5)"),
            ConfigError,
            r"sites 'blocks\.\*': unknown method 'wnada'. Did you mean 'wanda'",
        ),
        (
            one_action("wanda(sparsity=1.2)"),
            ConfigError,
            r"wanda\(sparsity=\.\.\.\) lies between 0 and 1, found 1\.2",
        ),
        (
            one_action("wanda(sparsty=0.5)"),
            ConfigError,
            "unknown parameter of wanda 'sparsty'. Did you mean 'sparsity'",
        ),
        (
            one_action("rtn(bits=4, group=48)"),
            ConfigError,
            r"none of the 8 sites of 'blocks\.\*' can do 'rtn\(bits=4, group=48\)'.*48",
        ),
        (
            {"space": [{"sites": "block.*", "actions": ["dense"]}]},
            ConfigError,
            r"'block\.\*' matches none of 9 sites. They are named embedding, blocks",
        ),
        (
            {"objective": {"budgets": {"size_bytes": "9%"}}},
            BudgetError,
            r"no policy .* size_bytes <= 32741.3; the best .* reach is \d+ \(dense: 36",
        ),
        (
            {"objective": {"budgets": {"sparsity": 0.9}}},
            BudgetError,
            r"sparsity >= 0.9; the best that its actions reach is 0\.\d+ \(dense: 0\)",
        ),
        (
            {"objective": {"budgets": {"sparsity": "50%"}}},
            ConfigError,
            "sparsity is 0.5 x dense, but the dense model's sparsity is 0; give an abs",
        ),
        (
            {"objective": {"metric": "klx"}},
            ConfigError,
            "unknown metric 'klx'. Did you mean 'kl'",
        ),
        (
            {"objective": {"budgets": {"size_byte": "50%"}}},
            ConfigError,
            "unknown metric 'size_byte'. Did you mean 'size_bytes'",
        ),
        (
            {"objective": {"pareto": ["kl", "latency_ms"]}},
            ConfigError,
            "unknown metric 'latency_ms'.* Known: .*kl",
        ),
        (
            {"objective": {"pareto": ["kl", "kl"]}},
            ConfigError,
            r"each once; found \['kl', 'kl'\]",
        ),
        (
            {"objective": {"reward": "log"}},
            PluginError,
            "unknown reward 'log'. Did you mean 'logs'",
        ),
        (
            {"objective": {"reward": "logs", "weights": {"perplexty": 1}}},
            ConfigError,
            "reward 'logs': unknown metric 'perplexty'. Did you mean 'perplexity'",
        ),
        (
            {"objective": {"reward": "logs", "weights": {"kl": 1}}},
            ConfigError,
            "ratios to the dense model, whose kl is .*such as perplexity",
        ),
        (
            {"search": {"sampler": "nsga", "trials": 1}},
            PluginError,
            "unknown sampler 'nsga'. Did you mean 'nsga2'",
        ),
        ({"export": "ggfu"}, PluginError, "unknown exporter 'ggfu'. Did you mean 'gg"),
        ({"task": "mask-lm"}, PluginError, "unknown task 'mask-lm'. Did you mean 'ma"),
        ({"plugins": ["no.such"]}, PluginError, r"no\.such"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_a_configuration_that_cannot_work_is_told_before_anything_is_made(
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
) -> None:
    config = config_of(tiny_checkpoint, text).model_dump()
    config = RunConfig.from_dict({**config, **changes})
    with pytest.raises(kind, match=message):
        search(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"the text 'file:.*' is empty|holds no text|is empty"),
        (" \n\n \n", "is empty"),
        ("Only a few words.", "too short: split '.*' has not one window of 32 tokens"),
        (None, "no such|there is no"),
    ],
    ids=["empty", "blank", "short", "missing"],
)
def test_too_little_text_is_told(
    content: str | None, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TextError, match=message) as caught:
        search(config_of(tiny_checkpoint, f"file:{path}"), tmp_path / "run")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_space_is_kept(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    search(config_of(tiny_checkpoint, text), tmp_path / "run")
    before = files_of(tmp_path / "run")
    other = config_of(tiny_checkpoint, text, **one_action("wanda(sparsity=0.7)"))
    with pytest.raises(
        RunError, match=r"run was made with something else:\n(.*\n)*  space: '"
    ):
        search(other, tmp_path / "run")
    seeded = config_of(tiny_checkpoint, text, search={"trials": 6, "seed": 3})
    with pytest.raises(RunError, match="seed: 0 then, 3 now"):
        search(seeded, tmp_path / "run")
    assert files_of(tmp_path / "run") == before
    assert len(read_trials(tmp_path / "run")) == 6


def test_two_runs_in_one_folder_at_a_time(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = config_of(tiny_checkpoint, text)
    search(config, run_dir, stop=lambda: True)
    code = (
        "import sys; from pathlib import Path\n"
        "from autoprune.searching.ledger import Ledger\n"
        "folder = Path(sys.argv[1])\n"
        "with Ledger.read(folder) as ledger: made_with = ledger.fingerprint\n"
        "with Ledger.open(folder, made_with):\n"
        "    print('here', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "here\n"
        message = f"another run goes on in .*run: process {holder.pid} on "
        with pytest.raises(RunError, match=message):
            search(config, run_dir)
        assert read_trials(run_dir) == []  # reading goes on all the while
        holder.stdin.close()
    assert len(search(config, run_dir).trials) == 6


def test_damaged_variants_are_made_again(
    cache: Path,
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(tiny_checkpoint, text)
    whole = search(config, tmp_path / "whole")
    variants = sorted((cache / "variants").glob("*/*.safetensors"))
    shutil.copytree(cache / "variants", tmp_path / "sound")
    for number, path in enumerate(variants):
        content = bytearray(path.read_bytes())
        # In the values, in the header, or cut off: by turns.
        place = (len(content) - 5, 12, None)[number % 3]
        if place is None:
            content = content[: len(content) // 2]
        else:
            content[place] ^= 0xFF
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = search(config, tmp_path / "again")
    assert "is damaged (its checksum does not match): making it again" in caplog.text
    assert again.policy == whole.policy
    assert again.finals == whole.finals
    figures = [dict(t.metrics) for t in read_trials(tmp_path / "again")]
    assert figures == [dict(t.metrics) for t in read_trials(tmp_path / "whole")]
    for record in caplog.records:
        damaged = Path(str(record.args[0])) if record.args else cache  # type: ignore[index]
        sound = tmp_path / "sound" / damaged.relative_to(cache / "variants")
        assert_same_tensors(damaged, sound)


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Let no file of this process grow beyond some bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_variants_are_made(
    cache: Path, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    large = [{"sites": "embedding", "actions": ["svd(size=[0.8, 0.9])"]}]
    config = config_of(
        tiny_checkpoint, text, space=large, objective={}, search={"trials": 2}
    )
    message = "cannot write a variant of .* bytes to .*AUTOPRUNE_CACHE"
    with full_disk(57_000), pytest.raises(StoreError, match=message):
        search(config, tmp_path / "run")
    assert not list((cache / "variants").rglob("*.part"))
    assert len(search(config, tmp_path / "run").trials) == 2


def test_a_full_disk_while_the_run_folder_is_made(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, text)
    message = r"cannot write the ledger .*run/ledger\.sqlite: .*free the disk"
    with full_disk(5_000), pytest.raises(RunError, match=message):
        search(config, tmp_path / "run")
    assert len(search(config, tmp_path / "run").trials) == 6


def test_a_full_disk_while_trials_are_made(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """The rows up to there stay, and the same call goes on behind them."""
    config = config_of(
        tiny_checkpoint, text, search={"trials": 16, "sampler": "random"}
    )
    whole = search(config, tmp_path / "whole")
    with full_disk(100_000), pytest.raises(RunError, match="cannot write .*") as caught:
        search(config, tmp_path / "run")
    assert "ledger.sqlite" in str(caught.value)
    kept = read_trials(tmp_path / "run")
    assert 0 < len(kept) < 16
    rest = search(config, tmp_path / "run")
    assert rest.policy == whole.policy
    assert rest.trials["policy"].tolist() == whole.trials["policy"].tolist()
    assert rest.trials["kl"].tolist() == whole.trials["kl"].tolist()


@pytest.mark.parametrize("name", ["finals.json", "trials.csv", "config.yaml"])
def test_a_file_that_cannot_be_written_loses_no_trial(
    name: str, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """Something else stands in its place; what a search leaves last is made again."""
    config = config_of(tiny_checkpoint, text)
    run_dir = tmp_path / "run"
    whole = search(config, run_dir)
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    with pytest.raises(RunError, match=f"cannot write .*run/{name}: .*Is a directory"):
        search(config, run_dir)
    assert len(read_trials(run_dir)) == 6
    assert not list(run_dir.glob("*.part"))
    (run_dir / name).rmdir()
    assert search(config, run_dir).finals == whole.finals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read the winner .*policy\.json: .*search command again"),
        ("{}", r"cannot read the winner .*policy\.json: not a policy"),
    ],
    ids=["cut", "empty"],
)
def test_a_damaged_winner_is_told_and_written_anew(
    content: str, message: str, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, text, search={"trials": 2, "finalists": 1})
    first = search(config, tmp_path / "run")
    (tmp_path / "run/policy.json").write_text(content)
    with pytest.raises(RunError, match=message):
        read_winner(tmp_path / "run")
    search(config, tmp_path / "run")
    assert first.policy is not None
    assert read_winner(tmp_path / "run")["actions"] == first.policy.to_dict()["actions"]


def test_a_store_too_small_for_the_space_is_told(
    tiny_checkpoint: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_STORE_GB", "0.0001")
    with pytest.raises(ConfigError, match="cap of the store is 0.0 GB.*or more with"):
        search(config_of(tiny_checkpoint, text), tmp_path / "run")
    monkeypatch.setenv("AUTOPRUNE_STORE_GB", "lots")
    with pytest.raises(StoreError, match="AUTOPRUNE_STORE_GB .*found 'lots'"):
        search(config_of(tiny_checkpoint, text), tmp_path / "run")
