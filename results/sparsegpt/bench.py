"""SparseGPT on all layers of SmolLM2-135M, beside Wanda, magnitude and a plain version.

    python results/sparsegpt/bench.py [CELL ...]

32 x 512 calibration tokens, one thread, CPU time. Each cell is one result file in
``cells/``; a cell that is there is not measured again, so the run resumes. Cells
``ours``, ``plain``, ``wanda`` and ``magnitude`` prune block by block, each block on the
inputs that the pruned blocks before it leave. Cells ``nine`` make nine levels of every
layer on dense inputs: a bank. Writes ``table.csv`` and ``sparsegpt.png`` at the end.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "methods"))

from naive import Level, prune  # noqa: E402

from autoprune.compression.bank import VariantBank  # noqa: E402
from autoprune.compression.store import VariantStore  # noqa: E402
from autoprune.config import TextConfig  # noqa: E402
from autoprune.evaluation.workbench import Workbench  # noqa: E402
from autoprune.models.checkpoints import load_model  # noqa: E402
from autoprune.models.layers import write_weight  # noqa: E402
from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.policy import DENSE, Action, Policy  # noqa: E402

LEVELS: dict[str, tuple[str, Level]] = {
    "50": ("sparsity=0.5", {"sparsity": 0.5}),
    "70": ("sparsity=0.7", {"sparsity": 0.7}),
    "2-4": ("pattern=2:4", {"keep": 2, "of": 4}),
}
NINE = [0.40, 0.465, 0.53, 0.595, 0.66, 0.725, 0.79, 0.855, 0.92]
SHARED = HERE.parents[2] / "shared" / "data" / "wikitext-2" / "valid.articles.jsonl"


class Cells:
    """The model, and what each cell does with it.

    Args:
        text: Source of calibration and evaluation tokens.
    """

    def __init__(self, text: str) -> None:
        config = TextConfig(
            source=text, window=512, statistics=32, fitness=1, choice=1, report=24
        )
        self.bench = Workbench.open(
            load_plugins(),
            model="demo",
            task="causal-lm",
            text=config,
            target="packed",
            seed=0,
        )
        self.teacher = self.bench.teacher("report")
        self.ids = self.bench.splits["statistics"].ids

    def score(self, model: Any = None) -> dict[str, float]:
        """Measure a model; the bench's own, as it stands, if none is given."""
        quality = self.teacher.measure(model or self.bench.stitched.model)
        return {"perplexity": quality.perplexity, "kl": quality.mean_kl}

    def method(self, action: str) -> dict[str, float]:
        """Prune with AutoPrune, on propagated inputs."""
        policy = self._uniform(action)
        with tempfile.TemporaryDirectory() as folder, self._solving() as solving:
            bank = self._bank(Path(folder), policy)
            start = time.process_time()
            bank.put(self.bench.per_layer(policy))
            seconds = time.process_time() - start
            return {"cpu_s": seconds, "solver_cpu_s": sum(solving), **self.score()}

    def plain(self, level: Level) -> dict[str, float]:
        """Prune plainly, on propagated inputs."""
        bench, model = self.bench, self._fresh()
        start = time.process_time()
        solver = prune(model, bench.inventory, self.ids, [level], propagate=True)
        seconds = time.process_time() - start
        return {"cpu_s": seconds, "solver_cpu_s": solver, **self.score(model)}

    def nine_ours(self) -> dict[str, float]:
        """Make nine levels at once; score the bank's 0.53 level."""
        actions = [Action.parse(f"sparsegpt(sparsity={level})") for level in NINE]
        blocks = [la for la in self.bench.layers if la.block is not None]
        with tempfile.TemporaryDirectory() as folder, self._solving() as solving:
            bank = self._bank(Path(folder), None)
            start = time.process_time()
            bank.make([(layer, action) for layer in blocks for action in actions])
            seconds = time.process_time() - start
            policy = self._uniform(f"sparsegpt(sparsity={NINE[2]})")
            bank.put(self.bench.per_layer(policy))
            return {"cpu_s": seconds, "solver_cpu_s": sum(solving), **self.score()}

    def nine_plain(self) -> dict[str, float]:
        """Make nine levels one by one; score the 0.53 level."""
        bench, model, third = self.bench, self._fresh(), {}
        levels: list[Level] = [{"sparsity": level} for level in NINE]

        def keep(layer: Any, number: int, weight: torch.Tensor) -> None:
            if number == 2:
                third[layer] = weight.bfloat16()

        start = time.process_time()
        solver = prune(
            model,
            bench.inventory,
            self.ids,
            levels,
            propagate=False,
            on_weight=keep,
        )
        seconds = time.process_time() - start
        for layer, weight in third.items():
            write_weight(model, layer, weight)
        return {"cpu_s": seconds, "solver_cpu_s": solver, **self.score(model)}

    def dense(self) -> dict[str, float]:
        """Score the dense model."""
        self.bench.stitched.restore()
        return {"cpu_s": 0.0, **self.score()}

    def _uniform(self, text: str) -> Policy:
        action = self.bench.actions.canonical(Action.parse(text))
        return Policy(
            {
                site.name: action if site.name.startswith("blocks.") else DENSE
                for site in self.bench.inventory.sites
            }
        )

    def _bank(self, folder: Path, reference: Policy | None) -> VariantBank:
        """Open a bank in an empty store, so that everything is made now."""
        bank = self.bench.bank(reference)
        bank.store = VariantStore(folder, 10**11)
        self.bench.stitched.restore()
        return bank

    @contextmanager
    def _solving(self) -> Iterator[list[float]]:
        """Note the CPU seconds of each call of a method, for a while."""
        seconds: list[float] = []

        def timed(compress: Any) -> Any:
            def call(*args: Any) -> Any:
                start = time.process_time()
                made = compress(*args)
                seconds.append(time.process_time() - start)
                return made

            return call

        methods = list(self.bench.actions.methods.values())
        for method in methods:
            vars(method)["compress"] = timed(method.compress)
        try:
            yield seconds
        finally:
            for method in methods:
                del vars(method)["compress"]

    def _fresh(self) -> Any:
        """Load a dense model of one's own, in the type that all cells compute in."""
        model = load_model(self.bench.checkpoint, self.bench.task.auto_class)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.bench.compute_dtype)
        return model


def cells(run: Cells) -> dict[str, Callable[[], dict[str, float]]]:
    """Name every cell."""
    found: dict[str, Callable[[], dict[str, float]]] = {"dense": run.dense}
    for name, (params, level) in LEVELS.items():
        found[f"plain-{name}"] = lambda level=level: run.plain(level)
        for method in ("sparsegpt", "wanda", "magnitude"):
            action = f"{method}({params})"
            found[f"{method}-{name}"] = lambda action=action: run.method(action)
    # The same again with a hundredth more damping: how far chance alone moves a figure.
    again: Level = {"sparsity": 0.7, "damping": 0.0101}
    found["plain-70-again"] = lambda: run.plain(again)
    text = "sparsegpt(sparsity=0.7, damping=0.0101)"
    found["sparsegpt-70-again"] = lambda: run.method(text)
    found["nine-sparsegpt"] = run.nine_ours
    found["nine-plain"] = run.nine_plain
    return found


def main() -> None:
    """Measure the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these")
    parser.add_argument("--text", help="text source; WikiText-2 where it is at hand")
    arguments = parser.parse_args()
    text = arguments.text or (f"file:{SHARED}" if SHARED.exists() else "builtin")
    torch.set_num_threads(1)
    folder = HERE / "cells"
    folder.mkdir(exist_ok=True)
    run = Cells(text)
    for name, measure in cells(run).items():
        path = folder / f"{name}.json"
        if path.exists() or (arguments.cells and name not in arguments.cells):
            continue
        row = {"cell": name, **measure(), "text": Path(text).name}
        row |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        path.write_text(json.dumps(row, indent=2) + "\n")
        sys.stderr.write(f"{row}\n")
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "table.csv", index=False, float_format="%.5g")
    sys.stdout.write(table.to_string(index=False) + "\n" + ratios(table) + "\n")
    plot(table)


def ratios(table: pd.DataFrame) -> str:
    """Tell how many times faster than plain AutoPrune is."""
    cells = table.set_index("cell")
    pairs = [(f"plain-{name}", f"sparsegpt-{name}") for name in LEVELS]
    pairs.append(("nine-plain", "nine-sparsegpt"))
    lines = []
    for plain, ours in pairs:
        if plain in cells.index and ours in cells.index:
            total, solver = (
                cells[column][plain] / cells[column][ours]
                for column in ("cpu_s", "solver_cpu_s")
            )
            lines.append(f"{plain} / {ours}: {total:.2f}x CPU, solver {solver:.2f}x")
    return "\n".join(lines)


def plot(table: pd.DataFrame) -> None:
    """Draw perplexity by method and level, log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    perplexity = table.set_index("cell")["perplexity"]
    for offset, method in enumerate(("magnitude", "wanda", "plain", "sparsegpt")):
        found = [
            (i, perplexity.get(f"{method}-{name}")) for i, name in enumerate(LEVELS)
        ]
        bars = [(i + 0.2 * offset, value) for i, value in found if value is not None]
        axes.bar(*zip(*bars, strict=True), width=0.18, label=method)
    axes.axhline(perplexity["dense"], color="black", linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.set_xticks([0.3, 1.3, 2.3], ["50 %", "70 %", "2:4"])
    axes.set_ylabel("perplexity, report split")
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / "sparsegpt.png", dpi=120)


if __name__ == "__main__":
    main()
