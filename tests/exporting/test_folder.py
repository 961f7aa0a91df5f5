"""An export folder is whole or absent, and tells what it is."""

import json
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import Packed
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import FORMS, Case, case_of, tiny_case
from tiny_models import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoprune.errors import ExportError, PluginError
from autoprune.exporting.exporter import Digests, Exporter, ExportJob
from autoprune.exporting.folder import licence_of, load, write_export
from autoprune.exporting.verification import Expected, Verification
from autoprune.policy import Policy

VERIFIED = Verification(12.5, 12.5, 1000, 3.0)
RECORD = {
    "model": {"source": "owner/name"},
    "seed": 7,
    "figures": {"dense": {"perplexity": 11.0}, "compressed": {"perplexity": 12.5}},
}


def card(about: Mapping[str, Any]) -> str:
    return f"# {about['model']['source']}\n"


Write = Callable[..., Path]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return tiny_case("llama", tmp_path / "dense")


@pytest.fixture
def write(case: Case, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Write:
    """Write an export of the case; arguments may be changed."""

    def written(exporter: Exporter | None = None, **changes: Any) -> Path:
        exporter = exporter or Packed()
        size = exporter.size_bytes(case.job.storages, case.untouched)
        arguments: dict[str, Any] = {
            "policy": case.policy,
            "tokenizer": tiny_tokenizer,
            "expected": Expected("causal-lm", [], 12.5, changes.pop("size", size)),
            "record": RECORD,
            "card": card,
            "check": lambda made, expected: VERIFIED,
            **changes,
        }
        folder = tmp_path / "out" / "export"
        assert write_export(exporter, case.job, folder, **arguments) == VERIFIED
        return folder

    return written


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("exporter", [Packed(), TransformersFolder()])
def test_a_folder_has_all_that_is_needed(
    exporter: Exporter, case: Case, write: Write
) -> None:
    folder = write(exporter)
    weights = {"packed": "packed.safetensors", "transformers": "model.safetensors"}
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"policy.json", "README.md", "autoprune.json", weights[exporter.name]}
    expected |= {"MANIFEST.json"}
    assert expected <= names(folder)
    assert names(folder.parent) == {"export"}  # nothing is left beside
    assert torch.equal(case.logits(load(folder)), case.logits())
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [97, 98]
    # The first umask-given right: others may read what safetensors keeps to the owner.
    assert all(file.stat().st_mode & 0o044 for file in folder.iterdir())


def test_the_policy_file_can_be_applied_and_tells_the_figures(
    case: Case, write: Write
) -> None:
    folder = write()
    about = json.loads((folder / "policy.json").read_text())
    assert Policy.from_dict(about) == case.policy
    assert about["model"] == {
        "source": "owner/name",
        "revision": "0123456789abcdef",
        "licence": None,
        "auto_class": "AutoModelForCausalLM",
    }
    assert about["size_bytes"] == (folder / "packed.safetensors").stat().st_size
    assert (about["target"], about["seed"]) == ("packed", 7)
    assert about["figures"] == RECORD["figures"]
    assert about["verified"]["expected_perplexity"] == 12.5
    rows = about["summary"]
    assert sum(row["weights"] for row in rows) == sum(
        layer.numel for layer in case.job.inventory.layers
    )
    assert [row["weights"] for row in rows] == sorted(
        (row["weights"] for row in rows), reverse=True
    )
    stored = sum(storage.nbytes for storage in case.job.storages.values())
    assert sum(row["bytes"] for row in rows) == stored
    assert sum(row["sites"] for row in rows) == len(case.policy)
    assert (folder / "README.md").read_text() == "# owner/name\n"


def test_numbers_that_json_lacks_become_null(write: Write) -> None:
    figures = {"compressed": {"perplexity": float("inf"), "all": [float("nan"), 1.0]}}
    folder = write(record={"figures": figures})
    about = json.loads((folder / "policy.json").read_text())
    assert about["figures"]["compressed"] == {"perplexity": None, "all": [None, 1.0]}


def test_what_comes_with_the_dense_model_stays_with_it(
    case: Case, write: Write
) -> None:
    dense = case.job.checkpoint.folder
    settings = json.dumps({"do_sample": False, "temperature": 0.2})
    (dense / "generation_config.json").write_text(settings)
    (dense / "LICENSE.txt").write_text("as you like")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# Of the dense model")
    for exporter in (Packed(), TransformersFolder()):
        folder = write(exporter, force=True)
        assert (folder / "generation_config.json").read_text() == settings
        assert (folder / "LICENSE.txt").read_text() == "as you like"
        assert "dense" not in (folder / "README.md").read_text()
        about = json.loads((folder / "policy.json").read_text())
        assert about["model"]["licence"] == "mit"


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\ntags: [a]\n---\nText", "apache-2.0"),
        ("README.md", "---\ntags: [a]\n---\nlicense: mit", None),
        ("README.md", "---\nlicense: [a: b\n---\n", None),
        ("README.md", "---\njust words\n---\n", None),
        ("README.md", "license: mit", None),
        ("SOURCE.json", '{"licence": "Apache-2.0"}', "apache-2.0"),
        ("SOURCE.json", "{}", None),
        ("other", "", None),
    ],
)
def test_a_licence_is_found_where_it_is_named(
    name: str, text: str, licence: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence


def test_an_export_is_never_overwritten_without_being_asked(write: Write) -> None:
    before = write()
    (before / "mine").write_text("x")
    with pytest.raises(ExportError, match=r"out.export exists already\. .* --force"):
        write()
    assert (before / "mine").exists()
    assert "mine" not in names(write(force=True))


def test_force_does_not_delete_what_is_no_export(tmp_path: Path, write: Write) -> None:
    (tmp_path / "out" / "export").mkdir(parents=True)
    assert "policy.json" in names(write())  # an empty folder is free
    (tmp_path / "out" / "export" / "policy.json").unlink()
    with pytest.raises(ExportError, match=r"export is no export \(it has no policy"):
        write(force=True)
    assert "config.json" in names(tmp_path / "out" / "export")


def test_a_file_in_the_place_is_told(tmp_path: Path, write: Write) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export").write_text("a file")
    with pytest.raises(ExportError, match="export exists already"):
        write()


class Dying(Packed):
    """Writes most of it, then dies."""

    def write(self, folder: Path, job: ExportJob) -> Digests:
        super().write(folder, job)
        raise KeyboardInterrupt


def test_what_is_interrupted_leaves_nothing_and_keeps_the_old(write: Write) -> None:
    old = write()
    (old / "mark").touch()
    with pytest.raises(KeyboardInterrupt):
        write(Dying(), force=True)
    assert names(old.parent) == {"export"}
    assert (old / "mark").exists()


def test_a_wrong_size_fails_loudly(case: Case, write: Write, tmp_path: Path) -> None:
    size = Packed().size_bytes(case.job.storages, case.untouched)
    with pytest.raises(
        ExportError,
        match=rf"export.failed have {size} bytes.*'packed' had predicted 5\. .*failed",
    ):
        write(size=5)
    assert names(tmp_path / "out") == {"export.failed"}


def test_a_refused_export_never_looks_good(write: Write) -> None:
    old = write()
    (old / "mark").touch()

    def refuse(made: Path, expected: Expected) -> Verification:
        raise ExportError(f"{made} has perplexity 9, but 8 was measured")

    for _ in range(2):  # the second failure takes the place of the first
        with pytest.raises(ExportError, match=r"export.failed has perplexity 9, but 8"):
            write(check=refuse, force=True)
    assert names(old.parent) == {"export", "export.failed"}
    assert (old / "mark").exists()
    assert not (old.with_name("export.failed") / "policy.json").exists()
    # What a person has put there stays.
    (old.with_name("export.failed") / "config.json").unlink()
    with pytest.raises(ExportError, match=r"export.failed\.\w+ has perplexity 9"):
        write(check=refuse, force=True)
    assert len(names(old.parent)) == 3


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path, write: Write) -> None:
    with pytest.raises(
        ExportError, match=rf"needs {10**18} bytes, \d+ are free\. Free some space"
    ):
        write(size=10**18)
    assert names(tmp_path / "out") == set()


@pytest.mark.parametrize("exporter", [Packed(), TransformersFolder()])
def test_a_disk_that_fills_up_is_told(
    exporter: Exporter, case: Case, tmp_path: Path, write: Write
) -> None:
    size = exporter.size_bytes(case.job.storages, case.untouched)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            ExportError,
            match=rf"cannot write .*too large.* needs {size} bytes, \d+ are",
        ):
            write(exporter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path / "out") == set()


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path, write: Write) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ExportError, match=r"cannot write the export .*File exists"):
        write()


def test_a_plain_folder_loads_as_well(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    case = case_of(tmp_path, "AutoModelForCausalLM", list(FORMS)[:1])
    assert torch.equal(case.logits(load(str(tmp_path))), case.logits())


def test_no_folder_and_no_plugin_are_told(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ExportError, match="there is no folder '.*nowhere'"):
        load(tmp_path / "nowhere")
    marker = write() / "autoprune.json"
    marker.write_text(json.dumps({"format": 1, "target": "elsewhere"}))
    with pytest.raises(PluginError, match="unknown exporter 'elsewhere'"):
        load(marker.parent)
    assert os.listdir(marker.parent)  # and nothing is lost
