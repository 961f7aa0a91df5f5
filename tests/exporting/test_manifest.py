"""A folder that is not what was written is caught, in whatever way it was changed."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import WEIGHTS, Packed
from autoprune_plugins.tasks import register_tasks
from tiny_exports import FORMS, case_of
from tiny_models import tiny
from transformers import PreTrainedTokenizerFast

from autoprune.errors import ExportError
from autoprune.exporting.folder import write_export
from autoprune.exporting.manifest import (
    MANIFEST,
    check_files,
    file_sha256,
    read_manifest,
    write_manifest,
)
from autoprune.exporting.marker import MARKER
from autoprune.exporting.probe import Probe
from autoprune.exporting.verification import Expected, Verification, verify

CAUSAL = register_tasks()[0]


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """An export as it should be, not verified yet."""
    place = tmp_path_factory.mktemp("export")
    tiny("llama").save_pretrained(place / "dense")
    case = case_of(place / "dense", "AutoModelForCausalLM", list(FORMS))
    (place / "dense" / "LICENSE").write_text("Do as you like.")
    ids = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(0))
    probe = Probe.take(CAUSAL, case.model, None, ids)
    size = Packed().size_bytes(case.job.storages, case.untouched)
    expected = Expected("causal-lm", ids.tolist(), probe.perplexity, size, probe=probe)
    write_export(
        Packed(),
        case.job,
        place / "whole",
        policy=case.policy,
        tokenizer=tiny_tokenizer,
        expected=expected,
        record={"seed": 7},
        card=lambda about: "# A model\n",
        check=lambda made, told: Verification(1.0, 1.0, size, 0.1),
    )
    return place / "whole"


@pytest.fixture
def export(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def test_a_copy_passes_and_is_the_same_to_the_bit(export: Path) -> None:
    found = verify(export)
    manifest = json.loads((export / MANIFEST).read_text())
    assert found.layers == len(manifest["layers"]) == 15
    assert found.logits == 0
    assert found.size_bytes == (export / WEIGHTS).stat().st_size
    assert found.perplexity == pytest.approx(found.expected_perplexity, rel=1e-6)


def test_the_manifest_tells_where_all_comes_from(export: Path) -> None:
    manifest = read_manifest(export)
    files = {path.name for path in export.iterdir()} - {MANIFEST}
    assert manifest["files"].keys() == files >= {"policy.json", "LICENSE", "README.md"}
    assert {"seed", "policy", "command", "probe", "bounds", "target"} <= manifest.keys()


def test_what_tools_leave_behind_a_dot_is_no_matter(export: Path) -> None:
    (export / ".cache").mkdir()
    (export / ".cache" / "download.lock").touch()
    (export / ".gitattributes").write_text("*.safetensors filter=lfs")
    check_files(export, read_manifest(export))


def flip(folder: Path, name: str, place: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)


def cut(folder: Path, name: str, count: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-count])


def append(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def swap_halves(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    half = len(data) // 2
    (folder / WEIGHTS).write_bytes(data[half:] + data[:half])


def empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


def add(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"new")


def edit(folder: Path, name: str, **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **changes}))


def forget(folder: Path) -> None:
    """Take a file out of both, as if it had never been."""
    (folder / "LICENSE").unlink()
    data = json.loads((folder / MANIFEST).read_text())
    del data["files"]["LICENSE"]
    (folder / MANIFEST).write_text(json.dumps(data))


def another_policy(folder: Path) -> None:
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace("bits=4", "bits=3", 1))


def half_written(folder: Path) -> None:
    """As a copy that was interrupted leaves it."""
    (folder / MANIFEST).unlink()
    cut(folder, WEIGHTS, 500)


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (
        partial(flip, name=WEIGHTS, place=-1),
        rf"{WEIGHTS} has SHA-256 \w{{64}}, written was \w{{64}}",
    ),
    "a bit of their header": (partial(flip, name=WEIGHTS, place=40), "has SHA-256"),
    "their end": (partial(cut, name=WEIGHTS, count=64), r"has \d+ bytes, written were"),
    "their last byte": (partial(cut, name=WEIGHTS, count=1), r"has \d+ bytes, written"),
    "a byte too many": (partial(append, name=WEIGHTS), r"has \d+ bytes, written were"),
    "halves swapped": (swap_halves, "has SHA-256"),
    "weights empty": (partial(empty, name=WEIGHTS), "has 0 bytes"),
    "weights gone": (partial(remove, name=WEIGHTS), f"{WEIGHTS} is missing"),
    "a pickle beside": (
        partial(add, name="pytorch_model.bin"),
        "model.bin was",
    ),
    "a file in a folder": (
        partial(add, name="x/model.py"),
        "x/model.py was",
    ),
    "other widths": (
        partial(edit, name="config.json", intermediate_size=56),
        r"config.json has \d+ bytes",
    ),
    "no configuration": (partial(remove, name="config.json"), "is missing"),
    "another tokenizer": (
        partial(flip, name="tokenizer.json", place=9),
        "has SHA",
    ),
    "no licence": (partial(remove, name="LICENSE"), "LICENSE is missing"),
    "another card": (partial(append, name="README.md"), r"README.md has \d+ bytes"),
    "another policy": (another_policy, "policy.json has SHA-256"),
    "another marker": (partial(edit, name=MARKER, dtype="float16"), f"{MARKER} has"),
    "no manifest": (partial(remove, name=MANIFEST), "was never finished"),
    "half a manifest": (
        partial(cut, name=MANIFEST, count=99),
        "is damaged: ",
    ),
    "an empty manifest": (partial(empty, name=MANIFEST), "is damaged: Expect"),
    "a forgotten file": (forget, "was changed after it was written"),
    "other layers": (partial(edit, name=MANIFEST, layers={}), "was changed after"),
    "looser bounds": (
        partial(edit, name=MANIFEST, bounds={"perplexity": 9}),
        "was changed after it was written",
    ),
    "a newer manifest": (partial(edit, name=MANIFEST, format=9), "reads up to 1"),
    "no files named": (partial(edit, name=MANIFEST, files=None), "'files' is None"),
    "no object": (lambda f: (f / MANIFEST).write_text("[1]"), "holds no JSON object"),
    "half written": (half_written, "was never finished"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_caught(
    tamper: Callable[[Path], object], message: str, export: Path
) -> None:
    tamper(export)
    with pytest.raises(ExportError, match=message):
        verify(export)


def test_weights_that_differ_behind_right_hashes_are_caught(export: Path) -> None:
    """One who writes the manifest anew still meets what the layers have to be."""
    manifest = read_manifest(export)
    flip(export, WEIGHTS, -1)
    marker = json.loads((export / MARKER).read_text())
    files = {WEIGHTS: file_sha256(export / WEIGHTS)}
    (export / MARKER).write_text(json.dumps({**marker, "files": files}))
    about = {k: v for k, v in manifest.items() if k not in ("files", "sha256")}
    write_manifest(export, about)
    with pytest.raises(ExportError, match="other weights than were exported in 1 of"):
        verify(export)


def test_a_manifest_without_what_a_check_needs_is_told(export: Path) -> None:
    manifest = read_manifest(export)
    about = {k: v for k, v in manifest.items() if k not in ("files", "sha256", "probe")}
    write_manifest(export, about)
    with pytest.raises(ExportError, match="lacks what a check needs.*'probe'"):
        verify(export)


def test_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no folder '.*nowhere'"):
        verify(tmp_path / "nowhere")


def test_a_probe_tells_how_far_models_are_apart() -> None:
    near = Probe([[1, 2]], 2.0, [[0, 1]], [[-1.0, -2.0]], "a")
    far = Probe([[1, 2]], 2.0, [[0, 1]], [[-1.5, -2.0]], "b")
    assert near.distance(far) == 0.5
    lost = Probe.from_dict({**far.to_dict(), "logprobs": [[None, -2.0]]})
    assert near.distance(lost) == math.inf
    assert lost.distance(lost) == 0
    assert near.distance(Probe([[1]], 2.0, [[0]], [[-1.0]], "c")) == math.inf
