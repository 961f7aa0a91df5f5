"""Accuracy on multiple choice, from local questions or from tasks of lm-eval.

Metrics take no arguments, so the environment names what is asked:

``AUTOPRUNE_CHOICES``
    A JSONL file, a question a line: ``{"question": "The sky is", "choices": ["blue",
    "wet"], "answer": 0}``. Registers the metric ``choice_accuracy``.

``AUTOPRUNE_LM_EVAL``
    Tasks of lm-eval, comma-separated: ``arc_easy,hellaswag``. Registers a metric
    ``lm_eval.<task>`` each.
"""

import importlib
import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoprune.errors import PluginError, TextError
from autoprune.evaluation.metric import Evidence, Metric
from autoprune.hookspecs import hookimpl

CHOICES = "AUTOPRUNE_CHOICES"
LM_EVAL = "AUTOPRUNE_LM_EVAL"


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        text: What stands before the answer.
        choices: The possible answers.
        answer: Index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


class ChoiceAccuracy(Metric):
    """Fraction of questions where the right choice is the likeliest.

    The convention of lm-eval's ``acc_norm``: question and choice are joined by one
    blank, the choice's log-likelihood is divided by its number of characters, the
    largest wins, the first of equals. No tokens that begin a text are added.

    Args:
        questions: The questions.
    """

    name = "choice_accuracy"
    direction = "maximize"
    needs_model = True
    help = f"fraction of right answers to the questions in ${CHOICES}, as acc_norm"

    def __init__(self, questions: tuple[Question, ...]) -> None:
        self.questions = questions

    def measure(self, evidence: Evidence) -> float:
        """Ask all questions; NaN if the model gives no numbers."""
        right = 0
        with torch.inference_mode():
            for question in self.questions:
                scores = _scores(evidence.model, evidence.tokenizer, question)
                if not all(map(math.isfinite, scores)):
                    return math.nan
                right += scores.index(max(scores)) == question.answer
        return right / len(self.questions)


class LmEvalAccuracy(Metric):
    """Accuracy on a task of lm-eval: ``acc_norm`` where the task has it, else ``acc``.

    Args:
        task: Name of the task.
    """

    name = "lm_eval"  # each object has its own
    direction = "maximize"
    needs_model = True
    help = "accuracy on a task of lm-eval: acc_norm, else acc"

    def __init__(self, task: str) -> None:
        self.task = task
        self.name = f"lm_eval.{task.lower()}"

    def measure(self, evidence: Evidence) -> float:
        """Let lm-eval ask.

        Raises:
            PluginError: If lm-eval does not know the task, or gives no accuracy.
        """
        lm_eval = importlib.import_module("lm_eval")
        models = importlib.import_module("lm_eval.models.huggingface")
        model = models.HFLM(pretrained=evidence.model, tokenizer=evidence.tokenizer)
        try:
            found = lm_eval.simple_evaluate(
                model=model, tasks=[self.task], bootstrap_iters=0, log_samples=False
            )
            results: dict[str, Any] = found["results"][self.task]
        except Exception as error:  # foreign code, foreign data
            raise PluginError(
                f"lm-eval cannot run the task {self.task!r} named by {LM_EVAL}: "
                f"{type(error).__name__}: {error}"
            ) from error
        for key in ("acc_norm,none", "acc,none"):
            if key in results:
                return float(results[key])
        raise PluginError(
            f"the task {self.task!r} of lm-eval named by {LM_EVAL} gives no accuracy, "
            f"only {sorted(results)}. Name tasks of multiple choice"
        )


def read_questions(file: Path) -> tuple[Question, ...]:
    """Read a JSONL file of questions; empty lines are left out.

    Raises:
        TextError: If it cannot be read, has no question, or a line is none; names the
            line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"cannot read the questions {str(file)!r} named by {CHOICES}: {error}"
        ) from error
    rows = enumerate(lines, start=1)
    questions = tuple(
        _question(line, f"{file}:{n}") for n, line in rows if line.strip()
    )
    if not questions:
        raise TextError(f"{file}, named by {CHOICES}, has no question: it is empty")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        text, choices, answer = row["question"], row["choices"], row["answer"]
    except (ValueError, TypeError, KeyError) as error:
        raise TextError(
            f"{where}: cannot read {line[:80]!r} ({type(error).__name__}: {error}). "
            'Expected {"question": "...", "choices": ["...", "..."], "answer": 0}'
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise TextError(f"{where}: 'question' is {text!r}, expected text")
    several = isinstance(choices, list) and len(choices) >= 2
    if not several or not all(isinstance(item, str) and item for item in choices):
        raise TextError(
            f"{where}: 'choices' is {choices!r}, expected two texts or more"
        )
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if not whole or not 0 <= answer < len(choices):
        raise TextError(
            f"{where}: 'answer' is {answer!r}, expected an index of the {len(choices)} "
            "choices, from 0"
        )
    return Question(text, tuple(choices), answer)


def _scores(model: Any, tokenizer: Any, question: Question) -> list[float]:
    """Give each choice's log-likelihood a character, after the question."""
    text = question.text.rstrip()
    begin = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = [
        tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]
        for choice in question.choices
    ]
    longest = getattr(model.config, "max_position_embeddings", None) or 2**31
    # The last tokens are scored; what does not fit falls off at the beginning.
    scored = [max(1, len(ids) - len(begin)) for ids in whole]
    kept = [ids[-longest:] for ids in whole]
    width = max(map(len, kept))
    rows = torch.zeros(len(kept), width, dtype=torch.long)
    for row, ids in zip(rows, kept, strict=True):
        row[: len(ids)] = torch.tensor(ids)  # padding stands behind and is never seen
    mask = torch.arange(width) < torch.tensor([[len(ids)] for ids in kept])
    logits = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits
    scores = []
    for ids, count, row, choice in zip(
        kept, scored, logits, question.choices, strict=True
    ):
        count = min(count, len(ids) - 1)
        before = row[len(ids) - 1 - count : len(ids) - 1].float().log_softmax(-1)
        found = before.gather(1, torch.tensor(ids[-count:])[:, None]).sum()
        scores.append(float(found) / len(choice))
    return scores


@hookimpl
def register_metrics() -> list[Metric]:
    """Register what the environment asks for; nothing by default."""
    metrics: list[Metric] = []
    if file := os.environ.get(CHOICES):
        metrics.append(ChoiceAccuracy(read_questions(Path(file).expanduser())))
    tasks = [task.strip() for task in os.environ.get(LM_EVAL, "").split(",")]
    tasks = [task for task in tasks if task]
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise PluginError(
            f"{LM_EVAL} asks for {', '.join(tasks)}, but lm-eval is not installed: "
            "'pip install lm-eval', or unset the variable"
        )
    return [*metrics, *map(LmEvalAccuracy, tasks)]
