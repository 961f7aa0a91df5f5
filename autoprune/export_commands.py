"""The commands about exports: write and check one, take a policy elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from autoprune.commands import run_folder, text_config
from autoprune.options import AsJson, Force, Modules, Run, Target, Text, Verbose
from autoprune.reporting.session import observing, session, tell_exports, write

TARGET = "packed"
"""The target of a policy that no run has chosen one for."""


def export(
    run: Run,
    *,
    trial: Annotated[
        str | None, typer.Option(help="A trial, not the winner: 13, or round-2/13.")
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="All of the front.")] = False,
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Export the winner of a run, a trial or the front, and verify it."""
    if front and trial is not None:
        raise typer.BadParameter("give --trial or --front, not both")
    with session(verbose=verbose) as console:
        from autoprune import deliver

        with observing(console) as observer:
            reports = deliver.export(
                run_folder(run),
                out=out,
                trial=trial,
                front=front,
                target=target,
                force=force,
                observer=observer,
            )
        tell_exports(reports, as_json=as_json)


def verify(
    folder: Annotated[Path, typer.Argument(help="An export's folder.")],
    *,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check an export against its manifest, wherever it was copied to."""
    with session(verbose=verbose):
        from autoprune.exporting.verification import verify as check
        from autoprune.reporting.export_tables import verified_table

        found = check(folder, plugins=plugin or [])
        whole = f"{folder} is what was exported"
        title = f"{whole}; perplexity is that of the windows in its manifest"
        plain = f"{whole}; it has no weights to load"
        told = verified_table(found, title=title) if found else plain
        write(found, told, as_json=as_json)


def apply(
    policy: Annotated[
        Path, typer.Argument(help="A policy.json, or the folder of a run or an export.")
    ],
    *,
    model: Annotated[str, typer.Option(help="Folder, hub id, GGUF file, or demo.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    target: Target = None,
    text: Text = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="To another depth, by relative depth.")
    ] = False,
    statistics: Annotated[
        str, typer.Option(help="anew, or reuse: those of the policy's own model.")
    ] = "anew",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that have to share every layer.")
    ] = 1,
    plugin: Modules = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Put a policy on another checkpoint, and export it."""
    with session(verbose=verbose) as console:
        from autoprune import transfer

        with observing(console) as observer:
            report = transfer.apply(
                policy,
                model=model,
                out=out,
                target=target or TARGET,
                text=text_config(text),
                adapt=adapt,
                statistics=statistics,
                tensor_parallel=tensor_parallel,
                force=force,
                plugins=plugin or [],
                observer=observer,
            )
        tell_exports([report], as_json=as_json)


def train(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    *,
    policy: Annotated[
        Path, typer.Option(help="A policy.json, or the folder of a run or an export.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    schedule: Annotated[
        str | None,
        typer.Option(help="one-shot + distill(tokens=65536); the policy's by default."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Windows of the text to train on.")
    ] = 128,
    target: Target = None,
    text: Text = None,
    plugin: Modules = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a model by a policy and its schedule, and export it."""
    with session(verbose=verbose) as console:
        from autoprune import transfer
        from autoprune.config import TextConfig

        asked = text_config(text) or TextConfig()
        with observing(console) as observer:
            report = transfer.apply(
                policy,
                model=model,
                out=out,
                target=target or TARGET,
                text=asked.model_copy(update={"recovery": windows}),
                schedule=schedule,
                force=force,
                plugins=plugin or [],
                observer=observer,
            )
        tell_exports([report], as_json=as_json)


def targets(
    *,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the table for the README.")
    ] = False,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List the export targets: what each stores, and what loads it."""
    if markdown and as_json:
        raise typer.BadParameter("--markdown stands alone: leave --json out")
    with session(verbose=verbose):
        from autoprune.plugins import load_plugins
        from autoprune.reporting.export_tables import targets_markdown, targets_table

        found = load_plugins(plugin or []).objects["exporters"]
        known = [found[name] for name in sorted(found)]
        keys = ("name", "stores", "loads_in")
        data = [{key: getattr(one, key) for key in keys} for one in known]
        table = targets_markdown if markdown else targets_table
        write(data, table(data), as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (export, verify, apply, train, targets):
        app.command()(command)
