"""Images as documents and windows, and a task that names their classes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoprune_plugins.conv_digits import DigitImages
from autoprune_plugins.conv_images import ImageClassification, PixelReader, read_image
from autoprune_plugins.text_sources import FileText
from tiny_convnets import (
    bench_of,
    reader,
    tiny_resnet,
    windows,
    write_images,
    write_resnet,
)
from torch import Tensor

from autoprune.errors import ModelError, TextError
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.task import output_layer
from autoprune.models.text import TextSource
from autoprune.plugins import load_plugins

TASK = ImageClassification()
SOURCES: dict[str, TextSource] = {"file": FileText(), "digits": DigitImages()}


def test_an_image_is_read_plane_by_plane() -> None:
    text = "P3\n# class: 12\n2 1 10\n1 2 3  10 5 0\n"
    assert read_image(text) == [12, 3, 1, 2, 26, 255, 51, 128, 76, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P5 # class: 1\n1 1 9\n3", r"image 4 is no plain Netpbm .* found 'P5 # class"),
        ("a story", "image 4 is no plain Netpbm image.* found 'a story'"),
        ("P2\n1 1 9\n3", "image 4 names 0 classes"),
        ("P2 # class: one\n1 1 9\n3", "image 4 names 1 classes.* number"),
        ("P2 # class: 1\n1 1 0\n0", "width 1, height 1 and 0 as its white"),
        ("P2 # class: 1\n0 1 9\n", "width 0, height 1 and 9 as its white"),
        ("P2 # class: 1\n2 1 9\n3", "has 1 numbers, expected 1 x 1 x 2 from 0 to 9"),
        ("P2 # class: 1\n1 1 9\n10", "has 1 numbers, expected 1 x 1 x 1 from 0 to 9"),
    ],
)
def test_what_is_no_image_is_refused(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_image(text, "image 4")


def split(source: str, **wanted: int) -> dict[str, Tensor]:
    found = TASK.load_splits(source, SOURCES, None, length=512, windows=wanted, seed=0)
    assert all(one.split == name for name, one in found.items())
    return {name: one.ids for name, one in found.items()}


def test_each_image_goes_to_one_split(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images.jsonl", 40)
    found = split(source, statistics=20, fitness=8, choice=6, report=6)
    assert [len(ids) for ids in found.values()] == [20, 8, 6, 6]
    rows = {tuple(row) for ids in found.values() for row in ids.tolist()}
    assert rows == {tuple(row) for row in windows(40).tolist()}
    again = split(source, statistics=20, fitness=8, choice=6, report=6)
    assert all(torch.equal(ids, again[name]) for name, ids in found.items())


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images.jsonl", 8)
    with (tmp_path / "images.jsonl").open("a") as file:
        file.write(json.dumps({"text": "P2 # class: 1\n1 1 9\n3"}) + "\n")
    match = r"image 9 has \(channels, height, width\) \[1, 1, 1\], .* \[1, 8, 8\]"
    with pytest.raises(TextError, match=match):
        split(source, statistics=4)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images.jsonl", 2)
    with pytest.raises(TextError, match="too few: split 'fitness' gets none of 2"):
        split(source, statistics=100, fitness=100, choice=100, report=1)


def test_a_reader_scales_resizes_and_is_written_again(tmp_path: Path) -> None:
    record = {"image_mean": [0.5, 0.0], "image_std": [0.5, 1.0], "size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record))
    read = TASK.load_tokenizer(Checkpoint("", tmp_path, ""))
    pixels = torch.tensor([[[[255, 0], [0, 255]], [[51, 51], [51, 51]]]])
    found = read(pixels)
    assert found[0, 0].tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert found[0, 1].flatten().tolist() == pytest.approx([0.2] * 4)
    grown = replace(read, size=(4, 6))(pixels)
    assert grown.shape == (1, 2, 4, 6)
    (tmp_path / "again").mkdir()
    read.save_pretrained(tmp_path / "again")
    assert PixelReader.load(tmp_path / "again") == read


def test_a_checkpoint_that_does_not_say_how_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="preprocessor_config.json does not say how"):
        TASK.load_tokenizer(Checkpoint("", tmp_path, ""))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(ModelError, match="KeyError: 'image_std'"):
        TASK.load_tokenizer(Checkpoint("", tmp_path, ""))


def test_head_and_features_are_the_models_logits() -> None:
    model, ids = tiny_resnet(), windows(5)
    batch = TASK.batch(ids, reader())
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]
    assert batch.scored.tolist() == [[True]] * 5
    found = TASK.head(model).logits(TASK.features(model, batch))
    torch.testing.assert_close(found, model(**batch.inputs).logits)
    assert output_layer(model) is model.classifier[1]


def test_a_body_alone_has_no_output_layer() -> None:
    with pytest.raises(ModelError, match="ResNetModel has no linear output layer"):
        output_layer(tiny_resnet().resnet)


def test_unknown_digits_are_refused() -> None:
    with pytest.raises(TextError, match="no digits 'validation'.*'digits:test'"):
        DigitImages().documents("validation")


@pytest.mark.slow
@pytest.mark.ci
def test_digits_are_parted_without_overlap() -> None:
    whole, train = DigitImages().documents(""), DigitImages().documents("train")
    assert train + DigitImages().documents("test") == whole
    assert len(whole) == 1797
    assert read_image(whole[0])[:4] == [0, 1, 8, 8]
    assert max(read_image(whole[0])) == 239  # 15 of 16


def test_classes_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    folder = write_resnet(tmp_path / "model", tiny_resnet(num_labels=4))
    with pytest.raises(ModelError, match=r"a label is class \d, but the model tells 4"):
        bench_of(folder, load_plugins(), tmp_path / "cache")
