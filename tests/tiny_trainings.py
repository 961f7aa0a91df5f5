"""A tiny workbench with text to train on, and policies with schedules."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import TextConfig
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import Plugins
from autoprune.policy import DENSE, Action, Policy
from autoprune.training import progress

LENGTH = 32


def write_lines(folder: Path) -> str:
    """Write a text of many lines; give the name of its source."""
    path = folder / "text.txt"
    lines = [f"Line {i} says that {i * i} is the square of {i}." for i in range(900)]
    path.write_text("\n\n".join(lines))
    return f"file:{path}"


def open_bench(
    plugins: Plugins, model: Path, text: str, cache: Path, *, recovery: int = 64
) -> Workbench:
    """Open a tiny checkpoint, with windows to train on."""
    return Workbench.open(
        plugins,
        model=str(model),
        task="causal-lm",
        text=TextConfig(
            source=text,
            window=LENGTH,
            statistics=6,
            fitness=4,
            choice=3,
            report=2,
            recovery=recovery,
        ),
        target="packed",
        seed=0,
        cache=cache,
    )


def policy_of(bench: Workbench, action: str, schedule: str) -> Policy:
    """Give all blocks one action, under a schedule."""
    inside = {
        site.name: site.layers[0].block is not None for site in bench.inventory.sites
    }
    found = Action.parse(action)
    return Policy(
        {name: found if block else DENSE for name, block in inside.items()}, schedule
    )


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Interrupt trainings at their steps, as a user does."""
    count = 0
    original = progress.Observer.on_step_end

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Observer, "on_step_end", counted)
        yield
