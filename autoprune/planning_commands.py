"""The command that plans: what a run will take, before anything runs."""

from typing import Annotated

import typer

from autoprune.commands import configure
from autoprune.options import AsJson, Model, Modules, Trials, Verbose
from autoprune.reporting.session import session, write


def plan(
    space: Annotated[str, typer.Argument(help="A YAML file, or a space that ships.")],
    *,
    model: Model = None,
    device: Annotated[
        str, typer.Option(help="cpu, a GPU such as h100, or a record of rates.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Who evaluates beside the driver.")
    ] = 0,
    trials: Trials = None,
    budget: Annotated[str | None, typer.Option(help="Most time: 30min, 8h.")] = None,
    size: Annotated[str | None, typer.Option(help="Most bytes: 40%, 55 MB.")] = None,
    export: Annotated[bool, typer.Option(help="Plan the export as well.")] = True,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Tell what memory, disk and hours a run will take; only the shape is read.

    The model may be a size, 135M, 1B, 8B or 70B, or anything with a config.json.
    """
    with session(verbose=verbose):
        from autoprune.errors import ConfigError
        from autoprune.planning.foresee import foresee
        from autoprune.reporting.planned import planned_parts

        config = configure(
            space,
            ends={"budget": budget, "trials": trials},
            modules=plugin or (),
            model=model,
            objective__budgets__size_bytes=size,
        )
        found = foresee(config, device, workers=workers, export=export)
        write(found.to_dict(), *planned_parts(found), as_json=as_json)
        if found.misfit:
            raise ConfigError(found.misfit)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)
