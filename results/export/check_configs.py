"""Read exports with every compressed-tensors that a runtime pins.

    python results/export/check_configs.py FOLDER ...

Each folder is an export in compressed-tensors. Every version is installed beside this
environment's other packages, into a folder that is removed afterwards. It validates
config.json, and decompresses one layer of each config group, whose digest is compared
with that of the newest version. The results go to configs.json beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = {
    "0.17.0": "vLLM 0.33.0",
    "0.18.0": "SGLang 0.5.23",
    "0.19.0": "llm-compressor 0.14.0.1",
    "0.20.1": "AutoPrune",
}
"""Versions, and who pins them."""

RECORD = Path(__file__).with_name("configs.json")

PROBE = """
import hashlib, json, sys
from pathlib import Path
import torch
from safetensors import safe_open
import compressed_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig


def tensors(folder, name):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                if key.rpartition(".")[0] == name:
                    found[key.rpartition(".")[2]] = opened.get_tensor(key)
    return found


def digest(folder, scheme, fmt):
    stored = next(t for t in (tensors(folder, n) for n in scheme.targets) if t)
    compressor = BaseCompressor.get_value_from_registry(scheme.format or fmt)
    weight = compressor.decompress(stored, scheme)["weight"]
    return hashlib.sha256(weight.float().numpy().tobytes()).hexdigest()[:16]


answers = {}
for folder in sys.argv[1:]:
    data = json.loads((Path(folder) / "config.json").read_text())
    answer = {"valid": False, "weights": {}}
    try:
        config = QuantizationConfig.model_validate(data["quantization_config"])
        answer["valid"] = True
        for name, scheme in config.config_groups.items():
            answer["weights"][name] = digest(folder, scheme, config.format)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer["error"] = f"{type(error).__name__}: {lines[0]}"
    answers[folder] = answer
print(json.dumps([compressed_tensors.__version__, answers]))
"""


def read_with(version: str, folders: list[Path], place: Path) -> dict[str, dict]:
    """Install a version into a folder, and let it read the exports."""
    package = f"compressed-tensors=={version}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    quiet = {"capture_output": True, "text": True}
    subprocess.run([*pip, "--target", str(place), package], check=True, **quiet)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(place), "CUDA_VISIBLE_DEVICES": ""},
        **quiet,
    )
    if done.returncode:
        raise SystemExit(f"{package} cannot be imported:\n{done.stderr}")
    found, answers = json.loads(done.stdout.splitlines()[-1])
    assert found == version, f"asked for {version}, imported {found}"
    return answers


def verdict(answer: dict, newest: dict) -> str:
    """Say in a word or two what a version makes of an export."""
    if not answer["valid"]:
        return "refused"
    if answer.get("error"):
        return "unreadable"
    return "ok" if answer["weights"] == newest["weights"] else "other weights"


def main() -> None:
    """Read all exports with all versions, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    found = {}
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as place:
            found[version] = read_with(version, folders, Path(place))
    newest = found[list(VERSIONS)[-1]]
    width = max(len(folder.name) for folder in folders)
    print("export".ljust(width), *(version.ljust(14) for version in VERSIONS))
    table = {}
    for folder in folders:
        row = {
            version: verdict(found[version][str(folder)], newest[str(folder)])
            for version in VERSIONS
        }
        print(folder.name.ljust(width), *(word.ljust(14) for word in row.values()))
        errors = {v: found[v][str(folder)].get("error") for v in VERSIONS}
        table[folder.name] = {
            "versions": row,
            "errors": {version: error for version, error in errors.items() if error},
            "groups": len(newest[str(folder)]["weights"]),
        }
    record = {"pinned_by": VERSIONS, "exports": table}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
