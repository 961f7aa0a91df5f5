"""Several processes make the variants of one bank; threads with models of their own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_banks import Bench
from tiny_models import tiny

from autoprune.compression import shares
from autoprune.compression.shares import Share, awaited
from autoprune.errors import StoreError
from autoprune.policy import Action

EARLY, NORM, CURVE = map(
    Action.parse, ("early(keep=8)", "norm(keep=8)", "curve(keep=8)")
)
ACTIONS = (EARLY, NORM, CURVE)


def make(bench: Bench, share: Share, *, dense: bool) -> int:
    reference = {} if dense else dict.fromkeys(bench.layers, CURVE)
    pairs = [(layer, action) for layer in bench.layers for action in ACTIONS]
    with torch.inference_mode():
        return bench.bank(reference).make(pairs, share=share)


def bench_of(folder: Path) -> Bench:
    return Bench(tiny("llama", num_hidden_layers=5), folder)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "propagated"])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_together_what_one_makes(tmp_path, dense, count, monkeypatch):
    monkeypatch.setattr(shares, "PATIENCE_S", 60.0)  # else one that fails keeps others
    alone = bench_of(tmp_path / "alone")
    whole = make(alone, Share(), dense=dense)
    benches = [bench_of(tmp_path / "together") for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        running = [
            pool.submit(make, bench, Share(index, count), dense=dense)
            for index, bench in enumerate(benches)
        ]
        made = [one.result() for one in running]
    assert sum(made) == whole  # each once in all
    assert min(made) > 0
    bank = benches[0].bank({} if dense else dict.fromkeys(benches[0].layers, CURVE))
    own = alone.bank({} if dense else dict.fromkeys(alone.layers, CURVE))
    pairs = [(layer, action) for layer in alone.layers for action in ACTIONS]
    assert bank.missing(pairs) == []
    for pair in pairs:
        assert bank.key(*pair) == own.key(*pair)
        assert torch.equal(bank.get(*pair).weight, own.get(*pair).weight)


def test_share_that_comes_again_makes_only_what_is_lacking(tmp_path):
    bench = bench_of(tmp_path)
    make(bench, Share(), dense=False)
    lost = bench.layers[0]
    bank = bench.bank(dict.fromkeys(bench.layers, CURVE))
    (
        tmp_path / bank.key(lost, NORM)[:2] / f"{bank.key(lost, NORM)}.safetensors"
    ).unlink()
    assert make(bench_of(tmp_path), Share(1, 2), dense=False) == 0
    assert make(bench_of(tmp_path), Share(0, 2), dense=False) == 1


def test_what_never_comes_is_an_error(monkeypatch):
    monkeypatch.setattr(shares, "PATIENCE_S", 0.05)
    with pytest.raises(StoreError, match="the variant of q is made by another proc"):
        awaited(lambda: None, "the variant of q")


def test_what_comes_late_is_waited_for():
    answers = iter([None, None, 7])
    assert awaited(lambda: next(answers), "it") == 7
