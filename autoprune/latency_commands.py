"""Commands about time. They need no Optuna, no Ray and no pydantic."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.latency.profiles import PROFILES
from autoprune.options import AsJson, Verbose
from autoprune.reporting.session import session, write

if TYPE_CHECKING:
    from autoprune.latency.record import Outcome, PlanLine


def profile(
    *,
    device: Annotated[
        str | None,
        typer.Option(help="cuda or cpu; the GPU by default."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Stop after these.")] = 10.0,
    out: Annotated[Path, typer.Option(help="The folder of profiles.")] = Path(PROFILES),
    name: Annotated[str | None, typer.Option(help="Of the profile.")] = None,
    part: Annotated[
        str, typer.Option(help="all; kernels or models alone; finish what was begun.")
    ] = "all",
    probe: Annotated[
        bool, typer.Option("--probe", help="What a minute can tell.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what would be timed, and time nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a recording that was begun.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure what this device takes, kernel by kernel, into a profile.

    Points come in the order in which they matter, and each is on disk once it is timed:
    the end of the time, or a crash, leaves a profile that knows less.
    """
    with session(verbose=verbose) as console:
        from autoprune.latency.record import Order, plan_lines, record

        order = Order(
            kind=device or _own_kind(),
            folder=out,
            name=name,
            seconds=60.0 * minutes,
            part=part,
            probe=probe,
            resume=resume,
        )
        if plan:
            _tell_plan(plan_lines(order), as_json=as_json)
            return
        found = record(
            order, tell=lambda line: console.print(line, markup=False, highlight=False)
        )
        _tell_outcome(found, as_json=as_json)


def advise(
    *,
    model: Annotated[
        str, typer.Option(help="Folder, config.json, GGUF file, hub id, or demo.")
    ] = "demo",
    device: Annotated[
        str, typer.Option(help="h100, cpu, auto, or a profile's folder.")
    ] = "auto",
    workload: Annotated[
        list[str] | None, typer.Option(help="decode, serve, prefill; repeatable.")
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--format", help="2:4, int8, fp8-row, int4-g64; repeatable."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Tell what each format would gain on a device, layer by layer, and what not."""
    with session(verbose=verbose):
        from autoprune import advising
        from autoprune.reporting.advice import advice_parts

        asked = {"workloads": workload, "formats": form}
        given = {name: found for name, found in asked.items() if found}
        found = advising.advise(model, device, **given)
        write(found.to_dict(), *advice_parts(found), as_json=as_json)


def _own_kind() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _tell_plan(lines: Sequence["PlanLine"], *, as_json: bool) -> None:
    told = [
        f"{line.what}: {line.points} points of {line.shapes} shapes, "
        f"about {line.seconds:.0f} s"
        for line in lines
    ]
    minutes = sum(line.seconds for line in lines) / 60
    told.append(f"in all about {minutes:.1f} min, the most important first")
    write(list(lines), *told, as_json=as_json)


def _tell_outcome(found: "Outcome", *, as_json: bool) -> None:
    where = found.profile or found.work
    how = "complete" if found.complete else "not complete: time was up"
    write(found, f"{where}: {found.points} points, {how}", as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add these commands to a command line."""
    app.command()(profile)
    app.command()(advise)
