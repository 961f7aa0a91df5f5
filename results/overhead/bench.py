"""What a trial costs: the naive way, and stitched from variants that are made once.

    python results/overhead/bench.py

At 512 tokens of fitness, on SmolLM2-135M, one thread, CPU time. A naive trial
calibrates on 32 x 512 tokens and runs SparseGPT over all layers, plainly, layer by
layer, then evaluates. A stitched trial changes four sites of the policy before it,
within a size budget, through the search's own loop: proposal, budget, swap, evaluation,
ledger row. The KL is measured beside its formula in plain torch, on the same vectors.
Writes ``overhead.json`` beside this file.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "methods"))

from naive import prune  # noqa: E402

from autoprune.compression.store import VariantStore  # noqa: E402
from autoprune.config import RunConfig  # noqa: E402
from autoprune.models.checkpoints import load_model  # noqa: E402
from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.searching.ends import Ends  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402
from autoprune.searching.plan import Plan  # noqa: E402
from autoprune.searching.strategies import SamplerFactory  # noqa: E402
from autoprune.searching.study import run_study  # noqa: E402

CONFIG: dict[str, Any] = {
    "model": "demo",
    "text": {"window": 512, "statistics": 32, "fitness": 1, "choice": 1, "report": 4},
    "space": [
        {"sites": "blocks.*", "actions": ["sparsegpt(sparsity=[0.3, 0.5, 0.7])"]}
    ],
    "bank": "dense",
    "objective": {"metric": "kl", "budgets": {"size_bytes": "75%"}},
    "search": {"trials": 60},
}


class FourSites(optuna.samplers.BaseSampler):
    """Exchanges the actions of two pairs of sites of one size: bytes stay the same."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """Leave all sites to ``sample_relative``."""
        return {}

    def sample_relative(
        self, study: Any, trial: Any, search_space: Any
    ) -> dict[str, Any]:
        """Change the policy of the trial before this one."""
        before = study.get_trials(deepcopy=False)[-2].params if trial.number else {}
        params = dict(before)
        for role in ("qkv", "down"):
            names = sorted(name for name in params if name.endswith(role))
            one = names[self._rng.integers(len(names))] if names else None
            others = [n for n in names if one and params[n] != params[one]]
            if one and others:
                other = others[self._rng.integers(len(others))]
                params[one], params[other] = params[other], params[one]
        return params

    def sample_independent(
        self, study: Any, trial: Any, param_name: str, param_distribution: Any
    ) -> Any:
        """Draw what no trial has set yet."""
        choices = param_distribution.choices
        return choices[self._rng.integers(len(choices))]


def naive_trial(plan: Plan) -> dict[str, float]:
    """Prune a loaded model, evaluate it plainly; CPU seconds of each."""
    bench = plan.bench
    model = load_model(bench.checkpoint, bench.task.auto_class)
    start = time.process_time()
    ids = bench.splits["statistics"].ids
    prune(model, bench.inventory, ids, [{"sparsity": 0.5}], propagate=True)
    pruned = time.process_time()
    with torch.inference_mode():
        batch = bench.task.batch(bench.splits["fitness"].ids, bench.tokenizer)
        bench.stitched.restore()
        teacher = bench.stitched.model(**batch.inputs).logits.float().log_softmax(-1)
        student = model(**batch.inputs).logits.float().log_softmax(-1)
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    evaluated = time.process_time()
    return {
        "compress_cpu_s": pruned - start,
        "evaluate_cpu_s": evaluated - pruned,
        "trial_cpu_s": evaluated - start,
        "kl": float(kl),
    }


def divergence(plan: Plan) -> dict[str, float]:
    """Compare the KL with its formula in plain torch; median CPU seconds of five."""
    bench = plan.bench
    policy = plan.proposals[0][1]
    plan.bank.put(bench.per_layer(policy))
    teacher, model = bench.teacher("fitness"), bench.stitched.model
    batch = bench.task.batch(bench.splits["fitness"].ids, bench.tokenizer)
    seconds: dict[str, list[float]] = {"forward": [], "ours": [], "plain": []}
    with torch.inference_mode():
        bench.stitched.restore()
        dense = bench.task.features(model, batch)
        plan.bank.put(bench.per_layer(policy))
        for _ in range(5):
            start = time.process_time()
            features = bench.task.features(model, batch)
            ran = time.process_time()
            ours = teacher.measure(model).mean_kl
            both = time.process_time()
            log_p = (
                (dense @ teacher.head.weight.to(dense.dtype).T).float().log_softmax(-1)
            )
            log_q = (features @ teacher.head.weight.to(dense.dtype).T).float()
            log_q = log_q.log_softmax(-1)
            plain = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            seconds["plain"].append(time.process_time() - both)
            seconds["forward"].append(ran - start)
            seconds["ours"].append(both - ran - (ran - start))
    return {
        **{
            f"{name}_cpu_s": statistics.median(found) for name, found in seconds.items()
        },
        "kl_ours": ours,
        "kl_plain_bf16_logits": plain,
    }


def stitched_trials(plan: Plan, name: str, factory: SamplerFactory) -> dict[str, Any]:
    """Run trials through the search's own loop; CPU seconds of each and its parts."""
    teacher = plan.bench.teacher("fitness")
    measure, inside, ends, changed = teacher.measure, [], [], []

    def timed(model: Any, windows: Any = None) -> Any:
        start = time.process_time()
        quality = measure(model, windows)
        inside.append(time.process_time() - start)
        return quality

    last: list[dict[str, str]] = []

    def on_trial(trial: Any) -> None:
        ends.append(time.process_time())
        params = dict(trial.params)
        if last:
            changed.append(sum(params[site] != last[-1][site] for site in params))
        last.append(params)

    teacher.measure = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), plan.fingerprint) as ledger:
            run_study(
                plan.problem,
                plan.evaluator(),
                ledger=ledger,
                sampler=factory,
                objective=plan.objective,
                seed=0,
                ends=Ends(plan.config.search.trials),
                on_trial=on_trial,
            )
    teacher.measure = measure  # type: ignore[method-assign]
    # The first trials put whole policies on the model and warm caches: left out.
    spans = [b - a for a, b in zip(ends[9:], ends[10:], strict=False)]
    parts = [s - i for s, i in zip(spans, inside[10:], strict=True)]
    return {
        "sampler": name,
        "trials": len(spans),
        "sites_changed": statistics.median(changed[9:]),
        "trial_cpu_s": statistics.median(spans),
        "forward_and_kl_cpu_s": statistics.median(inside[10:]),
        "rest_cpu_s": statistics.median(parts),
        "rest_over_forward_and_kl": statistics.median(parts)
        / statistics.median(inside[10:]),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    plan = Plan.make(RunConfig.from_dict(CONFIG), load_plugins())
    with tempfile.TemporaryDirectory() as store:
        plan.bank.store = VariantStore(Path(store), 10**11)  # empty: all is made now
        found = measure_all(plan)
    out.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def measure_all(plan: Plan) -> dict[str, Any]:
    """Make the bank, then measure trials, the KL and the naive trial."""
    start = time.process_time()
    made = plan.bank.make(plan.pairs)
    bank = {"variants": made, "cpu_s": time.process_time() - start}
    four = SamplerFactory("four-sites", lambda brief: FourSites(brief.seed))
    rows = [stitched_trials(plan, "four sites", four)]
    for name in ("random", "nsga2", "tpe"):
        factory = plan.plugins.get("samplers", name)
        rows.append(stitched_trials(plan, name, factory))
    kl = divergence(plan)
    naive = naive_trial(plan)
    return {
        "command": "python results/overhead/bench.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, CPU time",
        "torch": torch.__version__,
        "bank": bank,
        "kl": kl,
        "naive": naive,
        "stitched": rows,
        "naive_over_stitched": naive["trial_cpu_s"] / rows[0]["trial_cpu_s"],
    }


if __name__ == "__main__":
    main()
