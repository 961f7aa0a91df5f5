"""Commands about plugins: what is installed, and what it can do."""

from typing import Annotated

import typer

from autoprune.options import AsJson, Modules, Verbose
from autoprune.reporting.session import session, tell_methods, tell_plugins


def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.")] = None,
    *,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the table for the README.")
    ] = False,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List the methods: what they do, where, and what it costs; or tell of one."""
    if markdown and (as_json or name):
        raise typer.BadParameter("--markdown stands alone: leave NAME and --json out")
    with session(verbose=verbose):
        from autoprune.plugins import load_plugins

        known = load_plugins(plugin or []).methods
        tell_methods(known, name, markdown=markdown, as_json=as_json)


def plugins(
    *, plugin: Modules = None, as_json: AsJson = False, verbose: Verbose = False
) -> None:
    """List the plugins and what each registers."""
    with session(verbose=verbose):
        from autoprune.plugins import load_plugins

        tell_plugins(load_plugins(plugin or []).records, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add these commands to a command line."""
    app.command()(methods)
    app.command()(plugins)
