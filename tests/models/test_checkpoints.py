"""A model is found by its name, checked, and loaded as it is stored."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from autoprune.errors import ModelError
from autoprune.models.checkpoints import (
    Checkpoint,
    cache_dir,
    load_model,
    load_tokenizer,
    resolve,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", "/some/where")
    assert cache_dir() == Path("/some/where")
    monkeypatch.delenv("AUTOPRUNE_CACHE")
    assert cache_dir().name == "autoprune"


def test_folder(
    tiny_checkpoint: Path, cache: Path, tiny_model: LlamaForCausalLM
) -> None:
    checkpoint = resolve(str(tiny_checkpoint), cache=cache)
    assert checkpoint.folder == tiny_checkpoint
    model = load_model(checkpoint)
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert load_tokenizer(checkpoint)("AZ")["input_ids"] == [65, 90]


def test_relative_folder_stays_valid_elsewhere(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    checkpoint = resolve("copy", cache=cache)
    monkeypatch.chdir("/")
    load_model(checkpoint)
    assert checkpoint.source == "copy"


def test_revision_is_of_the_content(folder: Path, cache: Path, tmp_path: Path) -> None:
    first = resolve(str(folder), cache=cache)
    assert len(first.revision) == 16
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert resolve(str(other), cache=cache).revision == first.revision
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(other), cache=cache).revision != first.revision
    with (folder / "config.json").open("a") as config:
        config.write(" ")
    assert resolve(str(folder), cache=cache).revision != first.revision


def test_writing_to_the_model_leaves_the_file(folder: Path, cache: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(resolve(str(folder), cache=cache))
    for parameter in model.parameters():
        parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16, torch.float32], ids=str
)
def test_dtype_is_the_stored_one(
    folder: Path, cache: Path, tiny_model: LlamaForCausalLM, stored: torch.dtype
) -> None:
    config = (folder / "config.json").read_text()
    tiny_model.to(stored).save_pretrained(folder)
    (folder / "config.json").write_text(config)  # which says float32
    checkpoint = resolve(str(folder), cache=cache)
    assert load_model(checkpoint).dtype == stored
    assert load_model(checkpoint, dtype=torch.float64).dtype == torch.float64


def test_several_files(folder: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model.save_pretrained(folder, max_shard_size="100KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    model = load_model(resolve(str(folder), cache=cache))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), tiny_model.get_parameter(name))
    parts[-1].unlink()
    with pytest.raises(ModelError, match=f"{parts[-1].name} is missing.*no bytes"):
        resolve(str(folder), cache=cache)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "no model 'no/such/folder'.*looked in"),
        ("missing.gguf", "no model 'missing.gguf'"),
        ("dmeo", "no model 'dmeo'.*Did you mean 'demo'"),
    ],
)
def test_no_such_model(source: str, message: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(source, cache=cache)


def test_file_of_another_kind(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"model\.zip' is a file but no GGUF file"):
        resolve(str(tmp_path / "model.zip"), cache=cache)


def test_folder_without_a_configuration(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path.name} is no .* no config.json"):
        resolve(str(tmp_path), cache=cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "no JSON object, found list"),
        (
            '{"quantization_config": {"quant_method": "awq"}}',
            "already quantized.*'awq'",
        ),
    ],
    ids=["broken", "list", "quantized"],
)
def test_unusable_configuration(
    folder: Path, cache: Path, text: str, message: str
) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        resolve(str(folder), cache=cache)


def test_truncated_weights(folder: Path, cache: Path) -> None:
    resolve(str(folder), cache=cache)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(
        ModelError, match=r"model\.safetensors is .*damaged.*5000 bytes"
    ):
        resolve(str(folder), cache=cache)


def test_pickles_are_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only in pytorch_model\.bin, a pickle.*Name that file"
    ):
        resolve(str(folder), cache=cache)


def test_no_weights(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="copy has no weights"):
        resolve(str(folder), cache=cache)


def test_weights_of_whole_numbers(folder: Path, cache: Path) -> None:
    codes = {"model.norm.weight": torch.ones(4, dtype=torch.int8)}
    save_file(codes, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no weights in floating point, only \['I8'\]"
    ):
        load_model(resolve(str(folder), cache=cache))


def test_no_tokenizer(folder: Path, cache: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="copy has no tokenizer"):
        load_tokenizer(resolve(str(folder), cache=cache))


def test_broken_tokenizer(folder: Path, cache: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the tokenizer in .*copy"):
        load_tokenizer(resolve(str(folder), cache=cache))


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: one model, and what it leaves out."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:  # noqa: N802 - named by http.server
        self._answer(send_body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        path = self.path.partition("?")[0]
        body, status = b"", 404
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        files["onnx/config.json"] = b"{}"
        if path.startswith("/api/models/owner/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            body, status = json.dumps(tree).encode(), 200
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "owner/tiny", "sha": self.commit, "siblings": siblings}
            body, status = json.dumps(about).encode(), 200
        elif path.startswith(prefix := f"/owner/tiny/resolve/{self.commit}/"):
            body = files.get(path.removeprefix(prefix), b"")
            status = 200 if body else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 200:
            self.send_header("X-Repo-Commit", self.commit)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{hash(path) % 10**9}"')
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A hub on this machine; the client is told of it and of an empty cache."""
    handler = type("Hub", (_Hub,), {"folder": tiny_checkpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("hub")
def test_model_of_the_hub(
    tiny_checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = resolve("owner/tiny", cache=cache)
    assert capfd.readouterr() == ("", "")
    assert checkpoint.revision == resolve(str(tiny_checkpoint), cache=cache).revision
    assert load_tokenizer(checkpoint)("A")["input_ids"] == [65]
    assert not (checkpoint.folder / "onnx").exists()


@pytest.mark.usefixtures("hub")
def test_model_that_the_hub_lacks(cache: Path) -> None:
    with pytest.raises(ModelError, match="'owner/huge'.*127.0.0.1.*RepositoryNotFound"):
        resolve("owner/huge", cache=cache)


def test_hub_out_of_reach(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="no folder 'owner/tiny'.*huggingface.co.*'demo'"
    ):
        resolve("owner/tiny", cache=cache)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    first = resolve("demo", cache=tmp_path)
    start = time.perf_counter()
    checkpoint = resolve("demo", cache=tmp_path)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    assert time.perf_counter() - start < 3
    assert checkpoint == first
    assert isinstance(checkpoint, Checkpoint)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    size_bytes = (checkpoint.folder / "model.safetensors").stat().st_size
    assert size_bytes == pytest.approx(2 * 134_515_008, rel=1e-3)  # the head once
    assert len(tokenizer) == 49_152
    assert (
        tokenizer("<|im_start|>x = 1\n\n 2")["input_ids"][0] == tokenizer.bos_token_id
    )
    assert "SmolLM" in tokenizer.chat_template
    text = "The capital of France is Paris. The capital of Germany is"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Berlin"
    about = json.loads((checkpoint.folder / "SOURCE.json").read_text())
    assert about["licence"] == "Apache-2.0"
