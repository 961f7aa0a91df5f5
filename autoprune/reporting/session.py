"""What a command is wrapped in: messages, errors, exit codes, results on their own.

Everything heavy is imported late, so that ``--help`` answers at once.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from autoprune.errors import AutoPruneError

if TYPE_CHECKING:
    from autoprune.reporting.console import ConsoleObserver

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""


@contextmanager
def session(*, verbose: bool) -> Iterator[Console]:
    """Set up messages, and turn what goes wrong into a message and an exit code.

    Args:
        verbose: Tell everything, with tracebacks, and what other libraries say.

    Yields:
        The console for messages and progress: standard error.

    Raises:
        SystemExit: With 1 after an error of AutoPrune's, 130 after Ctrl-C.
    """
    console = Console(stderr=True)
    if not verbose:  # these libraries read it when they are imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from autoprune.reporting.console import logging_to

    with warnings.catch_warnings(), logging_to(console, verbose=verbose):
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            yield console
        except AutoPruneError as error:
            if verbose:
                console.print_exception()
            # As it is: a message may hold brackets, and paths must stay whole.
            text = f"error: {error}"
            console.print(
                text, style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            console.print("interrupted; what was done is kept")
            raise SystemExit(INTERRUPTED) from error


@contextmanager
def observing(console: Console, **about: Any) -> Iterator["ConsoleObserver"]:
    """Draw progress for as long as the block runs; takes what its observer takes."""
    from autoprune.reporting.console import ConsoleObserver

    with ConsoleObserver(console, **about) as observer:
        yield observer


def write(data: Any, *parts: Any, as_json: bool) -> None:
    """Write a result to standard output.

    Args:
        data: For machines: what JSON can hold, or objects of results.
        *parts: For people: lines and tables.
        as_json: Write the data, and nothing else.
    """
    from autoprune.reporting.machine import to_json

    if as_json:
        sys.stdout.write(to_json(data) + "\n")
        return
    console = Console()
    for part in parts:
        console.print(
            part, markup=False, highlight=False, soft_wrap=isinstance(part, str)
        )


def tell_search(result: Any, *, as_json: bool, exports: Sequence[Any] = ()) -> None:
    """Write what a search found, and the exports made of it.

    Args:
        result: A ``SearchResult``.
        as_json: For a machine.
        exports: ``ExportReport`` objects.

    Raises:
        SystemExit: With 130 if the search was stopped.
    """
    from autoprune.reporting import tables
    from autoprune.reporting.export_tables import exports_parts

    parts = tables.search_parts(result)
    parts += exports_parts(exports) if exports else []
    write(result.to_dict() | {"exports": exports}, *parts, as_json=as_json)
    if result.ended == "stopped":
        raise SystemExit(INTERRUPTED)


def tell_solutions(found: Sequence[Any], *, as_json: bool) -> None:
    """Write what was solved for, not measured."""
    from autoprune.reporting import machine, tables

    data = [machine.solution_data(one) for one in found]
    shown = data[0] if len(data) == 1 else data
    write(shown, *tables.solutions_parts(found), as_json=as_json)


def tell_exports(reports: Sequence[Any], *, as_json: bool) -> None:
    """Write what was exported."""
    from autoprune.reporting.export_tables import exports_parts

    write(reports, *exports_parts(reports), as_json=as_json)


def tell_plugins(records: Iterable[Any], *, as_json: bool) -> None:
    """Write what became of each plugin."""
    from autoprune.reporting import tables

    known = list(records)
    write(known, tables.plugins_table(known), as_json=as_json)


def tell_methods(
    methods: Mapping[str, Any], name: str | None, *, markdown: bool, as_json: bool
) -> None:
    """Write what methods there are, or all about one.

    Raises:
        PluginError: If there is none of that name.
    """
    from autoprune.reporting import methods as cards

    if name is not None:
        card = cards.card_of(name, methods)
        write(card, *cards.card_parts(card), as_json=as_json)
        return
    found = cards.cards_of(methods)
    table = cards.markdown_table if markdown else cards.methods_table
    write(found, table(found), as_json=as_json)
