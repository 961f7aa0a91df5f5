"""Peak memory of writing an export of a random Llama of 1.1 and of 3.2 GB.

    python results/export/memory.py [CELL ...]

All layers are rounded to 4 bits, each when it is written; weight files hold 500 MB.
Each export runs in a fresh process, whose memory of its own (not files that it maps) is
read every 5 ms and compared with one weight file and one layer in float32. Each cell is
one file in ``memory/``. Linux.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from recording import Records, Row, tell  # noqa: E402

RECORDS = Records(HERE / "memory")
SHARD = 500_000_000
WIDTH, INNER, WORDS = 2048, 5632, 49_152
DEPTHS = (8, 30)
TARGETS = ("packed", "transformers", "compressed-tensors", "gguf", "per-layer")


def make_model(folder: Path, depth: int) -> None:
    """Write a random Llama file by file; it is never in memory as a whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from autoprune.compression.storage import Part
    from autoprune.exporting.weight_files import write_weight_files
    from autoprune.models.checkpoints import load_tokenizer, resolve

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    parts = {n: Part("bfloat16", tuple(t.shape)) for n, t in empty.state_dict().items()}
    rng = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, part in parts.items():
            yield name, torch.randn(part.shape, generator=rng).mul(0.02).bfloat16()

    write_weight_files(folder, parts, tensors(), metadata={"format": "pt"}, limit=SHARD)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    # GGUF files hold the tokenizer as well.
    load_tokenizer(resolve("demo")).save_pretrained(folder)


def export(source: Path, target: str, out: Path) -> Row:
    """Write the export; what the fresh process does."""
    from autoprune.compression.actions import Actions
    from autoprune.compression.method import Source
    from autoprune.compression.storage import Part, Storage
    from autoprune.compression.variant import Variant
    from autoprune.exporting.exporter import ExportJob
    from autoprune.models.checkpoints import Checkpoint, load_model
    from autoprune.models.layers import inventory, read_weight, untouched_parameters
    from autoprune.plugins import load_plugins
    from autoprune.policy import Action, Layer

    torch.set_num_threads(1)
    plugins = load_plugins()
    checkpoint = Checkpoint(str(source), source, "random")
    model = load_model(checkpoint, "AutoModelForCausalLM")
    found = inventory(model, list(plugins.objects["architectures"].values()))
    group = 32 if target == "gguf" else 64
    action = Action.parse(f"rtn(bits=4, group={group}, symmetric=true)")
    actions = Actions(plugins.methods)
    action = actions.canonical(action)
    (step,) = action.steps
    method, settings = actions.method(step), actions.settings(step)
    storages = {
        layer: actions.storage(layer, action) if layer.input else Storage.dense(layer)
        for layer in found.layers
    }

    def variant(layer: Layer) -> Variant:
        dense = Variant.dense(read_weight(model, layer))
        if layer.input is None:
            return dense
        [[made]] = method.compress([Source(layer, dense)], None, [settings])
        return made

    exporter = plugins.get("exporters", target)
    exporter.shard_bytes = SHARD
    exporter = exporter.for_model(model, found)
    exporter.shard_bytes = SHARD
    untouched = {
        n: Part(*about) for n, about in untouched_parameters(model, found).items()
    }
    job = ExportJob(checkpoint, "AutoModelForCausalLM", found, storages, variant)
    peak = Peak()
    before, began = own_bytes(), time.process_time()
    with peak:
        exporter.write(out, job)
    largest = max(layer.numel for layer in found.layers) * 4
    file = min(SHARD, exporter.size_bytes(storages, untouched))
    return {
        "target": target,
        "blocks": len(found.blocks),
        "model_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
        "written_bytes": exporter.written_bytes(out),
        "predicted_bytes": exporter.size_bytes(storages, untouched),
        "before_bytes": before,
        "peak_bytes": peak.bytes - before,
        "file_and_layer_bytes": file + largest,
        "cpu_s": round(time.process_time() - began, 1),
    }


def own_bytes() -> int:
    """Tell what memory this process has of its own."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """Reads the memory of the process while a block of code runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, own_bytes())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    """Measure the cells that are missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, out = arguments.one
        sys.stdout.write(json.dumps(export(Path(source), target, Path(out))))
        return
    for depth in DEPTHS:
        todo = {f"{target}-{depth}": target for target in TARGETS}
        todo = {n: t for n, t in todo.items() if RECORDS.lacks(n, arguments.cells)}
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "dense"
            source.mkdir()
            make_model(source, depth)
            for name, target in todo.items():
                tell(name)
                with tempfile.TemporaryDirectory(dir=place) as out:
                    RECORDS.write(name, _apart(source, target, out))
    for name, row in RECORDS.read().items():
        share = row.get("peak_bytes", 0) / row.get("file_and_layer_bytes", 1)
        sys.stdout.write(f"{name}: {row.get('error') or f'{share:.2f} of the bound'}\n")


def _apart(source: Path, target: str, out: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(source), target, out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["nothing said"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
