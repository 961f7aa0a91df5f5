"""Measures one cell: a policy made block by block on its own inputs, then judged."""

import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from settings import ALL, SPARE_BLOCKS, Setting
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from peak import PeakMemory  # noqa: E402

from autoprune.compression.store import VariantStore  # noqa: E402
from autoprune.config import TextConfig  # noqa: E402
from autoprune.evaluation.workbench import Workbench  # noqa: E402
from autoprune.models.blocks import BlockRunner  # noqa: E402
from autoprune.plugins import Plugins  # noqa: E402
from autoprune.policy import DENSE, Action, Policy  # noqa: E402

ARTICLES = Path(__file__).parents[3] / "shared/data/wikitext-2/valid.articles.jsonl"
"""WikiText-2 where it is at hand; else the text that CPython ships."""

DENSE_CELL = Setting("dense", {ALL: "dense"})
METRICS = ("perplexity", "kl", "size_bytes", "bits_per_weight", "sparsity")


def open_bench(plugins: Plugins) -> Workbench:
    """Load SmolLM2-135M with the tokens that all cells share, and its own answers."""
    text = TextConfig(
        source=f"file:{ARTICLES}" if ARTICLES.exists() else "builtin",
        window=256,
        statistics=32,
        fitness=1,
        choice=1,
        report=24,
    )
    bench = Workbench.open(
        plugins, model="demo", task="causal-lm", text=text, target="packed", seed=0
    )
    bench.teacher("report")
    return bench


def measure(bench: Workbench, setting: Setting) -> dict[str, Any]:
    """Make a cell's variants from nothing, and measure the model with them.

    Returns:
        ``make_cpu_s``: CPU seconds of the pass that makes the variants, with the inputs
        that it takes and passes on. ``peak_bytes``: the most memory of its own that the
        process takes for them above the loaded model and the answers it is judged by;
        variants go to the disk, replaced weights count. ``block_bytes``: of the parts
        of all layers in blocks; ``size_bytes``: of the whole weight file.
    """
    policy = _policy(bench, setting)
    storages = bench.storages(policy)  # refusals speak now
    bank = bench.bank(policy)
    with tempfile.TemporaryDirectory() as folder:
        bank.store = VariantStore(Path(folder), 10**11)
        with PeakMemory() as peak:
            began = time.process_time()
            bank.make(bench.per_layer(policy).items())
            spent = time.process_time() - began
        found = bench.measure(policy, bank, "report", metrics=METRICS)
    assert found.quality is not None
    blocks = [one.nbytes for la, one in storages.items() if la.block is not None]
    return {
        "actions": sorted({str(action) for action in policy.values()}),
        **{name: found.metrics[name] for name in METRICS},
        "kl_error": found.quality.kl_error(),
        "block_bytes": sum(blocks),
        "make_cpu_s": round(spent, 2),
        "peak_bytes": peak.anon_bytes,
    }


def _policy(bench: Workbench, setting: Setting) -> Policy:
    """Give every site the action of the last rule that matches it."""
    if setting.drop:
        return _without(bench, _chosen(bench, setting.drop))
    inventory, actions = bench.inventory, bench.actions
    groups = inventory.groups_named(setting.rules.keys())
    chosen = {}
    for site in inventory.sites_for(groups):
        found = [a for glob, a in setting.rules.items() if fnmatchcase(site.name, glob)]
        action = Action.parse(found[-1]) if found else DENSE
        chosen[site.name] = actions.canonical(action)
    return Policy(chosen)


def _without(bench: Workbench, blocks: set[int]) -> Policy:
    """Give the policy that leaves out whole blocks."""
    names = {
        group.name
        for group in bench.inventory.groups
        if group.kind == "block" and group.layers[0].block in blocks
    }
    sites = bench.inventory.sites_for(names)
    drop = Action.parse("drop")
    return Policy({site.name: drop if site.name in names else DENSE for site in sites})


def _chosen(bench: Workbench, how: str) -> set[int]:
    """Choose the blocks to leave out: the most similar, or some at equal distances.

    ``similar``: those that change the direction of hidden states least, by the mean
    cosine of what enters and what leaves them (Men et al. 2024, arXiv:2403.03853,
    Eq. 1). ``spaced`` is the control that looks at nothing.
    """
    count = len(bench.inventory.blocks)
    if how == "spaced":
        return {(2 * k + 1) * count // (2 * SPARE_BLOCKS) for k in range(SPARE_BLOCKS)}
    ids = bench.splits["statistics"].ids
    runner = BlockRunner(bench.stitched.model, bench.inventory, ids)
    hidden, similarity = runner.start(), []
    for block in range(count):
        after = runner.run(block, hidden)
        pairs = zip(hidden, after, strict=True)
        cosines = [cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairs]
        similarity.append(torch.cat(cosines).mean())
        hidden = after
    return set(torch.stack(similarity).topk(SPARE_BLOCKS).indices.tolist())
