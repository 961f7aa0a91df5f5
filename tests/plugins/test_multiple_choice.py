"""Accuracy on multiple choice, against probabilities worked out one by one."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.multiple_choice import (
    CHOICES,
    LM_EVAL,
    ChoiceAccuracy,
    LmEvalAccuracy,
    Question,
    read_questions,
    register_metrics,
)
from autoprune_plugins.packed import Packed
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from autoprune.errors import PluginError, TextError
from autoprune.evaluation.metric import Evidence, Scene

SCENE = Scene((), {}, Packed(), 0)
ROW = {"question": "The sky is", "choices": ["blue", "wet and cold"], "answer": 0}


def evidence(model: Any, tokenizer: Any) -> Evidence:
    return Evidence(SCENE, {}, model=model, tokenizer=tokenizer)


def log_likelihood(model: Any, begin: str, end: str) -> float:
    """Add up the log-probabilities of the bytes of ``end``, one forward pass each."""
    text = begin.encode()
    total = 0.0
    for byte in end.encode():
        logits = model(torch.tensor([list(text)])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[byte])
        text += bytes([byte])
    return total


def jsonl(folder: Path, *rows: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("The sky is", ("blue", "wet and cold", "no")),
        ("2 + 2 =", ("4", "22")),
        ("Trailing blanks   ", ("are cut", "stay")),
        ("Grüße", ("äöü", "no umlauts here")),
    ],
)
def test_the_likeliest_a_character_wins(
    text: str,
    choices: tuple[str, ...],
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    scores = [
        log_likelihood(tiny_model, text.rstrip(), f" {choice}") / len(choice)
        for choice in choices
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    for answer in range(len(choices)):
        metric = ChoiceAccuracy((Question(text, choices, answer),))
        found = metric.measure(evidence(tiny_model, tiny_tokenizer))
        assert found == (1.0 if answer == best else 0.0)


def test_length_does_not_decide(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # By their sum, the shorter one would win almost always; a character, it does not.
    rows = []
    for begin in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        sums = [log_likelihood(tiny_model, begin, f" {c}") for c in ("ab", "ab" * 9)]
        each = [sums[0] / 2, sums[1] / 18]
        assert sums[0] > sums[1]
        rows.append(Question(begin, ("ab", "ab" * 9), each.index(max(each))))
    assert any(row.answer == 1 for row in rows)
    metric = ChoiceAccuracy(tuple(rows))
    assert metric.measure(evidence(tiny_model, tiny_tokenizer)) == 1.0


def test_accuracy_is_a_fraction(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = tuple(Question(t, ("x", "why"), 0) for t in ("a", "b", "c", "d", "e"))
    alone = [
        ChoiceAccuracy((row,)).measure(evidence(tiny_model, tiny_tokenizer))
        for row in rows
    ]
    together = ChoiceAccuracy(rows).measure(evidence(tiny_model, tiny_tokenizer))
    assert together == pytest.approx(sum(alone) / 5)


def test_what_does_not_fit_falls_off_at_the_beginning(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "x" * 400 + " end"  # the model takes 256 tokens
    choices = ("short", "somewhat longer")
    scores = []
    for choice in choices:
        begin = text[-(256 - len(choice) - 1) :]
        scores.append(log_likelihood(tiny_model, begin, f" {choice}") / len(choice))
    best = scores.index(max(scores))
    metric = ChoiceAccuracy((Question(text, choices, best),))
    assert metric.measure(evidence(tiny_model, tiny_tokenizer)) == 1.0


def test_a_diverged_model_is_not_right_by_chance(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.get_parameter("model.norm.weight").data.fill_(math.nan)
    metric = ChoiceAccuracy((Question("a", ("b", "c"), 0),))
    assert math.isnan(metric.measure(evidence(tiny_model, tiny_tokenizer)))


def test_nothing_is_registered_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHOICES, raising=False)
    monkeypatch.delenv(LM_EVAL, raising=False)
    assert register_metrics() == []


def test_a_file_registers_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOICES, str(jsonl(tmp_path, ROW, {**ROW, "answer": 1})))
    [metric] = register_metrics()
    assert isinstance(metric, ChoiceAccuracy)
    assert (metric.name, metric.direction) == ("choice_accuracy", "maximize")
    assert metric.needs_model
    assert [row.answer for row in metric.questions] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": 3}, r"questions.jsonl:2: 'question' is 3, expected text"),
        ({"question": " "}, r"questions.jsonl:2: 'question' is ' '"),
        ({"choices": "ab"}, r":2: 'choices' is 'ab', expected two texts or more"),
        ({"choices": ["a"]}, r":2: 'choices' is \['a'\]"),
        ({"choices": ["a", ""]}, r":2: 'choices' is \['a', ''\]"),
        ({"choices": ["a", 2]}, r":2: 'choices' is \['a', 2\]"),
        ({"answer": 2}, r":2: 'answer' is 2, expected an index of the 2 choices"),
        ({"answer": -1}, r":2: 'answer' is -1"),
        ({"answer": "A"}, r":2: 'answer' is 'A'"),
        ({"answer": True}, r":2: 'answer' is True"),
    ],
)
def test_a_bad_row_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TextError, match=message):
        read_questions(jsonl(tmp_path, ROW, {**ROW, **changes}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n{"question": "a"}\n', r"questions.jsonl:2: .*KeyError: 'choices'"),
        ("{question}", r"questions.jsonl:1: cannot read '{question}' \(JSONDecodeErr"),
        ("[1]", r":1: cannot read '\[1\]' \(TypeError"),
        ("\n \n", r"questions.jsonl, named by AUTOPRUNE_CHOICES, has no question"),
    ],
)
def test_a_bad_file_is_told(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(TextError, match=message):
        read_questions(file)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        TextError, match=r"questions '.*gone.jsonl' named by AUTOPRUNE_"
    ):
        read_questions(tmp_path / "gone.jsonl")


def test_lm_eval_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LM_EVAL, "arc_easy, hellaswag,")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(PluginError, match="asks for arc_easy, hellaswag, but lm-eval"):
        register_metrics()


def test_tasks_of_lm_eval_have_names_of_their_own() -> None:
    metrics = [LmEvalAccuracy("arc_easy"), LmEvalAccuracy("HellaSwag")]
    assert [metric.name for metric in metrics] == [
        "lm_eval.arc_easy",
        "lm_eval.hellaswag",
    ]
