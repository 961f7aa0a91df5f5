"""Accuracy as it is, and in INT8 with rounded activations."""

import pytest
import torch
from autoprune_plugins.conv_accuracy import (
    Accuracy,
    Int8Accuracy,
    in_int8,
    int8_product,
    rounded,
)
from autoprune_plugins.conv_images import ImageClassification
from autoprune_plugins.conv_layers import RESNET, Convolution
from autoprune_plugins.int8_dynamic import Int8Dynamic
from autoprune_plugins.packed import Packed
from tiny_convnets import pixels, reader, tiny_resnet, windows

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.evaluation.metric import Evidence, Scene, metrics_of
from autoprune.models.kinds import learn
from autoprune.models.layers import inventory, read_weight, write_weight
from autoprune.models.statistics import NO_STATISTICS

TASK = ImageClassification()
SCENE = Scene((), {}, Packed(), 0)


def test_accuracy_counts_right_answers() -> None:
    model, ids = tiny_resnet(), windows(6)
    batch = TASK.batch(ids, reader())
    chosen = model(**batch.inputs).logits.argmax(-1)
    ids[:, 0] = chosen
    ids[:2, 0] = (chosen[:2] + 1) % 10
    evidence = Evidence(SCENE, {}, model=model, tokenizer=reader(), ids=ids, task=TASK)
    assert Accuracy().measure(evidence) == pytest.approx(4 / 6)
    model.classifier[1].weight.fill_(float("nan"))
    assert Accuracy().measure(evidence) != Accuracy().measure(evidence)


def test_a_metric_may_belong_to_a_task() -> None:
    metrics = {"accuracy": Accuracy()}
    assert metrics_of(TASK.name, metrics) == metrics
    assert metrics_of("causal-lm", metrics) == {}


def test_a_product_of_whole_numbers_is_exact() -> None:
    rows = torch.tensor([[127.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    codes, steps = rounded(torch.tensor([[254.0, 2.0, -4.0], [0.0, -127.0, 5.0]]))
    assert codes.tolist() == [[127, 1, -2], [0, -127, 5]]
    assert steps.tolist() == [[2.0], [1.0]]
    expected = [[2 * (127 * 127 - 3 - 2), 3 * 127 + 5], [0, 0]]
    assert int8_product(rows, codes, steps).tolist() == expected


def test_a_network_in_int8_is_close_and_only_while_it_is() -> None:
    model = tiny_resnet()
    learn([Convolution()])
    layers = inventory(model, [RESNET]).layers
    method, storages = Int8Dynamic(), {}
    for layer in layers:
        source = Source(layer, Variant.dense(read_weight(model, layer).clone()))
        variant = method.compress([source], NO_STATISTICS, [{}])[0][0]
        storages[layer] = variant.storage
        write_weight(model, layer, variant.weight)
    given = pixels()
    before = model(given).logits
    with in_int8(model, storages) as count:
        inside = model(given).logits
    assert count == len(layers)
    assert not torch.equal(inside, before)
    torch.testing.assert_close(inside, before, rtol=0.05, atol=0.05)
    assert torch.equal(model(given).logits, before)
    storages[layers[0]] = Storage.dense(layers[0])
    with in_int8(model, storages) as count:
        assert count == len(layers) - 1
    seen = {"model": model, "tokenizer": reader(), "ids": windows(6), "task": TASK}
    evidence = Evidence(SCENE, storages, **seen)
    assert 0 <= Int8Accuracy().measure(evidence) <= 1
    dense = Evidence(SCENE, {}, **seen)
    assert Int8Accuracy().measure(dense) == Accuracy().measure(dense)
