"""Records how fast this machine does what runs are made of, for ``autoprune plan``.

    python results/scale/rates.py [--out results/scale/rates]

One thread; CPU seconds, as the machine may be busy; about three CPU minutes. Blocks are
random Llama blocks of the widths of SmolLM2-135M and Llama-3.2-1B, methods are measured
on square layers, each with one setting and with three. Writes one JSON file, named
after the processor: rates with date, versions and the command. What the file has
already is not measured again; delete it to begin anew.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "results" / "memory")]

import torch  # noqa: E402
from method_rates import (  # noqa: E402
    LARGE,
    LENGTH,
    SMALL,
    cpu,
    derived,
    llama,
    methods,
    square,
    tokens,
)
from peak import PeakMemory, status  # noqa: E402

from autoprune.compression.actions import Actions  # noqa: E402
from autoprune.compression.examples import example_layer  # noqa: E402
from autoprune.compression.method import Source  # noqa: E402
from autoprune.compression.store import VariantStore  # noqa: E402
from autoprune.compression.variant import Variant  # noqa: E402
from autoprune.config import TextConfig  # noqa: E402
from autoprune.evaluation.precision import fast_bfloat16  # noqa: E402
from autoprune.evaluation.slopes import measure_slopes  # noqa: E402
from autoprune.evaluation.teacher import Teacher  # noqa: E402
from autoprune.latency.opening import processor_name  # noqa: E402
from autoprune.models.checkpoints import load_tokenizer, resolve  # noqa: E402
from autoprune.models.layers import Inventory, inventory  # noqa: E402
from autoprune.models.statistics import Gathering  # noqa: E402
from autoprune.models.text import load_splits  # noqa: E402
from autoprune.plugins import Plugins, load_plugins  # noqa: E402
from autoprune.policy import Action  # noqa: E402

HESSIANS = (576, 1536, 4096)


def flop(found: Inventory, count: int) -> float:
    """Count the operations of a forward pass over blocks, attention included."""
    layers = [layer for layer in found.layers if layer.block is not None]
    width = layers[0].shape[1]
    attention = 4 * LENGTH * width * len(found.blocks)
    return float(count * (2 * sum(layer.numel for layer in layers) + attention))


def products(plugins: Plugins) -> list[dict[str, Any]]:
    """Measure forward passes over blocks, by width and type."""
    task, rows = plugins.get("tasks", "causal-lm"), []
    kinds = [torch.float32, *([torch.bfloat16] if fast_bfloat16() else [])]
    for shape, blocks in ((SMALL, 3), (LARGE, 1)):
        model = llama(shape, blocks, 256)
        found = inventory(model, list(plugins.objects["architectures"].values()))
        for dtype in kinds:
            model.to(dtype)
            batch = task.batch(tokens(2, 256).ids, None)
            with torch.inference_mode():
                spent = cpu(partial(task.features, model, batch), times=3)
            row = {"width": shape["hidden_size"], "type": str(dtype)[6:]}
            rows.append({**row, "flop_s": flop(found, 2 * LENGTH) / spent})
    return rows


def evaluation(plugins: Plugins) -> dict[str, float]:
    """Measure what a head, a teacher and gradients take beside a forward pass."""
    vocabulary, task = 49152, plugins.get("tasks", "causal-lm")
    model = llama(SMALL, 4, vocabulary)
    model.to(torch.bfloat16 if fast_bfloat16() else torch.float32)
    found = inventory(model, list(plugins.objects["architectures"].values()))
    layers = [layer for layer in found.layers if layer.block is not None]
    windows = tokens(2, vocabulary)
    positions, weights = 2 * (LENGTH - 1), sum(layer.numel for layer in layers)
    held: list[Teacher] = []

    def teach() -> None:
        held[:] = [Teacher(task, model, windows, tokenizer=None)]

    made = cpu(teach)
    (teacher,) = held
    batch = task.batch(windows.ids, None)
    with torch.inference_mode():
        forward = cpu(lambda: task.features(model, batch), times=3)
    measured = cpu(lambda: teacher.measure(model), times=2)
    head_flop = 2.0 * positions * vocabulary * SMALL["hidden_size"]
    drawn = torch.Generator().manual_seed(1)
    now = {layer: model.get_submodule(layer.name).weight for layer in layers}
    other = {
        layer: [(w + 0.01 * torch.randn(w.shape, generator=drawn)).to(w) for _ in "abc"]
        for layer, w in now.items()
    }

    def slopes(count: int, draws: int, **about: Any) -> float:
        variants = {layer: given[:count] for layer, given in other.items()}
        taken = partial(measure_slopes, model, teacher, variants, [0, 1], draws=draws)
        return cpu(partial(taken, **about), times=2)

    one, three = slopes(1, 0), slopes(3, 0)
    one_drawn, three_drawn = slopes(1, 2), slopes(3, 2)
    apart = slopes(3, 2, apart=True)
    with PeakMemory() as peak:  # its thread takes time as well
        slopes(1, 1)
    pricing = max(0.0, (three - one) / 2)
    scoring = max(0.0, (three_drawn - one_drawn - (three - one)) / 4)
    channels = sum(sum(layer.shape) for layer in layers)
    return {
        "head_flop_s": head_flop / max(measured - forward, 1e-3),
        "teacher_factor": (made - forward) / max(measured - forward, 1e-3),
        "pull_factor": (one - pricing) / measured,
        "push_factor": ((one_drawn - one) / 2 - scoring) / measured,
        "pricing_s": (pricing + scoring) / 2 / (2 * weights),
        "apart_s": max(0.0, apart - three_drawn) / (2 * 2 * LENGTH * weights * 3),
        "activation_bytes": peak.anon_bytes / (2 * LENGTH * channels),
    }


def hessians() -> list[dict[str, float]]:
    """Measure the sums of squares of inputs, by width."""
    rows = []
    for width in HESSIANS:
        inputs = torch.randn(1024, width).bfloat16()
        gathering = Gathering({"hessian"}, width)
        spent = cpu(partial(gathering.add, inputs), times=2)
        rows.append({"width": width, "flop_s": 2.0 * 1024 * width**2 * 5 / 8 / spent})
    return rows


def storing(plugins: Plugins) -> dict[str, float]:
    """Measure how variants are packed, written, read and unpacked, a weight."""
    layer = square(example_layer(plugins.objects["methods"]["rtn"]), 1024)
    weight = torch.randn(1024, 1024).bfloat16()
    actions = Actions(plugins.objects["methods"])
    step = Action.parse("rtn(bits=4, group=64)").steps[0]
    ((variant,),) = actions.method(step).compress(
        [Source(layer, Variant.dense(weight), weight)],
        Gathering((), 1024).result(),
        [actions.settings(step)],
    )
    with tempfile.TemporaryDirectory() as folder:
        store = VariantStore(Path(folder), 10**10)
        write = cpu(lambda: store.put("a" * 16, variant), times=3)
        read = cpu(lambda: store.get("a" * 16).weight, times=3)  # type: ignore[union-attr]
    return {"put_s": write / weight.numel(), "get_s": read / weight.numel()}


def disk(megabytes: int = 128) -> dict[str, float]:
    """Measure the disk of the results, past the page cache: wall time."""
    data = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=ROOT / "results") as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        file.seek(0)
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - start
    return {"write_mb_s": megabytes / wrote, "read_mb_s": megabytes / read}


def starting() -> dict[str, float]:
    """Measure the start of a process, and what it takes without a model."""
    code = (
        "import time; import autoprune.run; from autoprune.plugins import load_plugins;"
        "load_plugins(); from transformers import LlamaForCausalLM;"
        "import re; t = open('/proc/self/status').read();"
        "print(time.process_time(), re.search(r'RssAnon:\\s+(\\d+)', t)[1])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = done.stdout.split()
    return {"start_s": float(seconds), "base_bytes": 1024 * int(kilobytes)}


def text() -> dict[str, float]:
    """Measure how long the built-in text takes to be dealt and tokenized."""
    tokenizer = load_tokenizer(resolve("demo"))
    sources, wanted = load_plugins().objects["text_sources"], TextConfig()

    def deal() -> None:
        load_splits(
            "builtin",
            sources,
            tokenizer,
            length=wanted.window,
            windows=wanted.windows,
            seed=0,
        )

    return {"text_s": cpu(deal)}


def main() -> None:
    """Measure what is missing, part by part, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results/scale/rates")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plugins = load_plugins()
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", processor_name().lower()).strip("-")
    path = arguments.out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    parts: dict[str, Callable[[], Any]] = {
        "start_s": starting,
        "text_s": text,
        "write_mb_s": disk,
        "head_flop_s": partial(evaluation, plugins),
        "put_s": partial(storing, plugins),
        "products": lambda: {"products": products(plugins)},
        "hessians": lambda: {"hessians": hessians()},
        "derived": lambda: {"derived": derived(plugins)},
        "methods": lambda: {"methods": methods(plugins)},
    }
    for first, measure in parts.items():
        if first in found:
            continue
        start = time.process_time()
        found |= about() | measure()
        found["cpu_s"] = found.get("cpu_s", 0.0) + time.process_time() - start
        path.write_text(json.dumps(found, indent=1) + "\n")
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {first}\n")
    sys.stderr.write(f"{path}: {status()['VmHWM'] / 1e9:.2f} GB at most\n")


def about() -> dict[str, Any]:
    """Tell what is measured, and with what."""
    return {
        "device": processor_name(),
        "kind": "cpu",
        "threads": 1,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "bfloat16": fast_bfloat16(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: version(n) for n in ("autoprune", "torch", "transformers")},
        "python": platform.python_version(),
        "command": "python results/scale/rates.py",
    }


if __name__ == "__main__":
    main()
