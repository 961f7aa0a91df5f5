"""The commands: a thin layer over what Python callers use. Heavy imports are late."""

from pathlib import Path
from typing import Annotated, Any

import typer

from autoprune import (
    export_commands,
    latency_commands,
    planning_commands,
    plugin_commands,
)
from autoprune.commands import (
    configure,
    new_folder,
    run_folder,
    search_until_stopped,
    text_config,
    time_limits,
    within_time,
)
from autoprune.options import (
    Address,
    AsJson,
    Engine,
    Latency,
    Model,
    Modules,
    Run,
    RunDir,
    Target,
    Text,
    Trials,
    Verbose,
    Workers,
)
from autoprune.reporting.session import (
    observing,
    session,
    tell_search,
    tell_solutions,
    write,
)

DEMO = "quick"
"""Name of the space that the demo searches."""

TARGETS = ("packed", "transformers")
"""What the demo exports to."""

app = typer.Typer(
    name="autoprune",
    help="Search, per layer, for the best way to compress a transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _about(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Tell the version.")
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("autoprune"))
        raise typer.Exit


@app.command()
def search(
    space: Annotated[str, typer.Argument(help="A YAML file, or a space that ships.")],
    *,
    model: Model = None,
    run: RunDir = None,
    budget: Annotated[str | None, typer.Option(help="Most time: 30min, 8h.")] = None,
    deadline: Annotated[
        str | None, typer.Option(help="When all has to be done: 07:30.")
    ] = None,
    trials: Trials = None,
    size: Annotated[str | None, typer.Option(help="Most bytes: 40%, 55 MB.")] = None,
    latency: Latency = None,
    device: Annotated[
        str | None, typer.Option(help="Whose time counts: h100, cpu, a profile.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The strategy.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all chance.")] = None,
    text: Text = None,
    workers: Workers = None,
    engine: Engine = None,
    address: Address = None,
    ledger: Annotated[
        str | None, typer.Option(metavar="URL", help="PostgreSQL, for the rows.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="Show it in an Optuna storage.")
    ] = None,
    export: Annotated[
        bool, typer.Option(help="Export the winner at the end, verified.")
    ] = True,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best policy. The same command goes on where it stopped.

    Of --budget, --deadline and --trials, what is given here stands in place of all
    three in the file.
    """
    with session(verbose=verbose) as console:
        config = configure(
            space,
            ends={"budget": budget, "deadline": deadline, "trials": trials},
            modules=plugin or (),
            model=model,
            text__source=text,
            objective__budgets__size_bytes=size,
            search__sampler=sampler,
            search__seed=seed,
            workers__count=workers,
            workers__engine=engine,
            workers__address=address,
            ledger=ledger,
            mirror=mirror,
            **within_time(latency or (), device),
        )
        folder = new_folder(run, space)
        result = search_until_stopped(config, folder, console, export=export)
        tell_search(result, as_json=as_json, exports=result.exports)


@app.command()
def status(run: Run, *, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Tell how a run stands, also while it goes on."""
    with session(verbose=verbose):
        from autoprune.reporting import tables
        from autoprune.reporting.status import RunStatus

        found = RunStatus.read(run_folder(run))
        write(found.to_dict(), *tables.status_parts(found), as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or an export's folder.")],
    *,
    policy: Annotated[Path | None, typer.Option(help="Put this policy on it.")] = None,
    text: Text = None,
    target: Target = None,
    measure_latency: Annotated[
        bool,
        typer.Option("--measure-latency", help="Also run an export against the clock."),
    ] = False,
    device: Annotated[str, typer.Option(help="Whose profile predicts.")] = "auto",
    workload: Annotated[
        list[str] | None, typer.Option(help="decode, serve, prefill; repeatable.")
    ] = None,
    plugin: Modules = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model, an export, or a policy on a model."""
    with session(verbose=verbose) as console:
        from autoprune import transfer
        from autoprune.reporting import tables

        with observing(console) as observer:
            found = transfer.evaluate(
                model,
                policy=policy,
                text=text_config(text),
                target=target or TARGETS[0],
                plugins=plugin or [],
                observer=observer,
            )
        parts: list[Any] = [tables.metrics_table(found, title=model)]
        data: dict[str, Any] = dict(found)
        if measure_latency:
            from autoprune import proving
            from autoprune.reporting.advice import proven_parts

            asked, modules = workload or ["decode"], plugin or []
            proven = proving.prove(
                model, device=device, workloads=asked, plugins=modules
            )
            parts += proven_parts(proven)
            data["latency"] = proven.to_dict()
        write(data, *parts, as_json=as_json)


@app.command()
def solve(
    run: Run,
    *,
    size: Annotated[str | None, typer.Option(help="Most bytes: 40%, 55 MB.")] = None,
    latency: Latency = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=LIMIT", help="Of an additive metric; repeatable."),
    ] = None,
    front: Annotated[
        int | None, typer.Option(min=2, help="So many points of the whole front.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the policy here.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Solve a run for another budget, in seconds, without measuring anything."""
    if front is None and not (size or budget or latency):
        raise typer.BadParameter(
            "give --size, --latency, --budget METRIC=LIMIT or --front COUNT"
        )
    with session(verbose=verbose):
        from autoprune import solving

        if front is not None:
            tell_solutions(solving.front(run_folder(run), count=front), as_json=as_json)
            return
        limits = [f"size_bytes={size}"] if size else []
        limits += [f"{metric}={limit}" for metric, limit in time_limits(latency or ())]
        found = solving.solve(run_folder(run), [*limits, *(budget or [])], out=out)
        tell_solutions([found], as_json=as_json)


@app.command()
def demo(
    *,
    model: Model = None,
    run: RunDir = None,
    trials: Trials = None,
    text: Text = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compress SmolLM2-135M, export it to two targets, and verify both."""
    with session(verbose=verbose) as console:
        from autoprune import deliver

        ends = {"trials": trials}
        config = configure(DEMO, ends=ends, model=model, text__source=text)
        folder = new_folder(run, "demo")
        result = search_until_stopped(config, folder, console)
        reports = []
        for target in TARGETS if result.finals else ():
            with observing(console) as observer:
                reports += deliver.export(
                    folder, target=target, force=True, observer=observer
                )
        tell_search(result, as_json=as_json, exports=reports)


export_commands.register(app)
plugin_commands.register(app)
latency_commands.register(app)
planning_commands.register(app)
